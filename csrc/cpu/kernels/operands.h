// How numbers are multiplied, by storage type: in the arithmetic type by fused multiply-adds, or, where the processor
// has dot products of bf16, in pairs of bf16 numbers that are summed in float.
//
// A product sums over an inner dimension. Its operands are arrays of Operand, each of which holds kDepth neighbours of
// that dimension; numbers beyond its end are zero. A left operand may also be read off an array of Number, of which an
// operand begins at each.
#pragma once

template <class A_>
struct Fma {
  using A = A_;
  using Operand = A;
  using Number = A;
  using Right = Vec<A>;
  static constexpr int kDepth = 1;

  static DX_INLINE Operand load_left(const Operand* p) { return *p; }
  static DX_INLINE Right load_right(const Operand* p) { return load_vec(p); }
  static DX_INLINE void multiply_add(Vec<A>& sum, Operand left, Right right) { sum += left * right; }
  // The operand that starts at w; `more` says whether the inner dimension goes on, `stride` elements further.
  static DX_INLINE Operand pack(const A* w, int64_t, bool) { return *w; }
#if DX_VECTOR_BYTES == 64
  // 16 operands of which each begins one number further on in `first`; so many are there, the others are zero.
  static DX_INLINE __m512i load_neighbours(const A* first, const A*, int64_t count) { return load_along(first, count); }
  // The operands that so many numbers after each other make, at most 16.
  static DX_INLINE __m512i load_along(const A* w, int64_t count) {
    return (__m512i)_mm512_maskz_loadu_ps(__mmask16((1u << std::min<int64_t>(count, 16)) - 1), w);
  }
#endif
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
  using Number = bfloat16;
  using Right = __m512i;
  static constexpr int kDepth = 2;
  static_assert(sizeof(Operand) == sizeof(A), "a vector of pairs has as many columns as a vector of sums");

  static DX_INLINE Operand load_left(const Operand* p) { return *p; }
  static DX_INLINE Operand load_left(const Number* p) { return {p[0], p[1]}; }
  // Two operands without a second number as one, left and right.
  static DX_INLINE Operand joined(Number a, Number b) { return {a, b}; }
  static DX_INLINE Right joined(Right a, Right b) { return _mm512_or_si512(a, _mm512_slli_epi32(b, 16)); }
  static DX_INLINE Right load_right(const Operand* p) { return _mm512_loadu_si512(p); }
  // Zero in the place of the second number.
  static DX_INLINE Right first_number(Right a) { return _mm512_and_si512(a, _mm512_set1_epi32(0xffff)); }
  static DX_INLINE void multiply_add(Vec<A>& sum, Operand left, Right right) {
    int bits;
    __builtin_memcpy(&bits, &left, sizeof bits);
    sum = (Vec<A>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)right);
  }
  static DX_INLINE Operand pack(const A* w, int64_t stride, bool more) {
    return {rounded(w[0]), more ? rounded(w[stride]) : bfloat16{0}};
  }
  // second: where the operands' second numbers begin, or null where the inner dimension ends.
  static DX_INLINE __m512i load_neighbours(const A* first, const A* second, int64_t count) {
    return interleaved(load_some(first, count), second ? load_some(second, count) : _mm512_setzero_ps());
  }
  static DX_INLINE __m512i load_along(const A* w, int64_t count) {
    return (__m512i)_mm512_cvtne2ps_pbh(count > 16 ? load_some(w + 16, count - 16) : _mm512_setzero_ps(),
                                        load_some(w, count));
  }
  static DX_INLINE void store_along_columns(Operand* row, int64_t c, Vec<A> v) {
    store(reinterpret_cast<bfloat16*>(row) + c, v);
  }
  static DX_INLINE Vec<A> load_along_columns(const Operand* row, int64_t c) {
    return load(reinterpret_cast<const bfloat16*>(row) + c);
  }
  static DX_INLINE void store_along_rows(Operand* rows, int64_t c, const Vec<A>* v) {
    _mm512_storeu_si512(rows + c, interleaved((__m512)v[0], (__m512)v[1]));
  }

 private:
  static DX_INLINE __m512 load_some(const A* w, int64_t count) {
    return _mm512_maskz_loadu_ps(__mmask16((1u << std::min<int64_t>(count, 16)) - 1), w);
  }
  static DX_INLINE __m512i interleaved(__m512 first, __m512 second) {
    const __m512i kInterleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                                 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(kInterleave, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
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
