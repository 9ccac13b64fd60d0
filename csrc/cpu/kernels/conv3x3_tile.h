// The products behind the 3x3 convolutions, as sums over the window's positions and the input channels: of both passes
// towards the other side (the forward pass, and dgrad, which is the forward pass of the gradient with the window turned
// round), and of wgrad.
//
// A tile is some segments of G neighbouring pixels of a line x NV vectors of output channels. Segments rather than a
// stretch of pixels, as 7 and 4 divide the sides of most images, so that few products fall beyond a line's end. Of the
// two lengths that are compiled the one is used of which fewer do.
//   AVX-512, 32 registers:  2 x 7 x 2 (28 sums + 2 vectors of weights + 1 pixel), 3 x 4 x 2, 1 x 7 x 3, 2 x 4 x 3
//   16 registers:           1 x 4 x 2, 2 x 3 x 2
#pragma once

constexpr int kLongSegment = kRegisters == 32 ? 7 : 4, kShortSegment = kRegisters == 32 ? 4 : 3;
template <int G, int NV>
constexpr int kSegments = std::max(1, std::min(16 / G, (kRegisters - NV - 1) / (G * NV)));
constexpr int kMostSegments = 16 / kShortSegment, kMostTilePixels = 16;
static_assert(kSegments<kLongSegment, kMostVectors> * kLongSegment * kMostVectors + kMostVectors + 1 <= kRegisters &&
                  kSegments<kShortSegment, kMostVectors> * kShortSegment * kMostVectors + kMostVectors + 1 <=
                      kRegisters,
              "sums stay in registers");

// What the tiles of one stripe have in common.
template <class P>
struct ConvTile {
  using A = typename P::A;
  using Operand = typename P::Operand;
  int rows;       // of the window
  int runs;       // of each row of the window: 3, or 1 where a pixel's operands end where the next one's begin
  int64_t steps;  // of a run
  int64_t pitch;  // of pixels
};

// tile[j][r][lane] = sum over the window and the inner dimension for pixel r of the tile and vector j. left[row][i]:
// the segments' first pixels, shifted by the window's row; all null where every one of them lies beyond the border.
// Each step asks for a line of `ahead`.
template <class P, int G, int NV>
__attribute__((noinline)) void conv_tile(const ConvTile<P> t, const typename P::Operand* const (*left)[kMostSegments],
                                         const typename P::Operand* b, typename P::A* tile, ReadsAhead& ahead) {
  using A = typename P::A;
  constexpr int S = kSegments<G, NV>, L = kLanes<A>;
  Vec<A> acc[S * G][NV];
#pragma GCC unroll 16
  for (int r = 0; r < S * G; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[r][j] = Vec<A>{};
  const int64_t pitch = t.pitch;
  for (int row = 0; row < t.rows; ++row) {
    if (!left[row][0]) {
      b += t.runs * t.steps * NV * L;
      continue;
    }
    for (int run = 0; run < t.runs; ++run) {
      const typename P::Operand* a[S];
#pragma GCC unroll 16
      for (int s = 0; s < S; ++s) a[s] = left[row][s] + run * pitch;
      for (int64_t k = 0; k < t.steps; ++k) {
        ahead.step();
        typename P::Right right[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) right[j] = P::load_right(b + j * L);
#pragma GCC unroll 16
        for (int s = 0; s < S; ++s)
#pragma GCC unroll 16
          for (int g = 0; g < G; ++g) {
            const typename P::Operand pixel = a[s][g * pitch];
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) P::multiply_add(acc[s * G + g][j], pixel, right[j]);
          }
#pragma GCC unroll 16
        for (int s = 0; s < S; ++s) ++a[s];
        b += NV * L;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < S * G; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store_vec(tile + (j * S * G + r) * L, acc[r][j]);
}

// ---- a stripe -------------------------------------------------------------------------------------------------------
// The pixels that S segments from `first` on take, of `count` that a stripe has from `line` on, as in conv_tile; a tile
// that is not full repeats its last one. distance: of segments in a line.
template <int S, class P>
DX_INLINE void find_segments(const ImageLines& image, const LineRing<P>& ring, int64_t line, int64_t per_line,
                             int64_t first, int64_t count, int64_t distance,
                             const typename P::Operand* (*left)[kMostSegments]) {
  for (int row = 0; row < image.rows; ++row) {
    bool any = false;
    for (int s = 0; s < S; ++s) {
      const int64_t i = std::min(first + s, count - 1);
      const int64_t from = image.neighbour(line + i / per_line, row);
      any |= from >= 0;
      left[row][s] = (from < 0 ? ring.zeros : ring.line(from)) + i % per_line * distance;
    }
    if (!any) left[row][0] = nullptr;
  }
}

// The convolution of a ring's lines with packed weights.
template <class P>
struct LineConv {
  using A = typename P::A;
  using Operand = typename P::Operand;
  static constexpr int L = kLanes<A>;
  const ImageLines& image;
  const Operand* packed;
  int64_t K, N;

  int64_t taps() const { return image.rows * 3; }
  // The pixels' distance holds whole vectors of columns.
  static int64_t pitch(int64_t K) {
    constexpr int kUnit = L / P::kDepth;
    return (depth_steps<P>(K) + kUnit - 1) / kUnit * kUnit;
  }
  static int64_t packed_size(int64_t K, int64_t N, const ImageLines& image) {
    return padded<A>(N) * depth_steps<P>(K) * image.rows * 3;
  }

  // Calls make(first column, NV) for each block of columns, and what that returns for each segment: f(sums of the
  // first pixel's first vector, distance of vectors, line, first pixel of the band, pixels). Each step of the
  // products asks for a line of `ahead`.
  template <class Make>
  DX_INLINE void run(const LineRing<P>& ring, Stripes::Band band, int64_t line, int64_t lines, ReadsAhead& ahead,
                     const Make& make) const {
    const bool shorter = round_up(band.width, kShortSegment) < round_up(band.width, kLongSegment);
    for_column_blocks<A>(0, N, [&](int64_t n, auto vectors) {
      constexpr int NV = decltype(vectors)::value;
      auto f = make(n, vectors);
      if (shorter)
        run_tiles<kShortSegment, NV>(ring, band, line, lines, n, ahead, f);
      else
        run_tiles<kLongSegment, NV>(ring, band, line, lines, n, ahead, f);
    });
  }

 private:
  template <int G, int NV, class F>
  DX_INLINE void run_tiles(const LineRing<P>& ring, Stripes::Band band, int64_t line, int64_t lines, int64_t n,
                           ReadsAhead& ahead, F& f) const {
    constexpr int S = kSegments<G, NV>;
    const int64_t steps = depth_steps<P>(K), per_line = (band.width + G - 1) / G, count = lines * per_line;
    const bool joined = steps == ring.pitch;
    const ConvTile<P> tile = {image.rows, joined ? 1 : 3, joined ? 3 * steps : steps, ring.pitch};
    for (int64_t first = 0; first < count; first += S) {
      const Operand* left[kMostWindowRows][kMostSegments];
      find_segments<S>(image, ring, line, per_line, first, count, G * ring.pitch, left);
      alignas(64) A sums[NV * S * G * L];
      conv_tile<P, G, NV>(tile, left, packed + n * steps * taps(), sums, ahead);
      for (int s = 0; s < S && first + s < count; ++s) {
        const int64_t i = first + s, w = i % per_line * G;
        f(sums + s * G * L, S * G * L, line + i / per_line, w, std::min<int64_t>(G, band.width - w));
      }
    }
  }
};
