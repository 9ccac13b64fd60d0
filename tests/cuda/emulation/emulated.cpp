// Fibers: contexts are made by ucontext and switched by _setjmp (which, unlike swapcontext, asks the kernel nothing).
#include "emulated.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "shadow.h"

namespace dx::cuda::emulated {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

struct AsyncCopy {
  unsigned char* to;
  const unsigned char* from;
  size_t size, valid;
};

struct Meeting {  // of a warp or a block
  int size = 0, arrived = 0;
  uint64_t ticket = 0;  // how many meetings are over
  const char* operation = nullptr;
};

struct Fiber {
  jmp_buf at;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  const Meeting* meeting = nullptr;  // where it waits
  uint64_t ticket;
  std::deque<std::vector<AsyncCopy>> groups;
  std::vector<AsyncCopy> open_group;

  bool waits() const { return meeting && meeting->ticket == ticket; }
};

struct Warp {
  Meeting meeting;
  uint16_t epoch = 0;
  alignas(64) unsigned char slots[2][kWarp * kSlotBytes];
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  Meeting block;
  Place place = {};
  uint32_t block_serial = 0;
  uint16_t block_epoch = 0;
  int current = -1;
  jmp_buf scheduler;
  const std::function<void()>* body = nullptr;
  std::string error;
  bool failed = false;
  unsigned order = 0;
  int launches = 0, allowances = 0, device = 0;
  std::map<std::pair<int, const void*>, size_t> allowed;  // bytes of shared memory, by device and kernel
  cudaError_t pretended = cudaSuccess;
  bool capturing = false;
  alignas(128) unsigned char shared[kMostShared];
  size_t shared_size = 0;
};
Machine machine;

Fiber& me() { return *machine.fibers[machine.current]; }
Warp& my_warp() { return machine.warps[machine.current / kWarp]; }

std::string where() {
  const Place& p = machine.place;
  return " (block " + std::to_string(p.block[0]) + "," + std::to_string(p.block[1]) + " thread " +
         std::to_string(p.thread) + ")";
}

void to_scheduler() {
  if (_setjmp(me().at) == 0) _longjmp(machine.scheduler, 1);
}

// One turn for each block: a context of its own for each would ask the kernel for the signals' mask every time.
void fiber_main() {
  for (;;) {
    try {
      (*machine.body)();
      if (!me().open_group.empty() || !me().groups.empty()) fail("ends with asynchronous copies in flight");
    } catch (const Failure& failure) {
      if (!machine.failed) machine.error = failure.text + where();
      machine.failed = true;
    }
    me().done = true;
    to_scheduler();
  }
}

void resume(int thread) {
  machine.current = thread;
  machine.place.thread = unsigned(thread);
  Fiber& fiber = me();
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

// Returns when everyone of the meeting has come; true for the last one.
bool meet(Meeting& meeting, const char* operation) {
  if (meeting.arrived > 0 && meeting.operation != operation && std::strcmp(meeting.operation, operation) != 0)
    fail(std::string("threads meet in different operations: ") + operation + " and " + meeting.operation);
  meeting.operation = operation;
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.ticket;
    return true;
  }
  me().meeting = &meeting;
  me().ticket = meeting.ticket;
  to_scheduler();
  me().meeting = nullptr;
  return false;
}

void count(uint16_t& epoch) {
  if (++epoch == 0) fail("more barriers than the emulator counts");
}

void make_fibers(int threads) {
  while (int(machine.fibers.size()) < threads) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack.reset(new char[kStackBytes]);
    machine.fibers.push_back(std::move(fiber));
  }
}

void run_block(int threads) {
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *machine.fibers[i];
    if (!fiber.done) {  // it is new, or was left in the middle of a block that failed
      fiber.started = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, fiber_main, 0);
    }
    fiber.done = false;
    fiber.meeting = nullptr;
    fiber.groups.clear();
    fiber.open_group.clear();
  }
  machine.warps.resize(size_t(threads / kWarp));
  for (Warp& warp : machine.warps) {
    warp.meeting = Meeting();
    warp.meeting.size = kWarp;
    warp.epoch = 0;
  }
  machine.block = Meeting();
  machine.block.size = threads;
  machine.block_epoch = 0;
  ++machine.block_serial;
  std::memset(machine.shared, 0xff, machine.shared_size);

  std::vector<int> order(static_cast<size_t>(threads));
  for (int i = 0; i < threads; ++i) order[i] = i;
  if (machine.order == 1) std::reverse(order.begin(), order.end());
  if (machine.order > 1) std::shuffle(order.begin(), order.end(), std::mt19937(machine.order));
  int left = threads;
  while (left > 0) {
    bool moved = false;
    for (int thread : order) {
      Fiber& fiber = *machine.fibers[thread];
      if (fiber.done || fiber.waits()) continue;
      moved = true;
      resume(thread);
      if (machine.failed) return;
      if (fiber.done) --left;
    }
    if (moved) continue;
    const auto stuck = std::find_if(order.begin(), order.end(), [](int i) { return !machine.fibers[i]->done; });
    machine.error = "deadlock: thread " + std::to_string(*stuck) + " waits in " +
                    machine.fibers[*stuck]->meeting->operation + " for threads that ended or wait elsewhere" + where();
    machine.failed = true;
    return;
  }
}

}  // namespace

