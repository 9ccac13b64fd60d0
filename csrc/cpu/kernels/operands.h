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
  // The numbers from column c on of kDepth rows, the inner dimension being the rows.
  static DX_INLINE void store_along_rows(Operand* rows, int64_t c, const Vec<A>* v) { store_vec(rows + c, v[0]); }
};

template <class T>
struct ProductOf {
  using type = Fma<Acc<T>>;
};

template <class T>
using Product = typename ProductOf<T>::type;
