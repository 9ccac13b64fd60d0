// Statistics of a column are taken as distances from one of its values, so that a mean much larger than the deviation
// costs no digits.
#pragma once

#include "device.h"

namespace dx::cuda {

// The value to take distances from: `first`, but not NaN or infinity, from which all distances would be NaN.
template <class A>
__device__ __forceinline__ A pivot_of(A first) {
  return first - first == A(0) ? first : A(0);
}

}  // namespace dx::cuda
