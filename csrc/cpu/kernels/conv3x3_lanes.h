// The forward pass where a vector of output channels would be part empty, of k = 12 say: pixels in the lanes, and
// output channels as the rows of a tile. Lines lie in their ring channel by channel, so that neighbouring pixels are a
// vector; they and the sums are transposed on the way, which costs less than the empty lanes.
//   AVX-512:  12 output channels x 2 vectors of pixels (24 sums + 2 + 1)
#pragma once

#if DX_VECTOR_BYTES == 64
constexpr int kLanesSegments = 2;

// sums[s][pixel][channel] for R output channels; channels beyond R are zero. left: as in conv_tile, pixels being
// neighbours and channels `step` apart.
template <class P, int R>
__attribute__((noinline)) void lanes_tile(int rows, int64_t steps, int64_t step,
                                          const typename P::Operand* const (*left)[kMostSegments],
                                          const typename P::Operand* b, float* sums, ReadsAhead& ahead) {
  constexpr int S = kLanesSegments, L = 16;
  Vec<float> acc[R][S];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) acc[r][s] = Vec<float>{};
  for (int row = 0; row < rows; ++row) {
    if (!left[row][0]) {
      b += 3 * steps * R;
      continue;
    }
    for (int shift = 0; shift < 3; ++shift) {
      const typename P::Operand *a0 = left[row][0] + shift, *a1 = left[row][1] + shift;
      for (int64_t k = 0; k < steps; ++k) {
        ahead.step();
        const typename P::Right pixels[S] = {P::load_right(a0), P::load_right(a1)};
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int s = 0; s < S; ++s) P::multiply_add(acc[r][s], b[r], pixels[s]);
        a0 += step;
        a1 += step;
        b += R;
      }
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) v[r] = r < R ? (__m512i)acc[r < R ? r : 0][s] : _mm512_setzero_si512();
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(sums + (s * 16 + i) * L, v[i]);
  }
}
template <class P>
constexpr bool kHasLanes = sizeof(typename P::Operand) == 4;
#else
template <class P>
constexpr bool kHasLanes = false;
#endif

// Whether it is worth it, and the output channels of a tile.
template <class P>
struct LanesChoice {
  int R = 0;  // 0: it is not

  LanesChoice(const Stripes& stripes, int64_t K, int64_t N) {
    constexpr int L = kLanes<typename P::A>;
    if (!kHasLanes<P> || stripes.bands > 1) return;
    const int rows = round_up(N, 8) < round_up(N, 12) ? 8 : 12;
    const auto pixels = [&](int64_t unit) { return double(round_up(stripes.width, unit)); };
    const double channels = double(padded<typename P::A>(N)) * std::min(pixels(kLongSegment), pixels(kShortSegment));
    // Few channels do not repay the transposition.
    if (K >= 16 && 1.15 * double(round_up(N, rows)) * pixels(L) <= channels) R = rows;
  }
};

// The convolution of lines that lie channel by channel, [steps, positions] each.
template <class P>
struct LanesConv {
  using A = typename P::A;
  using Operand = typename P::Operand;
  const ImageLines& image;
  const Operand* packed;
  int64_t K, N;
  int R;

  static int64_t positions_of(int64_t width) { return round_up(width, kLanes<A>) + 2; }
  static int64_t packed_size(int64_t K, int64_t N, const ImageLines& image, int R) {
    return round_up(N, R) * depth_steps<P>(K) * image.rows * 3;
  }
  // A line of its own for each task, before it is transposed.
  static int64_t staging_size(int64_t width, int64_t pitch) { return round_up(width, kLanes<A>) * pitch + kLanes<A>; }

  // Turns a line of `width` pixels, `pitch` apart, into channels. Its ends stay zero.
  static void turn(const Operand* line, int64_t width, int64_t pitch, int64_t steps, int64_t positions, Operand* to) {
#if DX_VECTOR_BYTES == 64
    for (int64_t w = 0; w < width; w += 16)
      for (int64_t k = 0; k < steps; k += 16) {
        __m512i v[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(line + (w + i) * pitch + k);
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          if (k + i < steps) _mm512_storeu_si512(to + (k + i) * positions + 1 + w, v[i]);
      }
#endif
  }

  // As LineConv::run, with one vector of columns for a block.
  template <class Make>
  DX_INLINE void run(const LineRing<P>& ring, int64_t line, int64_t lines, ReadsAhead& ahead, const Make& make) const {
#if DX_VECTOR_BYTES == 64
    if constexpr (kHasLanes<P>) run_tiles(ring, line, lines, ahead, make);
#endif
  }

 private:
#if DX_VECTOR_BYTES == 64
  template <class Make>
  DX_INLINE void run_tiles(const LineRing<P>& ring, int64_t line, int64_t lines, ReadsAhead& ahead,
                           const Make& make) const {
    constexpr int S = kLanesSegments, L = 16;
    const int64_t steps = depth_steps<P>(K), per_line = (image.width + L - 1) / L, count = lines * per_line;
    for (int64_t n = 0; n < N; n += R) {
      const auto f = make(n, Constant<1>{});
      for (int64_t first = 0; first < count; first += S) {
        const Operand* left[kMostWindowRows][kMostSegments];
        find_segments<S>(image, ring, line, per_line, first, count, L, left);
        alignas(64) float sums[S * L * L];
        const auto tile = R == 12 ? lanes_tile<P, 12> : lanes_tile<P, 8>;
        tile(image.rows, steps, ring.positions, left, packed + n * steps * image.rows * 3, sums, ahead);
        for (int s = 0; s < S && first + s < count; ++s) {
          const int64_t i = first + s, w = i % per_line * L;
          f(sums + s * L * L, 0, line + i / per_line, w, std::min<int64_t>(L, image.width - w));
        }
      }
    }
  }
#endif
};
