// The products behind the 1x1 convolutions: a tile of R rows x NV vectors of outputs stays in registers over the whole
// inner dimension. The left operand is broadcast number by number, the right one is packed in vectors. Both lie in
// panels that fit the caches.
//
// Registers decide the tile: R * NV accumulators, NV vectors of the right operand, one broadcast number of the left.
// Each step of the inner dimension loads R + NV times for R * NV multiply-adds; three vectors are 48 outputs.
//   AVX-512, 32 registers:  8 x 3 (24 + 3 + 1; 11 loads for 24), 12 x 2 (24 + 2 + 1; 14 for 24)
//   AVX2, 16 registers:     6 x 2 (12 + 2 + 1)
//   SSE2, 16 registers:     4 x 2 (8 + 2 + 1, and one for products before they are added)
#pragma once

#if DX_VECTOR_BYTES == 64
constexpr int kRegisters = 32, kMostVectors = 3, kRowUnit = 24;
#elif DX_VECTOR_BYTES == 32
constexpr int kRegisters = 16, kMostVectors = 2, kRowUnit = 6;
#else
constexpr int kRegisters = 16, kMostVectors = 2, kRowUnit = 4;
#endif
// Rows of a tile of NV vectors.
template <int NV>
constexpr int kTileRows = kMostVectors == 3 ? (NV == 3 ? 8 : 12) : kRowUnit;
template <int NV>
constexpr bool kTileFits = kTileRows<NV> * NV + NV + 1 <= kRegisters && kRowUnit % kTileRows<NV> == 0;
static_assert(kTileFits<1> && kTileFits<2> && (kMostVectors < 3 || kTileFits<3>),
              "accumulators stay in registers, and panels are whole tiles of every shape");

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Calls f(first column, NV as a constant) for the column blocks of [begin, end): blocks of the most vectors, but never
// a single vector at the end where two blocks of two will do.
template <class A, class F>
DX_INLINE void for_column_blocks(int64_t begin, int64_t end, const F& f) {
  constexpr int L = kLanes<A>;
  for (int64_t n = begin; n < end;) {
    const int64_t vectors = (end - n + L - 1) / L;
    if (kMostVectors == 3 && vectors != 4 && vectors >= 3)
      f(n, Constant<kMostVectors>{}), n += kMostVectors * L;
    else if (vectors >= 2)
      f(n, Constant<2>{}), n += 2 * L;
    else
      f(n, Constant<1>{}), n += L;
  }
}

// acc[r][j] += sum_k a(r, k) * b(k, j). The left operand is addressed as a[r * row_stride + k * k_stride]; a stride
// given as template argument (not 0) is known to the compiler. The right operand's rows are `b_stride` apart. Each step
// of the inner dimension calls aside.step(): work that is done beside the multiply-adds.
template <class P, int ROW_STRIDE, int K_STRIDE, int R, int NV, class Left, class Aside>
DX_INLINE void add_product(int64_t K, const Left* a, int64_t row_stride_, int64_t k_stride_,
                           const typename P::Operand* b, int64_t b_stride, Vec<typename P::A> (&acc)[R][NV],
                           Aside& aside) {
  const int64_t row_stride = ROW_STRIDE ? ROW_STRIDE : row_stride_, k_stride = K_STRIDE ? K_STRIDE : k_stride_;
  // Two or three rows per pointer: x86 then addresses them as [p + i * row_stride], without a pointer for each row.
  constexpr int GROUP = ROW_STRIDE ? R : (R % 3 == 0 ? 3 : 2);
  const Left* rows[R / GROUP];
#pragma GCC unroll 16
  for (int g = 0; g < R / GROUP; ++g) rows[g] = a + g * GROUP * row_stride;
  for (int64_t k = 0; k < K; ++k) {
    aside.step();
    typename P::Right right[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) right[j] = P::load_right(b + j * kLanes<typename P::A>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename P::Operand left = P::load_left(rows[r / GROUP] + (r % GROUP) * row_stride);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) P::multiply_add(acc[r][j], left, right[j]);
    }
#pragma GCC unroll 16
    for (int g = 0; g < R / GROUP; ++g) rows[g] += k_stride;
    b += b_stride;
  }
}

template <class A, int R, int NV>
DX_INLINE void set_zero(Vec<A> (&acc)[R][NV]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[r][j] = Vec<A>{};
}

// The same of sums that begin here, and of left operands as they are: the compiler's code for one function of both
// takes 1.03 of the time of a training step.
template <class P, int NV, int ROW_STRIDE, int K_STRIDE, class Aside>
DX_INLINE void tile_product(int64_t K, const typename P::Operand* a, int64_t row_stride_, int64_t k_stride_,
                            const typename P::Operand* b, int64_t b_stride,
                            Vec<typename P::A> (&acc)[kTileRows<NV>][NV], Aside& aside) {
  using A = typename P::A;
  constexpr int R = kTileRows<NV>;
  const int64_t row_stride = ROW_STRIDE ? ROW_STRIDE : row_stride_, k_stride = K_STRIDE ? K_STRIDE : k_stride_;
  constexpr int GROUP = ROW_STRIDE ? R : (R % 3 == 0 ? 3 : 2);
  const typename P::Operand* rows[R / GROUP];
#pragma GCC unroll 16
  for (int g = 0; g < R / GROUP; ++g) rows[g] = a + g * GROUP * row_stride;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[r][j] = Vec<A>{};
  for (int64_t k = 0; k < K; ++k) {
    aside.step();
    typename P::Right right[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) right[j] = P::load_right(b + j * kLanes<A>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename P::Operand left = rows[r / GROUP][(r % GROUP) * row_stride];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) P::multiply_add(acc[r][j], left, right[j]);
    }
#pragma GCC unroll 16
    for (int g = 0; g < R / GROUP; ++g) rows[g] += k_stride;
    b += b_stride;
  }
}
