// Winograd's products with points in the lanes, F(2x2, 3x3) on AVX-512: a vector has four columns at the four points of
// a row, the inputs of a tile at those points are one load for all of them. Twelve columns, the growth rate of
// DenseNet-BC, then fill three vectors a row where products of single points fill 12 of 16 lanes.
#pragma once

#if DX_VECTOR_BYTES == 64
// Inputs of tiles like Points', but at each row of points a channel has its four side by side. Transposition leaves a
// vector's channels in another order, the first of every four, then the second ones, and so on: a product's inner
// dimension may be in any.
struct LanePoints : Points<2> {
  using Points<2>::Points;
  static DX_INLINE void put(float* tile, int i, const Vec<float> (&points)[4]) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) v[j] = (__m512i)points[j];
    transpose_quarters(v);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) _mm512_storeu_si512(tile + (4 * i + r) * kLanes<float>, v[r]);
  }
};

// out[j][tile] = sum over the inner dimension of in[tile] * weights for NV vectors of all tiles, at one row of points,
// which `in` begins at. Each of `slices` has K channels; what is missing from the last four has weights of zero.
template <int R, int NV>
__attribute__((noinline)) void lane_product(int64_t tiles, int64_t slices, int64_t K, const float* in,
                                            int64_t in_vector, const float* weights, float* const (&out)[NV],
                                            ReadsAhead& ahead) {
  constexpr int L = kLanes<float>;
  constexpr int64_t kTile = LanePoints::kTile;
  for (int64_t t = 0; t < tiles; t += R) {
    Vec<float> acc[R][NV];
    set_zero<float>(acc);
    const float *a = in + t * kTile, *b = weights;
    for (int64_t slice = 0; slice < slices; ++slice)
      for (int64_t k0 = 0; k0 < K; k0 += L, a += in_vector) {
        const int64_t quads = std::min<int64_t>(4, (K - k0 + 3) / 4);
        for (int64_t first = 0; first < 4; ++first)
          for (int64_t q = 0; q < quads; ++q, b += NV * L) {
            if (q % 2 == 0) ahead.step();  // often enough
            const float* left = a + first * L + q * 4;
            Vec<float> right[NV];
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) right[j] = load_vec(b + j * L);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
              const Vec<float> points = (Vec<float>)_mm512_broadcast_f32x4(_mm_loadu_ps(left + r * kTile));
#pragma GCC unroll 4
              for (int j = 0; j < NV; ++j) acc[r][j] += points * right[j];
            }
          }
      }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) store_vec(out[j] + (t + r) * kTile, acc[r][j]);
  }
}

// Y = A^T m A for V vectors of a row of tiles, of which `m` is the first: outputs as in the other transform_outputs.
template <int V>
inline bool transform_lane_outputs(const float* m, int64_t count, float* const (&outputs)[2]) {
  constexpr int L = kLanes<float>;
  const __m512 signs = _mm512_setr_ps(1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1);
  // A pixel's columns are in a vector's quarters: those of two vectors after one another, at both halves.
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  __m512i order[4];
  for (int p = 0; p < 4; ++p) order[p] = _mm512_add_epi32(first, _mm512_set1_epi32(p));
  Vec<float> check = {};
  for (int64_t t = 0; t < count; ++t, m += Points<2>::kTile) {
    __m512 pixels[4];  // of a vector: the four outputs of each column
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vec<float> rows[4], y[2];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) rows[i] = load_vec(m + (4 * i + v) * L);
      Winograd<2>::outputs(rows, y);
      const __m512 a = (__m512)y[0], b = (__m512)y[1];
      const __m512 ends = _mm512_shuffle_ps(a, b, 0x44), next = _mm512_shuffle_ps(a, b, 0x99),
                   last = _mm512_shuffle_ps(a, b, 0xee);
      pixels[v] = _mm512_fmadd_ps(signs, next + last, ends);
      check += finite_check((Vec<float>)pixels[v]);
    }
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      __m512 out;
      if constexpr (V == 1)
        out = _mm512_permutexvar_ps(order[p], pixels[0]);
      else
        out = _mm512_permutex2var_ps(pixels[0], order[p], pixels[1]);
      if constexpr (V == 3) out = _mm512_mask_permutexvar_ps(out, 0xff00, order[p], pixels[2]);
      if constexpr (V == 4)
        out = _mm512_mask_blend_ps(0xff00, out, _mm512_permutex2var_ps(pixels[2], order[p], pixels[3]));
      store_vec(outputs[p / 2] + (2 * t + p % 2) * L, (Vec<float>)out);
    }
  }
  return all_zero(check);
}

