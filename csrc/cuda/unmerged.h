// Sums that blocks have left in their kernel's workspace, a line of [C] for each slab of rows, and where those of all
// rows belong: for the kernel that merges them, one of their own or the first of the call behind (merge_slabs.h).
#pragma once

#include "../params.h"

namespace dx::cuda {

template <class A>
struct UnmergedMoments {
  int64_t C = 0, M = 0;
  int64_t slab = 0, slabs = 0;        // rows of each slab but the last, and how many there are
  const A* means = nullptr;           // [slabs, C], as distances from the pivots
  const A* m2s = nullptr;             // [slabs, C]
  const A* pivots = nullptr;          // [C]
  A *mean = nullptr, *var = nullptr;  // [C], written

  DX_HOST_DEVICE bool any() const { return slabs > 1; }
};

// Of a norm's backward pass.
template <class A>
struct UnmergedSums {
  int64_t C = 0, slabs = 0;
  const A *dy = nullptr, *dy_xc = nullptr;  // [slabs, C]: of dy and of dy (x - mean)
  Norm<A> norm = {};
  A *grad_weight = nullptr, *grad_bias = nullptr;  // [C], written

  DX_HOST_DEVICE bool any() const { return slabs > 1; }
};

}  // namespace dx::cuda
