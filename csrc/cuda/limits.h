// What the current device has, and where tests make it less: small shapes have one tile for each block, and shared
// memory for all weights, unless
//   DENSENET_EXT_TEST_BLOCKS=2        blocks at most, so that each works through several tiles
//   DENSENET_EXT_TEST_SHARED=67584    bytes of shared memory that a block can ask for
// which hold on a GPU as in emulation.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "launch.h"

namespace dx::cuda {

inline int64_t of_test(const char* variable, int64_t usual) {
  const char* wanted = std::getenv(variable);
  return wanted ? std::atoll(wanted) : usual;
}

// Shared memory that a block can ask for, in bytes.
inline int most_shared_bytes() {
#if defined(DX_EMULATE)
  int bytes = 227 * 1024;  // compute capability 9.0
#else
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    bytes = int(kSharedBytesByDefault);
#endif
  return int(of_test("DENSENET_EXT_TEST_SHARED", bytes));
}
// How many blocks a launch has, which are usually `usual`.
inline int64_t most_blocks(int64_t usual) { return of_test("DENSENET_EXT_TEST_BLOCKS", usual); }

}  // namespace dx::cuda