// A product for each row of points, in blocks of up to three vectors. A block's weights are [rows of points, slices, K,
// vectors]: K rounded up to whole fours, in the order of LanePoints.
struct LaneProducts : TileProducts<2> {
  using Inputs = LanePoints;
  using TileProducts<2>::TileProducts;
  static constexpr int L = kLanes<float>;
  static constexpr int kForm = 4;             // of packed weights
  static constexpr int kMostBlock = 1;        // blocks follow from the number of columns
  static constexpr double kPixelCycles = 60;  // of direct sums: much where there are few products, as to 4 or 8 columns

  // Where lanes would be left over otherwise. As many multiply-adds take longer this way: the transposition is extra.
  static bool pays(int64_t N) { return vectors(N) < 4 * Points<2>::vectors_of(N); }

  static int64_t vectors(int64_t N) { return (N + 3) / 4; }
  // Calls f(a block's vectors) for all of them, which differ by one vector at most.
  template <class F>
  static void for_blocks(int64_t N, const F& f) {
    const int blocks = int((vectors(N) + 2) / 3);
    for (int i = 0; i < blocks; ++i) f(part(vectors(N), 1, blocks, i));
  }
  // Tiles of a product of one, two or three vectors: sums enough that none is waited for.
  static constexpr int kTiles[3] = {16, 8, 8};
  static_assert(kTiles[0] <= std::max(kLongTiles<1>, kShortTiles<1>), "Points have room for whole tiles of rows");
  static int64_t covered(int64_t tiles, Range block) { return round_up(tiles, kTiles[block.end - block.begin - 1]); }
  // As PointProducts': four points of four columns are as much as one point of 16.
  static double work(int64_t N, int, int64_t tiles) {
    double sum = 0;
    for_blocks(N, [&](Range block) { sum += double((block.end - block.begin) * covered(tiles, block)) / 4; });
    return sum;
  }

  int64_t columns() const { return round_up(N, L); }
  int64_t slice_channels() const { return round_up(K, 4); }
  int64_t inner() const { return slices * slice_channels(); }
  static int64_t width(Range block) { return (block.end - block.begin) * L; }
  int64_t row_size(Range block) const { return inner() * width(block); }
  int64_t block_begin(Range block) const { return 4 * inner() * block.begin * L; }
  int64_t points_size() const { return 4 * inner() * vectors(N) * L; }
  int64_t strip_size() const { return L * kStrip * slices * 9; }

  // As PointProducts'.
  void transform(Range range, float* strip, float* points) const {
    for (int64_t k = range.begin; k < range.end; k += kStrip) {
      const int64_t channels = std::min(kStrip, range.end - k);
      for (int64_t n = 0; n < N; n += L) {
        Taps<const float> from = weight;
        from.data += k * weight.input + n * weight.output;
        const Packing<Fma<float>> packing = {from, channels, N - n, slices * 9, channels, strip};
        packing.block(0, L, 0, channels);
        Target to[4];
        int count = 0;
        for_blocks(N, [&](Range block) {
          for (int64_t v = std::max(block.begin, n / 4); v < std::min(block.end, n / 4 + 4); ++v)
            to[count++] = {points + block_begin(block) + k * width(block) + (v - block.begin) * L, row_size(block),
                           width(block)};
        });
        for (int slice = 0; slice < slices; ++slice)
          transform_strip(strip + slice * 9 * channels * L, channels, slice * slice_channels(), count, to);
      }
    }
  }

