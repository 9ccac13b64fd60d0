// The one microkernel behind every product here: a tile of kTileRows x (NV vectors) outputs, kept in registers over the
// whole inner dimension.
//
// Registers decide the tile. AVX-512 has 32: 12 rows x 2 vectors = 24 accumulators, 2 for the right operand, 1 for the
// broadcast left element, 5 to spare. With 16 registers (AVX2, SSE2, NEON's 32 included): 4 x 2 = 8 + 2 + 1.
#pragma once

#if DX_VECTOR_BYTES == 64
constexpr int kTileRows = 12;
constexpr int kRegisters = 32;
#elif DX_VECTOR_BYTES == 32
constexpr int kTileRows = 6;
constexpr int kRegisters = 16;
#else
constexpr int kTileRows = 4;
constexpr int kRegisters = 16;
#endif
constexpr int kTileVectors = 2;
static_assert(kTileRows * kTileVectors + kTileVectors + 1 <= kRegisters, "the accumulators must stay in registers");
static_assert(kTileRows % 2 == 0, "rows are addressed in groups");

// Columns of a tile.
template <class A>
constexpr int kTileColumns = kTileVectors * kLanes<A>;

// acc[r][j] = sum_k a(r, k) * b(k, j). The left operand is addressed as a[r * row_stride + k * k_stride]; a stride
// given as template argument (not 0) is known to the compiler. The right operand's rows are `b_stride` apart.
template <int NV, int ROW_STRIDE, int K_STRIDE, class A>
DX_INLINE void tile_product(int64_t K, const A* a, int64_t row_stride_, int64_t k_stride_, const A* b, int64_t b_stride,
                            Vec<A> (&acc)[kTileRows][NV]) {
  const int64_t row_stride = ROW_STRIDE ? ROW_STRIDE : row_stride_, k_stride = K_STRIDE ? K_STRIDE : k_stride_;
  // Two rows per pointer: x86 then addresses them as [p] and [p + row_stride], without a pointer for each row.
  constexpr int GROUP = ROW_STRIDE ? kTileRows : (kTileRows % 3 == 0 ? 3 : 2);
  const A* rows[kTileRows / GROUP];
#pragma GCC unroll 16
  for (int g = 0; g < kTileRows / GROUP; ++g) rows[g] = a + g * GROUP * row_stride;
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[r][j] = Vec<A>{};
  for (int64_t k = 0; k < K; ++k) {
    Vec<A> right[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) right[j] = load_vec(b + j * kLanes<A>);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const A left = rows[r / GROUP][(r % GROUP) * row_stride];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[r][j] += left * right[j];
    }
#pragma GCC unroll 16
    for (int g = 0; g < kTileRows / GROUP; ++g) rows[g] += k_stride;
    b += b_stride;
  }
}

// Packs a right operand [K, N] into column blocks of kTileColumns, each [K, kTileColumns] and contiguous, zeros at the
// right edge: element (k, n) of the operand is w[k * k_stride + n * n_stride].
template <class A>
inline int64_t packed_size(int64_t K, int64_t N) {
  return (N + kTileColumns<A> - 1) / kTileColumns<A> * kTileColumns<A> * K;
}
template <class A>
inline void pack_right(const A* w, int64_t K, int64_t N, int64_t k_stride, int64_t n_stride, A* packed,
                       const Pool& pool) {
  constexpr int NB = kTileColumns<A>;
  const int64_t blocks = (N + NB - 1) / NB;
  pool.run([&](int task) {
    const Range range = part(blocks, 1, pool.tasks, task);
    for (int64_t block = range.begin; block < range.end; ++block) {
      A* out = packed + block * NB * K;
      const int64_t n0 = block * NB, columns = std::min<int64_t>(NB, N - n0);
      for (int64_t k = 0; k < K; ++k)
        for (int64_t n = 0; n < NB; ++n) out[k * NB + n] = n < columns ? w[k * k_stride + (n0 + n) * n_stride] : A(0);
    }
  });
}

// Calls f(first column, NV as a constant) for the column blocks of [0, N): a last block of one vector is computed as
// one.
template <class A, class F>
DX_INLINE void for_column_blocks(int64_t N, const F& f) {
  for (int64_t n = 0; n < N; n += kTileColumns<A>) {
    if (N - n > kLanes<A>)
      f(n, Constant<kTileVectors>{});
    else
      f(n, Constant<1>{});
  }
}

// A panel of activations in the arithmetic type, one row per pixel. Its pitch is an odd number of vectors: rows of a
// power-of-two pitch would all fall into the same cache sets.
template <class A>
inline int64_t panel_pitch(int64_t C) {
  const int64_t vectors = (C + kTileColumns<A> - 1) / kTileColumns<A> * kTileVectors;
  return (vectors | 1) * kLanes<A>;
}

// Rows of a panel: a multiple of the tile's, at most 96, and a quarter of an L2 cache of 1 MiB.
template <class A>
inline int64_t panel_rows(int64_t pitch) {
  constexpr int64_t kPanelBytes = 256 * 1024, kMostRows = 96;
  static_assert(kMostRows % kTileRows == 0, "panels are made of whole tiles");
  const int64_t fit = kPanelBytes / (pitch * int64_t(sizeof(A))) / kTileRows * kTileRows;
  return std::max<int64_t>(kTileRows, std::min(kMostRows, fit));
}

// y = relu(x * s + t) for the rows of a panel; rows up to the next whole tile are zero, so that tiles need no edge.
template <class T, class A = Acc<T>>
DX_INLINE void normalise_panel(const Affine<A>& affine, Rows<const T> x, int64_t m0, int64_t rows, int64_t C, A* panel,
                               int64_t pitch) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* in = x.row(m0 + r);
    A* out = panel + r * pitch;
    for_columns<A>(C, [&](int64_t c, auto columns) { store_vec(out + c, relu<A>(affine(columns.load(in + c), c))); });
    for (int64_t c = padded<A>(C); c < pitch; ++c) out[c] = A(0);
  }
  const int64_t whole = (rows + kTileRows - 1) / kTileRows * kTileRows;
  for (int64_t r = rows; r < whole; ++r) std::fill_n(panel + r * pitch, pitch, A(0));
}
