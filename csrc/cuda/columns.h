// V neighbouring columns of a row in one thread's registers: one vector access, arithmetic in the acc type.
#pragma once

#include <cstring>
#include <type_traits>

#include "../params.h"
#include "device.h"

namespace dx::cuda {

// The bits of V elements as they lie in memory. Rows are kept like this while others are loaded: a bf16 costs half a
// register.
template <int Bytes>
struct BitsOf {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "a vector access");
  uint32_t word[Bytes / 4];
};
template <>
struct BitsOf<1> {
  uint8_t word;
};
template <>
struct BitsOf<2> {
  uint16_t word;
};
template <class T, int V>
using Bits = BitsOf<V* int(sizeof(T))>;

template <int V, class T>
__device__ __forceinline__ Bits<T, V> load_bits(const T* p) {
  constexpr int kBytes = V * int(sizeof(T));
  Bits<T, V> bits;
  if constexpr (kBytes == 16) {
    const uint4 q = load16(p);
    bits.word[0] = q.x, bits.word[1] = q.y, bits.word[2] = q.z, bits.word[3] = q.w;
  } else if constexpr (kBytes == 8) {
    const uint2 q = load8(p);
    bits.word[0] = q.x, bits.word[1] = q.y;
  } else if constexpr (kBytes == 4) {
    bits.word[0] = load4(p);
  } else if constexpr (kBytes == 2) {
    bits.word = load2(p);
  } else {
    bits.word = load_one(p);
  }
  return bits;
}
// To global memory.
template <int V, class T>
__device__ __forceinline__ void store_bits(T* p, const Bits<T, V>& bits) {
  constexpr int kBytes = V * int(sizeof(T));
  if constexpr (kBytes == 16)
    store_global16(p, make_uint4(bits.word[0], bits.word[1], bits.word[2], bits.word[3]));
  else if constexpr (kBytes == 8)
    store_global8(p, make_uint2(bits.word[0], bits.word[1]));
  else if constexpr (kBytes == 4)
    store4(p, bits.word[0]);
  else if constexpr (kBytes == 2)
    store2(p, bits.word);
  else
    store_one(p, bits.word);
}

// Element v, as a number.
template <class T, int V>
__device__ __forceinline__ Acc<T> element(const Bits<T, V>& bits, int v) {
  if constexpr (sizeof(T) == 2 && V == 1) {
    return widen(T{bits.word});
  } else if constexpr (sizeof(T) == 2) {
    return widen(T{uint16_t(bits.word[v / 2] >> (v % 2 * 16))});
  } else {
    T all[V];
    memcpy(all, &bits, sizeof all);
    return all[v];
  }
}
// V numbers, rounded to the storage type.
template <class T, int V>
__device__ __forceinline__ Bits<T, V> to_bits(const Acc<T> (&a)[V]) {
  Bits<T, V> bits;
  if constexpr (sizeof(T) == 2 && V == 1) {
    bits.word = narrow<T>(a[0]).bits;
  } else if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) bits.word[i] = pack2<T>(a[2 * i], a[2 * i + 1]);
  } else {
    memcpy(&bits, a, sizeof bits);
  }
  return bits;
}

// ReLU that propagates NaN, and its gradient, which passes where not (u <= 0): both as PyTorch's.
template <class A>
__device__ __forceinline__ A relu(A u) {
  return A(0) > u ? A(0) : u;
}
template <class A>
__device__ __forceinline__ A relu_mask(A u, A grad) {
  return u <= A(0) ? A(0) : grad;
}

// V numbers that belong to columns c and on, or the same one for all where there are none. All loads of a kernel's
// beginning stand before what is computed from them: the square roots have branches, behind which each load would wait
// for the one before.
template <int V, class A>
__device__ __forceinline__ void load_channels(A (&values)[V], const A* from, int64_t c, A without = A(0)) {
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = from ? load_one(from + c + v) : without;
}

// slope * x, but nothing where the slope is zero: where no statistics lie behind a column, a NaN or an infinity of x
// must not get in by 0 * x.
template <class A>
__device__ __forceinline__ A times_or_zero(A slope, A x) {
  return slope == A(0) ? A(0) : slope * x;
}

// A BatchNorm of V columns as y = (x - mean) * scale + bias: the difference is exact where x lies close to a mean that
// is large beside the deviation. Every kernel computes it by the same subtraction and the same fused multiply-add, so
// that the ReLU's mask of a backward pass is the one of its forward pass, bit by bit.
template <class A, int V>
struct Affine {
  A mean[V], rstd[V], scale[V], bias[V];

  Affine() = default;
  __device__ __forceinline__ Affine(const Norm<A>& norm, int64_t c) {
    load(norm, c);
    compute(norm.eps);
  }
  __device__ __forceinline__ void load(const Norm<A>& norm, int64_t c) {
    load_channels(mean, norm.mean, c);
    load_channels(rstd, norm.var, c);
    load_channels(scale, norm.weight, c, A(1));
    load_channels(bias, norm.bias, c);
  }
  __device__ __forceinline__ void compute(double eps) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      rstd[v] = bn_rstd(rstd[v], eps);
      scale[v] *= rstd[v];
    }
  }
  __device__ __forceinline__ A of_centered(A xc, int v) const { return std::fma(xc, scale[v], bias[v]); }
  __device__ __forceinline__ A operator()(A x, int v) const { return of_centered(x - mean[v], v); }
};

// The input gradient of a norm with ReLU, once its two sums are known:
//   dx = s (dy - sum(dy)/M - (x - m) r^2 sum(dy (x - m))/M) = s (dy - center - (x - m) slope)
// and s dy when the norm is frozen: center and slope are zero.
template <class A, int V>
struct NormBackward {
  Affine<A, V> affine;
  A center[V], slope[V];

  __device__ __forceinline__ NormBackward(const Norm<A>& norm, const A* grad_weight, const A* grad_bias, int64_t M,
                                          int64_t c) {
    affine.load(norm, c);
    load_channels(center, grad_bias, c);
    load_channels(slope, grad_weight, c);
    affine.compute(norm.eps);
    const A per_row = A(1) / A(M);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      center[v] *= per_row;
      slope[v] *= affine.rstd[v] * per_row;
    }
  }
  // dy is the gradient before the ReLU's mask.
  __device__ __forceinline__ A operator()(A x, A dy, int v) const {
    const A xc = x - affine.mean[v];
    return affine.scale[v] * (relu_mask(affine.of_centered(xc, v), dy) - (center[v] + times_or_zero(slope[v], xc)));
  }
};

}  // namespace dx::cuda
