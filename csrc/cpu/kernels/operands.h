// How numbers are multiplied, by storage type: in the arithmetic type by fused multiply-adds, or, where the processor
// has dot products of bf16, in pairs of bf16 numbers that are summed in float.
//
// A product sums over an inner dimension. Its operands are arrays of Operand, each of which holds kDepth neighbours of
// that dimension; numbers beyond its end are zero.
#pragma once

template <class A_>
struct Fma {
  using A = A_;
  using Operand = A;
  using Right = Vec<A>;
  static constexpr int kDepth = 1;

  static DX_INLINE Right load_right(const Operand* p) { return load_vec(p); }
  static DX_INLINE void multiply_add(Vec<A>& sum, Operand left, Right right) { sum += left * right; }
  // The operand that starts at w; `more` says whether the inner dimension goes on, `stride` elements further.
  static DX_INLINE Operand pack(const A* w, int64_t, bool) { return *w; }
  // A row's numbers from column c on, the inner dimension being the columns.
  static DX_INLINE void store_along_columns(Operand* row, int64_t c, Vec<A> v) { store_vec(row + c, v); }
  static DX_INLINE Vec<A> load_along_columns(const Operand* row, int64_t c) { return load_vec(row + c); }
  // The numbers from column c on of kDepth rows, the inner dimension being the rows.
  static DX_INLINE void store_along_rows(Operand* rows, int64_t c, const Vec<A>* v) { store_vec(rows + c, v[0]); }
};

template <class T>
struct ProductOf {
  using type = Fma<Acc<T>>;
};

#if defined(DX_BF16_DOT)
struct DotBf16 {
  using A = float;
  struct Operand {
    bfloat16 first, second;
  };
  using Right = __m512i;
  static constexpr int kDepth = 2;
  static_assert(sizeof(Operand) == sizeof(A), "a vector of pairs has as many columns as a vector of sums");

  static DX_INLINE Right load_right(const Operand* p) { return _mm512_loadu_si512(p); }
  static DX_INLINE void multiply_add(Vec<A>& sum, Operand left, Right right) {
    int bits;
    __builtin_memcpy(&bits, &left, sizeof bits);
    sum = (Vec<A>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)right);
  }
  static DX_INLINE Operand pack(const A* w, int64_t stride, bool more) {
    return {rounded(w[0]), more ? rounded(w[stride]) : bfloat16{0}};
  }
  static DX_INLINE void store_along_columns(Operand* row, int64_t c, Vec<A> v) {
    store(reinterpret_cast<bfloat16*>(row) + c, v);
  }
  static DX_INLINE Vec<A> load_along_columns(const Operand* row, int64_t c) {
    return load(reinterpret_cast<const bfloat16*>(row) + c);
  }
  static DX_INLINE void store_along_rows(Operand* rows, int64_t c, const Vec<A>* v) {
    const __m512i kInterleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                                 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
    _mm512_storeu_si512(rows + c, _mm512_permutexvar_epi16(kInterleave, both));
  }

 private:
  static DX_INLINE bfloat16 rounded(float value) {
    const __m128i bits = (__m128i)_mm_cvtneps_pbh(_mm_set_ss(value));
    return {uint16_t(_mm_cvtsi128_si32(bits))};
  }
};
template <>
struct ProductOf<bfloat16> {
  using type = DotBf16;
};
#endif

template <class T>
using Product = typename ProductOf<T>::type;
