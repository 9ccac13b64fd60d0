// Per-channel sums over all rows, in three steps of a fixed order: a thread's rows in its registers; a block's threads
// by a tree in shared memory; all slabs, whose sums lie side by side in the workspace, by another kernel in double
// (merge_slabs.h). No atomics: the same numbers from run to run. Where one slab has all rows, as at small batches, its
// blocks have the sums and nothing is left to merge.
//
// A pair of numbers (a, b) is summed for each column: the two sums of a norm's backward pass, or mean and squared
// deviations (with a count, merged by Chan's formula). Workspace: a[slabs, C], then b[slabs, C], in the acc type.
#pragma once

#include "merge_slabs.h"
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

// What there is to merge of a job's sums, or, of one slab, where they belong.
template <class Job>
__host__ __device__ __forceinline__ auto unmerged_of(const Job& job) {
  using A = std::remove_pointer_t<decltype(job.p.grad_weight)>;
  const Partials<A> partials(job.partials, job.tiling.slabs, job.p.C);
  return UnmergedSums<A>{job.p.C,    job.tiling.slabs,  partials.a,     partials.b,
                         job.p.norm, job.p.grad_weight, job.p.grad_bias};
}
// What a block does with its sums at the end. All of its threads must come here.
template <class A, int V, class Job>
__device__ __forceinline__ void store_sums(Sums<A, V>& sums, const Patch& patch, unsigned char* bytes, const Job& job) {
  if (!merge_block<A>(sums, patch, bytes)) return;
  const int64_t C = job.p.C, slabs = job.tiling.slabs;
  if (slabs > 1) return store_partials<A>(sums, patch, C, {job.partials, slabs, C});
  for (int v = 0; v < V; ++v) store_whole(unmerged_of(job), patch.column + v, double(sums.a[v]), double(sums.b[v]));
}

}  // namespace dx::cuda
