// What blocks leave of their sums, added in the order of the blocks and in double by a kernel of its own: 256 threads
// have 32 columns, 8 threads for each, each adding every eighth block's.
#pragma once

#include "conv1x1_common.h"

namespace dx::cuda {

constexpr int kMergeThreads = 256, kMergeColumns = 32;
constexpr size_t kMergeShared = 2 * kMergeThreads * sizeof(double);

// The running thread's column.
__device__ __forceinline__ int64_t merge_column() {
  return int64_t(block_x()) * kMergeColumns + thread_x() % kMergeColumns;
}
// sums[s] = the sum over b of from[b * distance + s * apart], where the column exists; one or two of them. Whether the
// running thread has them: one for each column does. All threads of the block must come here.
template <int SUMS, class A>
__device__ __forceinline__ bool merge_blocks(double (&sums)[SUMS], const A* from, int64_t apart, int64_t distance,
                                             int64_t blocks, bool exists) {
  static_assert(SUMS * kMergeThreads * sizeof(double) <= kMergeShared, "a place for each");
  DX_SHARED_BYTES(shared);
  double* const parts = reinterpret_cast<double*>(shared);  // [SUMS, 8, 32]
  const int lane = thread_x() % kMergeColumns, group = thread_x() / kMergeColumns;
  constexpr int kGroups = kMergeThreads / kMergeColumns;
#pragma unroll
  for (int s = 0; s < SUMS; ++s) sums[s] = 0;
  if (exists)
#pragma unroll 4
    for (int64_t b = group; b < blocks; b += kGroups)
#pragma unroll
      for (int s = 0; s < SUMS; ++s) sums[s] += double(load_one(from + b * distance + s * apart));
#pragma unroll
  for (int s = 0; s < SUMS; ++s) store_one(parts + s * kMergeThreads + thread_x(), sums[s]);
  sync_block();
  if (group > 0 || !exists) return false;
#pragma unroll
  for (int s = 0; s < SUMS; ++s)
    for (int g = 1; g < kGroups; ++g) sums[s] += load_one(parts + s * kMergeThreads + g * kMergeColumns + lane);
  return true;
}

// What becomes of a norm's two sums: grad_bias = sum(dy), grad_weight = r sum(dy (x - mean)); grad_mean and grad_var
// receive -s sum(dy) and -s r^2/2 sum(dy (x - mean)).
template <class A>
struct NormSums {
  Norm<A> norm;
  A *grad_weight, *grad_bias, *grad_mean, *grad_var;  // [C], each pair or null

  __device__ __forceinline__ void store(int64_t c, const double (&sums)[2]) const {
    const A rstd = bn_rstd(load_one(norm.var + c), norm.eps);
    if (grad_weight) {
      store_one(grad_bias + c, A(sums[0]));
      store_one(grad_weight + c, A(double(rstd) * sums[1]));
    }
    if (!grad_mean) return;
    const A scale = (norm.weight ? load_one(norm.weight + c) : A(1)) * rstd;
    const auto d = bn_statistics_grad<A>(scale, rstd, A(sums[0]), A(sums[1]));
    store_one(grad_mean + c, load_one(grad_mean + c) + d.mean);
    store_one(grad_var + c, load_one(grad_var + c) + d.var);
  }
};

template <class P>
cudaError_t launch_merge(void (*kernel)(P), int64_t columns, int64_t y, int64_t z, Stream stream, const P& p) {
  return launch(kernel, dim3(unsigned(ceil_div(columns, kMergeColumns)), unsigned(y), unsigned(z)), kMergeThreads,
                kMergeShared, stream, p);
}

}  // namespace dx::cuda