void fail(const std::string& text) { throw Failure{text}; }

std::string take_error() {
  std::string text;
  text.swap(machine.error);
  return text;
}

int launches() { return machine.launches; }
int allowances() { return machine.allowances; }
void set_device(int device) { machine.device = device; }
void set_order(unsigned order) { machine.order = order; }
void pretend(cudaError_t error, bool capturing) { machine.pretended = error, machine.capturing = capturing; }

cudaError_t run(const void* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, int threads, size_t shared,
                const std::function<void()>& body) {
  constexpr cudaError_t invalid = 9, failure = 719;  // cudaErrorInvalidConfiguration, cudaErrorLaunchFailure
  if (!machine.error.empty()) return failure;
  constexpr size_t unasked = 48 * 1024;
  const auto allowed = machine.allowed.find({machine.device, kernel});
  if (grid_x < 1 || grid_y < 1 || grid_z < 1 || grid_y > 65535 || grid_z > 65535 || threads < 1 || threads > 1024 ||
      threads % kWarp != 0 || shared > (allowed == machine.allowed.end() ? unasked : allowed->second)) {
    machine.error = "invalid launch: grid " + std::to_string(grid_x) + "," + std::to_string(grid_y) + "," +
                    std::to_string(grid_z) + ", " + std::to_string(threads) + " threads, " + std::to_string(shared) +
                    " bytes of shared memory";
    return invalid;
  }
  ++machine.launches;
  make_fibers(threads);
  machine.body = &body;
  machine.failed = false;
  machine.shared_size = shared;
  begin_launch(machine.shared, shared);
  machine.place = {0, {0, 0, 0}, {grid_x, grid_y, grid_z}, threads};
  for (unsigned z = 0; z < grid_z; ++z)
    for (unsigned y = 0; y < grid_y; ++y)
      for (unsigned x = 0; x < grid_x; ++x) {
        machine.place.block[0] = x, machine.place.block[1] = y, machine.place.block[2] = z;
        run_block(threads);
        if (machine.failed) return failure;
      }
  return cudaSuccess;
}

const Place& here() { return machine.place; }
unsigned char* shared_bytes() { return machine.shared; }

void sync_block() {
  if (meet(machine.block, "sync_block")) count(machine.block_epoch);
}

void sync_warp() {
  Warp& warp = my_warp();
  if (meet(warp.meeting, "sync_warp")) count(warp.epoch);
}

const unsigned char* exchange(const char* operation, const void* mine, size_t bytes) {
  Warp& warp = my_warp();
  // Two sets of slots: a fast lane's next exchange must not overwrite what a slow lane has yet to read.
  unsigned char* slots = warp.slots[warp.meeting.ticket % 2];
  std::memcpy(slots + size_t(machine.current % kWarp) * kSlotBytes, mine, bytes);
  meet(warp.meeting, operation);
  return slots;
}

Stamp stamp() {
  return {machine.block_serial & 0x3fffffu, uint32_t(machine.current) & 0x3ffu, machine.block_epoch, my_warp().epoch};
}

void copy_async(void* shared, const void* global, size_t size, size_t valid) {
  if (valid > size) fail("cp_async: more valid bytes than bytes");
  if (uintptr_t(shared) % size != 0 || uintptr_t(global) % size != 0) fail("cp_async: misaligned address");
  if (valid > 0) check_read(global, valid, 1);
  mark_pending(shared, size, true);
  me().open_group.push_back(
      {static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), size, valid});
}

void commit_async() {
  me().groups.push_back(std::move(me().open_group));
  me().open_group.clear();
}

void wait_async(size_t groups_in_flight) {
  Fiber& fiber = me();
  while (fiber.groups.size() > groups_in_flight) {
    for (const AsyncCopy& copy : fiber.groups.front()) {
      mark_pending(copy.to, copy.size, false);
      std::memcpy(copy.to, copy.from, copy.valid);
      std::memset(copy.to + copy.valid, 0, copy.size - copy.valid);
    }
    fiber.groups.pop_front();
  }
}

}  // namespace dx::cuda::emulated

using dx::cuda::emulated::machine;

cudaError_t cudaGetDevice(int* device) {
  *device = machine.device;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  constexpr cudaError_t invalid = 1;  // cudaErrorInvalidValue
  if (value < 0 || size_t(value) > dx::cuda::emulated::kMostShared) {
    machine.error = "not allowed: " + std::to_string(value) + " bytes of shared memory";
    return invalid;
  }
  ++machine.allowances;
  machine.allowed[{machine.device, kernel}] = size_t(value);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = machine.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return machine.pretended; }
cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
  *unused = 1000, *total = 4000;
  return machine.pretended;
}
const char* cudaGetErrorString(cudaError_t error) {
  if (error == machine.pretended) return "pretended";
  static std::string text;
  text = dx::cuda::emulated::take_error();
  return text.c_str();
}
