#include "shadow.h"

#include <string>
#include <vector>

#include "emulated.h"

namespace dx::cuda::emulated {
namespace {

// Two readers are enough to convict a writer: of two different threads at least one is not the writer.
struct Byte {
  uint32_t life = 0;  // the launch (global memory) or block (shared memory) that this knowledge is about
  uint8_t readers = 0;
  bool written = false, pending = false;
  Stamp writer = {}, reader[2] = {};
};

struct Region {
  const unsigned char* begin;
  size_t size;
  bool writable;
  std::string name;
  std::vector<Byte> bytes;
};

std::vector<Region> regions;
Region shared = {nullptr, 0, true, "shared memory", {}};
Region* latest = nullptr;  // of the last access: the next one is often in the same
uint32_t launch_serial = 0;
bool trusted = false;

// Called for each byte of each access.
#define DX_INLINE inline __attribute__((always_inline))

// Whether everything thread `now` does comes after `before`, by program order or by a barrier between them.
DX_INLINE bool ordered(const Stamp& before, const Stamp& now) {
  if (before.block != now.block) return false;
  if (before.thread == now.thread || before.block_epoch < now.block_epoch) return true;
  return before.thread / kWarp == now.thread / kWarp && before.warp_epoch < now.warp_epoch;
}

std::string place(const Region& region, const unsigned char* p, size_t bytes) {
  return region.name + " at byte " + std::to_string(p - region.begin) + " of " + std::to_string(region.size) + ", " +
         std::to_string(bytes) + " bytes";
}

// Null for memory that is trusted.
Region* find(const void* address, size_t bytes, const char* what) {
  const auto* p = static_cast<const unsigned char*>(address);
  if (latest && p >= latest->begin && p + bytes <= latest->begin + latest->size) return latest;
  const auto touches = [&](const Region& r) { return p + bytes > r.begin && p < r.begin + r.size; };
  Region* found = touches(shared) ? &shared : nullptr;
  for (Region& region : regions)
    if (touches(region)) found = &region;
  if (!found && trusted) return nullptr;
  if (!found) fail(std::string(what) + " outside of all memory, " + std::to_string(bytes) + " bytes");
  if (p < found->begin || p + bytes > found->begin + found->size)
    fail(std::string(what) + " beyond the end of " + place(*found, p, bytes));
  return latest = found;
}

[[noreturn]] void race(const char* what, const Region& region, const unsigned char* p, size_t bytes,
                       const Stamp& other) {
  fail(std::string("race: ") + what + " of " + place(region, p, bytes) + ", with thread " +
       std::to_string(other.thread) + (other.block == stamp().block ? " of the same block" : " of another block"));
}

DX_INLINE Byte& byte_at(Region& region, const unsigned char* p, uint32_t life) {
  Byte& byte = region.bytes[size_t(p - region.begin)];
  if (byte.life != life) byte = Byte(), byte.life = life;
  return byte;
}

void check_alignment(const void* p, size_t alignment) {
  if (uintptr_t(p) % alignment != 0) fail("misaligned access: " + std::to_string(alignment) + " bytes");
}

void record_write(Region& region, unsigned char* p, size_t bytes, bool pending) {
  const Stamp now = stamp();
  const uint32_t life = &region == &shared ? now.block : launch_serial;
  for (size_t i = 0; i < bytes; ++i) {
    Byte& byte = byte_at(region, p + i, life);
    if (byte.written && !ordered(byte.writer, now)) race("two writes", region, p, bytes, byte.writer);
    for (int r = 0; r < byte.readers; ++r)
      if (!ordered(byte.reader[r], now)) race("write after read", region, p, bytes, byte.reader[r]);
    byte.written = true;
    byte.pending = pending;
    byte.readers = 0;
    byte.writer = now;
  }
}

}  // namespace

void begin_launch(unsigned char* begin, size_t bytes) {
  ++launch_serial;
  latest = nullptr;
  shared.begin = begin;
  shared.size = bytes;
  shared.bytes.resize(bytes);
}

void add_memory(const void* begin, size_t bytes, bool writable, const char* name) {
  latest = nullptr;
  regions.push_back({static_cast<const unsigned char*>(begin), bytes, writable, name, std::vector<Byte>(bytes)});
}
void clear_memory() {
  latest = nullptr;
  regions.clear();
}
void trust_memory(bool yes) { trusted = yes; }

void check_read(const void* address, size_t bytes, size_t alignment) {
  check_alignment(address, alignment);
  Region* found = find(address, bytes, "read");
  if (!found) return;
  Region& region = *found;
  const auto* p = static_cast<const unsigned char*>(address);
  const Stamp now = stamp();
  const uint32_t life = &region == &shared ? now.block : launch_serial;
  for (size_t i = 0; i < bytes; ++i) {
    Byte& byte = byte_at(region, p + i, life);
    if (byte.pending) fail("read of an asynchronous copy that was not waited for: " + place(region, p, bytes));
    if (byte.written && !ordered(byte.writer, now)) race("read after write", region, p, bytes, byte.writer);
    if (!byte.written && &region == &shared) fail("read of what nobody wrote: " + place(region, p, bytes));
    int kept = 0;
    for (int r = 0; r < byte.readers; ++r)
      if (!ordered(byte.reader[r], now)) byte.reader[kept++] = byte.reader[r];
    byte.reader[kept < 2 ? kept : 1] = now;
    byte.readers = uint8_t(kept < 2 ? kept + 1 : 2);
  }
}

void check_write(void* address, size_t bytes, size_t alignment) {
  check_alignment(address, alignment);
  Region* found = find(address, bytes, "write");
  if (!found) return;
  Region& region = *found;
  if (!region.writable) fail("write to read-only " + place(region, static_cast<unsigned char*>(address), bytes));
  record_write(region, static_cast<unsigned char*>(address), bytes, false);
}

void mark_pending(void* address, size_t bytes, bool pending) {
  Region* region = find(address, bytes, "asynchronous copy");
  if (region != &shared) fail("asynchronous copy to what is not shared memory");
  record_write(shared, static_cast<unsigned char*>(address), bytes, pending);
}

}  // namespace dx::cuda::emulated
