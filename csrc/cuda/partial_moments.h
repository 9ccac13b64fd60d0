// The statistics of a convolution's result, block by block, the kernel that merges them (Chan) in the order of the
// blocks, and what launches it behind the convolution.
#pragma once

#include "conv1x1_common.h"

namespace dx::cuda {

template <class A>
struct PartialMoments {
  int rows;               // of each block but the last
  A *center, *mean, *m2;  // [blocks, Np], the mean as a distance from the center; or null: no statistics wanted

  void take(Carver& carver, int64_t count) {
    for (A** part : {&center, &mean, &m2}) *part = carver.take<A>(count);
  }
};

// A kernel of each file that includes this: two files must not share one by its name.
namespace {

template <class A>
struct MergeMoments {
  int64_t M, N, Np, blocks;
  PartialMoments<A> partial;
  A *mean, *var;  // [N]
};

// A warp for each channel: lane i merges the blocks i, i + 32, ..., then the lanes are merged pairwise.
template <class A>
__global__ void __launch_bounds__(256) merge_moments(const __grid_constant__ MergeMoments<A> p) {
  const int64_t n = int64_t(block_x()) * 8 + thread_x() / 32;
  Moments<double> all = {0, 0, 0};
  if (n < p.N)
#pragma unroll 2
    for (int64_t b = thread_x() % 32; b < p.blocks; b += 32) {
      const int rows = rows_from(p.M, b * p.partial.rows, p.partial.rows);
      all = merge(all, Moments<double>{double(rows),
                                       double(load_one(p.partial.center + b * p.Np + n)) +
                                           double(load_one(p.partial.mean + b * p.Np + n)),
                                       double(load_one(p.partial.m2 + b * p.Np + n))});
    }
  for (int by = 16; by > 0; by /= 2)
    all =
        merge(all, Moments<double>{shuffle_down(all.count, by), shuffle_down(all.mean, by), shuffle_down(all.m2, by)});
  if (n < p.N && thread_x() % 32 == 0) {
    store_one(p.mean + n, A(all.mean));
    store_one(p.var + n, A(all.m2 / all.count));
  }
}

// A convolution's kernels: prepare, which launches what makes its operands; the tiles of its plan; and the statistics
// of its M rows, where they are wanted.
template <class Shape, class Plan, class Prepare, class P>
cudaError_t launch_convolution(const Plan& plan, const Prepare& prepare, void (*tiles)(P), size_t shared, int64_t M,
                               Stream stream) {
  const auto& of = plan.p.of;
  const int64_t Np = plan.p.prepared.Np;
  return launch_in_order(
      prepare,
      [&] {
        const dim3 grid(unsigned(Np / Shape::kChannels), unsigned(plan.blocks));
        return launch(tiles, grid, Shape::kThreads, shared, stream, plan.p);
      },
      [&] {
        if (!of.out_mean) return cudaSuccess;
        using A = typename Shape::A;
        const MergeMoments<A> merging = {M, of.N, Np, plan.blocks, plan.p.partial, of.out_mean, of.out_var};
        return launch(merge_moments<A>, dim3(unsigned(ceil_div(of.N, 8))), 256, 0, stream, merging);
      });
}

}  // namespace
}  // namespace dx::cuda
