// Per-channel sums over all rows, in three steps of a fixed order: a thread's rows in its registers; a block's threads
// by a tree in shared memory; all slabs, whose sums lie side by side in the workspace, by a second small kernel in
// double. No atomics: the same numbers from run to run. Where one slab has all rows, as at small batches, its blocks
// have the sums and there is no second launch.
//
// A pair of numbers (a, b) is summed for each column: the two sums of a norm's backward pass, or mean and squared
// deviations (with a count, merged by Chan's formula). Workspace: a[slabs, C], then b[slabs, C], in the acc type.
#pragma once

#include "rows.h"

namespace dx::cuda {

template <class A>
struct Partials {
  A *a, *b;  // [slabs, C]

  __host__ __device__ Partials(void* workspace, int64_t slabs, int64_t C)
      : a(static_cast<A*>(workspace)), b(a + slabs * C) {}
  static size_t bytes(int64_t slabs, int64_t C) { return slabs > 1 ? size_t(2 * slabs * C) * sizeof(A) : 0; }
};

// ---- step 1: what a thread has, for each of its V columns ----------------------------------------------------------
template <class A, int V>
struct Sums {
  static constexpr int kColumns = V;
  A a[V] = {}, b[V] = {};
  A count = 0;  // unused

  __device__ __forceinline__ void add(int v, A dy, A xc) {
    a[v] += dy;
    b[v] = std::fma(dy, xc, b[v]);
  }
  struct Share {};
  __device__ __forceinline__ Share add_count(A) { return {}; }
  __device__ __forceinline__ void merge(int v, Share, A other_a, A other_b) {
    a[v] += other_a;
    b[v] += other_b;
  }
};
template <class A, int V>
struct MomentSums {
  static constexpr int kColumns = V;
  A a[V] = {}, b[V] = {};  // mean, squared deviations
  A count = 0;             // rows

  // merge() of common.h, with what all columns have in common taken once: the parts of all rows, and other's times the
  // own rows. The mean as a weighted one, which is infinite where a row is: that costs no register and no branch.
  struct Share {
    A own, other, weight;
  };
  __device__ __forceinline__ Share add_count(A other) {
    const A part = other > A(0) ? other / (count + other) : A(0);
    const Share share = {A(1) - part, part, count * part};
    count += other;
    return share;
  }
  __device__ __forceinline__ void merge(int v, Share of, A mean, A m2) {
    const A delta = mean - a[v];
    a[v] = std::fma(a[v], of.own, mean * of.other);
    b[v] += std::fma(delta, delta * of.weight, m2);  // no infinity times zero
  }
};

// ---- step 2: a block's threads above each other --------------------------------------------------------------------
template <class A, int V>
constexpr size_t sums_shared_bytes() {
  return (2 * V + 1) * kThreads * sizeof(A);
}
// Merges the threads' sums into those of the block's first row of threads; whether the running one is of these. All
// threads of the block must come here. Arrays are [number][thread], so that a warp meets no bank conflict.
template <class A, class S, int V = S::kColumns>
__device__ __forceinline__ bool merge_block(S& sums, const Patch& patch, unsigned char* bytes) {
  const Shared<A> shared = shared_as<A>(bytes);
  const int t = thread_x();
  for (int reach = 1; reach < patch.step; reach *= 2) {
    if (patch.any) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        shared[v * kThreads + t] = sums.a[v];
        shared[(V + v) * kThreads + t] = sums.b[v];
      }
      shared[2 * V * kThreads + t] = sums.count;
    }
    sync_block();
    if (patch.any && patch.y % (2 * reach) == 0 && patch.y + reach < patch.step) {
      const int other = t + reach * patch.across;
      const auto share = sums.add_count(shared[2 * V * kThreads + other]);
#pragma unroll
      for (int v = 0; v < V; ++v)
        sums.merge(v, share, shared[v * kThreads + other], shared[(V + v) * kThreads + other]);
    }
    sync_block();
  }
  return patch.any && patch.y == 0;
}
// Leaves a block's sums in the workspace.
template <class A, class S, int V = S::kColumns>
__device__ __forceinline__ void store_partials(const S& sums, const Patch& patch, int64_t C, Partials<A> partials) {
  const int64_t at = int64_t(block_x()) * C + patch.column;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    store_one(partials.a + at + v, sums.a[v]);
    store_one(partials.b + at + v, sums.b[v]);
  }
}

// ---- step 3: all slabs ---------------------------------------------------------------------------------------------
// A block takes kFinishColumns columns (32 bytes of a row of partial sums, what memory gives at least) and a thread
// every kFinishRows-th slab of one of them.
constexpr int kFinishColumns = 8, kFinishRows = kThreads / kFinishColumns;
static_assert(kFinishColumns * sizeof(float) == 32, "a sector");

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

template <class A>
struct FinishSums {
  int64_t C, slabs;
  Partials<A> partials;
  Norm<A> norm;
  A *grad_weight, *grad_bias;  // [C]

  // grad_bias = sum dy,  grad_weight = r sum dy (x - mean)
  __device__ __forceinline__ void store(int64_t c, double dy, double dy_xc) const {
    store_one(grad_bias + c, A(dy));
    store_one(grad_weight + c, A(double(bn_rstd(load_one(norm.var + c), norm.eps)) * dy_xc));
  }
};
// Of a job's arguments.
template <class Job>
__host__ __device__ __forceinline__ auto finish_of(const Job& job) {
  using A = std::remove_pointer_t<decltype(job.p.grad_weight)>;
  return FinishSums<A>{job.p.C,    job.tiling.slabs,  {job.partials, job.tiling.slabs, job.p.C},
                       job.p.norm, job.p.grad_weight, job.p.grad_bias};
}
// What a block does with its sums at the end. All of its threads must come here.
template <class A, int V>
__device__ __forceinline__ void store_sums(Sums<A, V>& sums, const Patch& patch, unsigned char* bytes,
                                           const FinishSums<A>& finish) {
  if (!merge_block<A>(sums, patch, bytes)) return;
  if (finish.slabs > 1) return store_partials(sums, patch, finish.C, finish.partials);
  for (int v = 0; v < V; ++v) finish.store(patch.column + v, double(sums.a[v]), double(sums.b[v]));
}

// A kernel of each file that includes this: two files must not share one by its name.
namespace {

template <class A>
__global__ void __launch_bounds__(kThreads) finish_sums(const __grid_constant__ FinishSums<A> p) {
  DX_SHARED_BYTES(bytes);
  const Shared<double> shared = shared_as<double>(bytes);
  const int64_t c = int64_t(block_x()) * kFinishColumns + thread_x() % kFinishColumns;
  const int first = thread_x() / kFinishColumns;
  double a = 0, b = 0;
  if (c < p.C)
    for (int64_t i = first; i < p.slabs; i += kFinishRows) {
      a += double(load_one(p.partials.a + i * p.C + c));
      b += double(load_one(p.partials.b + i * p.C + c));
    }
  a = finish_tree(shared, a);
  b = finish_tree(shared, b);
  if (first != 0 || c >= p.C) return;
  p.store(c, a, b);
}

template <class A>
cudaError_t launch_finish_sums(const FinishSums<A>& p, Stream stream) {
  if (p.slabs == 1) return cudaSuccess;
  return launch(finish_sums<A>, dim3(unsigned((p.C + kFinishColumns - 1) / kFinishColumns)), kThreads,
                kThreads * sizeof(double), stream, p);
}

}  // namespace
}  // namespace dx::cuda
