// The formulas that every backend needs, written once: compiled by the host compiler for the CPU kernels (whose tests
// therefore test them for the GPU too) and by nvcc for the CUDA kernels. Nothing here knows torch.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DX_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DX_HOST_DEVICE inline
#endif

namespace dx {

// Storage formats without arithmetic of their own; loads and stores convert to and from float.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type in which sums, statistics, affine parameters and 1x1 weights are kept ("acc dtype").
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

// ---- BatchNorm (Ioffe & Szegedy 2015, section 3.1) -----------------------------------------------------------------
template <class A>
DX_HOST_DEVICE A bn_rstd(A var, double eps) {
  return A(1) / std::sqrt(var + A(eps));
}

// The gradients of a channel's mean and variance, from the two sums over its column (dy is the masked gradient at the
// norm's output): y = (x - m) * s + beta with s = gamma * r, r = (v + eps)^-1/2, hence
//   d m = -s * sum(dy)        d v = -s r^2 / 2 * sum(dy (x - m))
template <class A>
struct BnStatisticsGrad {
  A mean, var;
};
template <class A>
DX_HOST_DEVICE BnStatisticsGrad<A> bn_statistics_grad(A scale, A rstd, A sum_dy, A sum_dy_xc) {
  return {-scale * sum_dy, -scale * rstd * rstd * A(0.5) * sum_dy_xc};
}

// ---- Merging means and squared deviations (Chan, Golub & LeVeque 1983, eq. 2.1) -------------------------------------
// E[x^2] - E[x]^2 cancels when |mean| >> deviation; this does not. Where a mean is infinite the merged one is, as a sum
// of all rows would be, and there is no variance: the formula alone subtracts one infinity from another.
template <class A>
DX_HOST_DEVICE bool is_finite(A a) {
  return a - a == A(0);
}
template <class A>
struct Moments {
  A count, mean, m2;
};
template <class A>
DX_HOST_DEVICE Moments<A> merge(Moments<A> a, Moments<A> b) {
  const A n = a.count + b.count;
  if (n == A(0)) return a;
  const A delta = b.mean - a.mean;
  if (!is_finite(delta)) return {n, a.mean + b.mean, delta - delta};
  const A share = b.count / n;
  return {n, a.mean + delta * share, a.m2 + b.m2 + delta * (delta * (a.count * share))};
}

// ---- Dropout: a counter hash of (seed, layer, row, column), so the mask is never stored ----------------------------
// mix() is a bijection of 32 bits with good avalanche (constants from a public search for low bias).
DX_HOST_DEVICE uint32_t mix(uint32_t h) {
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  h ^= h >> 16;
  return h;
}
constexpr uint32_t kGolden = 0x9E3779B9u;

struct Dropout {
  uint32_t base;       // hash of seed and layer
  uint32_t threshold;  // an element is dropped when its hash is below
  double scale;        // 1 / (1 - rate), 0 when everything is dropped
};
DX_HOST_DEVICE Dropout make_dropout(int64_t seed, int64_t layer, double rate) {
  const uint64_t s = static_cast<uint64_t>(seed);
  const uint32_t low = static_cast<uint32_t>(s), high = static_cast<uint32_t>(s >> 32);
  const double scaled = rate * 4294967296.0;
  return {mix(low ^ mix(high + kGolden * static_cast<uint32_t>(layer + 1))),
          scaled >= 4294967295.0 ? 0xffffffffu : static_cast<uint32_t>(scaled), rate < 1.0 ? 1.0 / (1.0 - rate) : 0.0};
}
DX_HOST_DEVICE uint32_t dropout_row_key(const Dropout& d, int64_t row) {
  const uint64_t r = static_cast<uint64_t>(row);
  return mix(d.base ^ mix(static_cast<uint32_t>(r) + 0x85ebca6bu * static_cast<uint32_t>(r >> 32)));
}
template <class A>
DX_HOST_DEVICE A dropout_factor(const Dropout& d, uint32_t row_key, int64_t column) {
  const uint32_t h = mix(row_key + kGolden * static_cast<uint32_t>(column + 1));
  return h >= d.threshold ? static_cast<A>(d.scale) : A(0);
}

}  // namespace dx
