// What the emulator remembers of each byte of memory: who wrote and who read it last, and when.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dx::cuda::emulated {

// When and by whom: barriers of the block and of the warp count the time. Small, as there are three for each byte;
// blocks are told apart by their last bits.
struct Stamp {
  uint32_t block : 22, thread : 10;
  uint16_t block_epoch, warp_epoch;
};
static_assert(sizeof(Stamp) == 8, "a byte's accesses take 32 bytes");
Stamp stamp();  // of the running thread

// Forgets the accesses of earlier launches and takes these bytes as the shared memory of the next one.
void begin_launch(unsigned char* shared, size_t bytes);
// Marks shared bytes as written by an asynchronous copy in flight (true) or arrived (false).
void mark_pending(void* p, size_t bytes, bool pending);

}  // namespace dx::cuda::emulated
