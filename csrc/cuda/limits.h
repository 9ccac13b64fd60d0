// What the current device has, and where tests make it less: small shapes have one tile for each block, and shared
// memory for all weights, unless
//   DENSENET_EXT_TEST_MULTIPROCESSORS=2        blocks at most, so that each works through several tiles
//   DENSENET_EXT_TEST_SHARED=67584    bytes of shared memory that a block can ask for
// which hold on a GPU as in emulation.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "launch.h"

namespace dx::cuda {

inline int64_t of_test(const char* variable, int64_t usual) {
  const char* wanted = std::getenv(variable);
  return wanted ? std::atoll(wanted) : usual;
}

#if !defined(DX_EMULATE)
// An attribute of the current device, or `otherwise`. It never changes and is wanted several times a call: the driver
// is asked once.
template <cudaDeviceAttr ATTRIBUTE>
int attribute_of_device(int otherwise) {
  constexpr int kMostDevices = 64;
  static std::atomic<int> known[kMostDevices];  // 0: not asked yet
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return otherwise;
  if (device < kMostDevices) value = known[device].load(std::memory_order_relaxed);
  if (value > 0) return value;
  if (cudaDeviceGetAttribute(&value, ATTRIBUTE, device) != cudaSuccess) return otherwise;
  if (device < kMostDevices) known[device].store(value, std::memory_order_relaxed);
  return value;
}
#endif

// Shared memory that a block can ask for, in bytes.
inline int most_shared_bytes() {
#if defined(DX_EMULATE)
  const int bytes = 227 * 1024;  // compute capability 9.0
#else
  const int bytes = attribute_of_device<cudaDevAttrMaxSharedMemoryPerBlockOptin>(int(kSharedBytesByDefault));
#endif
  return int(of_test("DENSENET_EXT_TEST_SHARED", bytes));
}
inline int64_t multiprocessors() {
#if defined(DX_EMULATE)
  const int count = 132;  // an H100's
#else
  const int count = attribute_of_device<cudaDevAttrMultiProcessorCount>(1);
#endif
  return of_test("DENSENET_EXT_TEST_MULTIPROCESSORS", count);
}

// How many of the `tiles` below one another a block works through, for kernels of which the multiprocessors hold
// `places` blocks at a time and that cut the columns into `slices`. What a block does once (it fetches its weights,
// leaves its sums) takes about as long as a tile, and a block too many a turn of its own: so as many blocks as fill one
// turn of the places, or two where the slices leave too many of them idle in one.
inline int64_t tiles_of_a_block(int64_t tiles, int64_t slices, int64_t places) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t turns = 1; turns <= 2; ++turns) {
    const int64_t below = turns * places / slices, blocks = below > 1 ? below : 1;
    const int64_t each = tiles > blocks ? (tiles + blocks - 1) / blocks : 1;
    const int64_t launched = slices * ((tiles + each - 1) / each);
    const int64_t time = (launched + places - 1) / places * (each + 1);
    if (time < least) best = each, least = time;
  }
  return best;
}

}  // namespace dx::cuda
