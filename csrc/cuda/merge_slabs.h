// Merges what blocks have left of each slab of rows (unmerged.h), in a fixed order and in double. A block of 256
// threads takes 8 columns (32 bytes of a row of partial sums, what memory gives at least) and a thread every 32nd slab
// of one of them. Any kernel of such blocks can do it before it uses what comes out: the numbers are the same.
#pragma once

#include "launch.h"
#include "unmerged.h"

namespace dx::cuda {

constexpr int kFinishThreads = 256, kFinishColumns = 8, kFinishRows = kFinishThreads / kFinishColumns;
constexpr size_t kFinishShared = kFinishThreads * sizeof(double);
static_assert(kFinishColumns * sizeof(float) == 32, "a sector");

// How many blocks it takes.
template <class Unmerged>
int64_t finish_blocks(const Unmerged& p) {
  return p.any() ? (p.C + kFinishColumns - 1) / kFinishColumns : 0;
}

// The sum of a column's threads, in all of them.
__device__ __forceinline__ double finish_tree(Shared<double> shared, double value) {
  const int t = thread_x();
  sync_block();  // what was read of an earlier sum
  shared[t] = value;
  sync_block();
#pragma unroll
  for (int rows = kFinishRows / 2; rows > 0; rows /= 2) {
    if (t < rows * kFinishColumns) shared[t] += shared[t + rows * kFinishColumns];
    sync_block();
  }
  return shared[t % kFinishColumns];
}

// The running thread's column of block number `block`, and its first slab.
__device__ __forceinline__ int64_t finish_column(int64_t block) {
  return block * kFinishColumns + thread_x() % kFinishColumns;
}
__device__ __forceinline__ int finish_first() { return thread_x() / kFinishColumns; }

// The gradients of a norm's parameters, weight and bias.
template <class A>
struct NormGradient {
  A weight, bias;
};
// grad_bias = sum dy,  grad_weight = r sum dy (x - mean)
template <class A>
__device__ __forceinline__ NormGradient<A> store_whole(const UnmergedSums<A>& p, int64_t c, double dy, double dy_xc) {
  const NormGradient<A> grad = {A(double(bn_rstd(load_one(p.norm.var + c), p.norm.eps)) * dy_xc), A(dy)};
  store_one(p.grad_weight + c, grad.weight);
  store_one(p.grad_bias + c, grad.bias);
  return grad;
}

// The columns of block number `block`: stores their sums, and one thread for each calls then(column, and what it has
// stored). All threads of the block must come here.
template <class A, class F>
__device__ __forceinline__ void finish_slabs(const UnmergedSums<A>& p, int64_t block, Shared<double> shared,
                                             const F& then) {
  const int64_t c = finish_column(block);
  double dy = 0, dy_xc = 0;
  if (c < p.C)
    for (int64_t i = finish_first(); i < p.slabs; i += kFinishRows) {
      dy += double(load_one(p.dy + i * p.C + c));
      dy_xc += double(load_one(p.dy_xc + i * p.C + c));
    }
  dy = finish_tree(shared, dy);
  dy_xc = finish_tree(shared, dy_xc);
  if (finish_first() != 0 || c >= p.C) return;
  const NormGradient<A> grad = store_whole(p, c, dy, dy_xc);
  then(c, grad.weight, grad.bias);
}
// The slabs' means weighted by their rows, then their deviations from that mean.
template <class A, class F>
__device__ __forceinline__ void finish_slabs(const UnmergedMoments<A>& p, int64_t block, Shared<double> shared,
                                             const F& then) {
  const int64_t c = finish_column(block), last = p.slabs - 1, slabs = c < p.C ? p.slabs : 0;
  const double whole = double(p.slab), rest = double(p.M - last * p.slab);  // rows of a slab, of the last
  double sum = 0;
  for (int64_t i = finish_first(); i < slabs; i += kFinishRows)
    sum += (i == last ? rest : whole) * double(load_one(p.means + i * p.C + c));
  const double mean = finish_tree(shared, sum) / double(p.M);
  double m2 = 0;
  for (int64_t i = finish_first(); i < slabs; i += kFinishRows) {
    const double delta = double(load_one(p.means + i * p.C + c)) - mean;
    m2 += double(load_one(p.m2s + i * p.C + c)) + (i == last ? rest : whole) * delta * delta;
  }
  m2 = finish_tree(shared, m2);
  if (finish_first() != 0 || c >= p.C) return;
  const A whole_mean = A(double(load_one(p.pivots + c)) + mean), var = A(m2 / double(p.M));
  store_one(p.mean + c, whole_mean);
  store_one(p.var + c, var);
  then(c, whole_mean, var);
}

// A kernel of each file that includes this: two files must not share one by its name.
namespace {

template <class Unmerged>
__global__ void __launch_bounds__(kFinishThreads) merge_slabs(const __grid_constant__ Unmerged p) {
  DX_SHARED_BYTES(bytes);
  finish_slabs(p, block_x(), shared_as<double>(bytes), [](int64_t, auto, auto) {});
}

template <class Unmerged>
cudaError_t launch_merge_slabs(const Unmerged& p, Stream stream) {
  if (!p.any()) return cudaSuccess;
  return launch(merge_slabs<Unmerged>, dim3(unsigned(finish_blocks(p))), kFinishThreads, kFinishShared, stream, p);
}

}  // namespace
}  // namespace dx::cuda