  void run(const float* points, const LanePoints in, const Points<2> out, int64_t tiles, SliceRange range,
           ReadsAhead& ahead) const {
    const int64_t in_vectors = Points<2>::vectors_of(K);
    int64_t beyond = 0;
    for_blocks(N, [&](Range block) { beyond = std::max(beyond, covered(tiles, block) - tiles); });
    for (int64_t v = range.begin * in_vectors; v < range.end * in_vectors; ++v)
      std::fill_n(in.at(v, tiles), beyond * LanePoints::kTile, 0.f);
    for (int i = 0; i < 4; ++i)
      for_blocks(N, [&](Range block) {
        const float* left = in.at(range.begin * in_vectors, 0) + 4 * i * L;
        const float* right =
            points + block_begin(block) + i * row_size(block) + range.begin * slice_channels() * width(block);
        const auto product = [&](auto vectors) {
          constexpr int NV = decltype(vectors)::value;
          float* sums[NV];  // a vector of columns has four of these at each row of points
          for (int j = 0; j < NV; ++j) sums[j] = out.at((block.begin + j) / 4, 0) + (4 * i + (block.begin + j) % 4) * L;
          lane_product<kTiles[NV - 1], NV>(tiles, range.end - range.begin, K, left, in.tiles * LanePoints::kTile, right,
                                           sums, ahead);
        };
        if (width(block) == L) product(Constant<1>{});
        if (width(block) == 2 * L) product(Constant<2>{});
        if (width(block) == 3 * L) product(Constant<3>{});
      });
  }

  bool outputs(const Points<2> out, int64_t n, int64_t tile, int64_t count, float* const (&lines)[2]) const {
    const float* m = out.at(n / L, tile);
    const int64_t there = vectors(std::min<int64_t>(L, N - n));
    if (there == 1) return transform_lane_outputs<1>(m, count, lines);
    if (there == 2) return transform_lane_outputs<2>(m, count, lines);
    if (there == 3) return transform_lane_outputs<3>(m, count, lines);
    return transform_lane_outputs<4>(m, count, lines);
  }

 private:
  // Where a vector's weights are: those of the next row of points, of the next number of the inner dimension.
  struct Target {
    float* data;
    int64_t row, next;
  };

  // One slice of a strip of 16 columns, of which `vectors` are there: taps are [taps, channels, columns].
  static void transform_strip(const float* taps, int64_t channels, int64_t inner, int vectors, const Target (&to)[4]) {
    // Four columns after one another belong to a vector, whose quarters the transposition takes every fourth one to.
    const __m512i by_quarter = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const int64_t quads = (channels + 3) / 4;
    for (int64_t c = 0; c < 4 * quads; ++c) {
      const int64_t at = inner + c % 4 * quads + c / 4;
      if (c >= channels) {
        for (int i = 0; i < 4; ++i)
          for (int v = 0; v < vectors; ++v) store_vec(to[v].data + i * to[v].row + at * to[v].next, Vec<float>{});
        continue;
      }
      __m512i rows[4][4];
      transform_weight<2>(
          [&](int tap) __attribute__((always_inline)) {
            const float* columns = taps + (tap * channels + c) * L;
            return (Vec<float>)_mm512_permutexvar_ps(by_quarter, _mm512_loadu_ps(columns));
          },
          [&](int i, int j, Vec<float> w) __attribute__((always_inline)) { rows[i][j] = (__m512i)w; });
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        transpose_quarters(rows[i]);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v)
          if (v < vectors) _mm512_storeu_si512(to[v].data + i * to[v].row + at * to[v].next, rows[i][v]);
      }
    }
  }
};
#endif
