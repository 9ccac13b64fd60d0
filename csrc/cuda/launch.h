// launch(kernel, grid, threads, shared bytes, stream, params): every kernel takes one struct by value. Nothing here
// synchronises or allocates; what is returned is the launch's own error.
#pragma once

#include "device.h"
#include "runtime.h"

namespace dx::cuda {

// Shared memory that a kernel gets without asking for more.
constexpr size_t kSharedBytesByDefault = 48 * 1024;

template <class P>
cudaError_t launch(void (*kernel)(P), dim3 grid, int threads, size_t shared, Stream stream, const P& params) {
#if defined(DX_EMULATE)
  (void)stream;
  return emulated::run(grid.x, grid.y, grid.z, threads, shared, [&] { kernel(params); });
#else
  if (shared > kSharedBytesByDefault) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return cudaGetLastError();  // which also forgets it: torch's next check is of its own
  }
  // What <<<...>>> stands for; clang-format takes that apart in a header.
  P copy = params;
  void* arguments[] = {&copy};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(unsigned(threads)), arguments, shared, stream);
  return error == cudaSuccess ? error : cudaGetLastError();
#endif
}

}  // namespace dx::cuda
