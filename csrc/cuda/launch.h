// launch(kernel, grid, threads, shared bytes, stream, params): every kernel takes one struct by value. Nothing here
// synchronises or allocates on the GPU; what is returned is the launch's own error.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "device.h"
#include "runtime.h"

namespace dx::cuda {

// Shared memory that a kernel gets without asking for more.
constexpr size_t kSharedBytesByDefault = 48 * 1024;

// Lets a kernel have so much shared memory on the current device. The driver remembers it: it is asked once for each
// kernel and device, and again where a call wants more than any before.
inline cudaError_t allow_shared(const void* kernel, size_t bytes) {
  if (bytes <= kSharedBytesByDefault) return cudaSuccess;
  static std::mutex mutex;
  static auto* const allowed = new std::map<std::pair<const void*, int>, size_t>;  // threads may outlive what is freed
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = (*allowed)[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error == cudaSuccess) most = bytes;
  return error;
}

template <class P>
cudaError_t launch(void (*kernel)(P), dim3 grid, int threads, size_t shared, Stream stream, const P& params) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = allow_shared(function, shared);
#if defined(DX_EMULATE)
  (void)stream;
  if (error == cudaSuccess)
    error = emulated::run(function, grid.x, grid.y, grid.z, threads, shared, [&] { kernel(params); });
#else
  // What <<<...>>> stands for; clang-format takes that apart in a header.
  P copy = params;
  void* arguments[] = {&copy};
  if (error == cudaSuccess)
    error = cudaLaunchKernel(function, grid, dim3(unsigned(threads)), arguments, shared, stream);
  if (error != cudaSuccess) cudaGetLastError();  // torch's next check is of its own
#endif
  return error;
}

// Calls launches, each a function without arguments, until one fails.
template <class... F>
cudaError_t launch_in_order(const F&... launches) {
  cudaError_t error = cudaSuccess;
  (void)(((error = launches()) == cudaSuccess) && ...);
  return error;
}

}  // namespace dx::cuda
