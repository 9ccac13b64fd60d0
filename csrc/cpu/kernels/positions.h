// Positions of maxima within their windows, a byte a column in memory.
//
// A maximum is found by PyTorch's rule: the first in scan order, and NaN always wins, the last of them.
#pragma once

template <class A>
constexpr int lanes_of(Whole) {
  return kLanes<A>;
}
template <class A>
DX_INLINE int lanes_of(Part part) {
  return part.n;
}

#if DX_VECTOR_BYTES == 64
// Bytes are compared and selected as they lie in memory: a mask of AVX-512 has a bit a lane, however wide lanes are.
template <class A>
struct Positions {
  __m128i bytes = _mm_setzero_si128();

  template <class Columns>
  static DX_INLINE Positions load(const uint8_t* p, Columns columns) {
    const int n = lanes_of<A>(columns);
    if (n == 16) return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))};
    return {_mm_maskz_loadu_epi8(__mmask16((1u << n) - 1), p)};
  }
  template <class Columns>
  DX_INLINE void store(uint8_t* p, Columns columns) const {
    const int n = lanes_of<A>(columns);
    if (n == 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    _mm_mask_storeu_epi8(p, __mmask16((1u << n) - 1), bytes);
  }
  // Compares what lies at `position` with the best so far.
  DX_INLINE void compete(int position, Vec<A>& best, Vec<A> y) {
    // not y <= min(best, inf): where best is NaN the minimum is its second operand, and only NaN is not <= inf
    const Vec<A> most = broadcast(A(INFINITY));
    __mmask16 better;
    if constexpr (std::is_same<A, float>::value) {
      better = _mm512_cmp_ps_mask((__m512)y, _mm512_min_ps((__m512)best, (__m512)most), _CMP_NLE_UQ);
      best = (Vec<A>)_mm512_mask_mov_ps((__m512)best, better, (__m512)y);
    } else {
      better = _mm512_cmp_pd_mask((__m512d)y, _mm512_min_pd((__m512d)best, (__m512d)most), _CMP_NLE_UQ);
      best = (Vec<A>)_mm512_mask_mov_pd((__m512d)best, __mmask8(better), (__m512d)y);
    }
    bytes = _mm_mask_mov_epi8(bytes, better, _mm_set1_epi8(char(position)));
  }
  // sum + v where this is `position`.
  DX_INLINE Vec<A> add_where(int position, Vec<A> sum, Vec<A> v) const {
    const __mmask16 here = _mm_cmpeq_epi8_mask(bytes, _mm_set1_epi8(char(position)));
    if constexpr (std::is_same<A, float>::value)
      return (Vec<A>)_mm512_mask_add_ps((__m512)sum, here, (__m512)sum, (__m512)v);
    else
      return (Vec<A>)_mm512_mask_add_pd((__m512d)sum, __mmask8(here), (__m512d)sum, (__m512d)v);
  }
};
#else
template <class A>
struct Positions {
  using Lanes = typename VectorOf<A>::Mask;
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<A>)));
  Lanes lanes = {};

  template <class Columns>
  static DX_INLINE Positions load(const uint8_t* p, Columns columns) {
    Bytes bytes = {};
    __builtin_memcpy(&bytes, p, size_t(lanes_of<A>(columns)));
    return {__builtin_convertvector(bytes, Lanes)};
  }
  template <class Columns>
  DX_INLINE void store(uint8_t* p, Columns columns) const {
    const Bytes bytes = __builtin_convertvector(lanes, Bytes);
    __builtin_memcpy(p, &bytes, size_t(lanes_of<A>(columns)));
  }
  // Compares what lies at `position` with the best so far.
  DX_INLINE void compete(int position, Vec<A>& best, Vec<A> y) {
    const Lanes better = (y > best) | (y != y);
    best = better ? y : best;
    lanes = better ? Lanes{} + position : lanes;
  }
  // sum + v where this is `position`.
  DX_INLINE Vec<A> add_where(int position, Vec<A> sum, Vec<A> v) const { return lanes == position ? sum + v : sum; }
};
#endif
