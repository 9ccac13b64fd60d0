// What the current device has, or what tests make of it (settings.h), and how many tiles a block therefore takes.
#pragma once

#include <atomic>
#include <cstdint>

#include "launch.h"
#include "settings.h"

namespace dx::cuda {

#if !defined(DX_EMULATE)
// An attribute of the current device, or `otherwise`. It never changes and is wanted several times a call: the driver
// is asked once.
template <cudaDeviceAttr ATTRIBUTE>
int attribute_of_device(int otherwise) {
  constexpr int kMostDevices = 64;
  static std::atomic<int> known[kMostDevices];  // the attribute and 1, or 0: not asked yet
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return otherwise;
  if (device < kMostDevices) value = known[device].load(std::memory_order_relaxed);
  if (value > 0) return value - 1;
  if (cudaDeviceGetAttribute(&value, ATTRIBUTE, device) != cudaSuccess) return otherwise;
  if (device < kMostDevices) known[device].store(value + 1, std::memory_order_relaxed);
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
  const int64_t wanted = settings().shared;
  return wanted > 0 ? int(wanted) : bytes;
}
inline int64_t multiprocessors() {
#if defined(DX_EMULATE)
  const int count = 132;  // an H100's
#else
  const int count = attribute_of_device<cudaDevAttrMultiProcessorCount>(1);
#endif
  const int64_t wanted = settings().multiprocessors;
  return wanted > 0 ? wanted : count;
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
