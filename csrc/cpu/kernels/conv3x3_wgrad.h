// dW[t, n, c] = sum over pixels p of g[p, n] * y[p + t, c]: the inner dimension is the pixels of a stripe's lines.
// Lines beyond an image's border are left out; the pixels beyond a line's ends are zeros of y.
#pragma once

// Rows of a tile are output channels here. Of two heights the one is used that leaves fewer rows over.
constexpr int kLongRows = kRegisters == 32 ? 8 : (kMostVectors * 6 + kMostVectors + 1 <= kRegisters ? 6 : 4);
constexpr int kShortRows = kLongRows == 8 ? 6 : 4;
static_assert(kLongRows * kMostVectors + kMostVectors + 1 <= kRegisters, "sums stay in registers");

// What the products of one stripe have in common. A step is a pixel, or a pair of neighbours.
template <class P>
struct WgradLines {
  using Operand = typename P::Operand;
  int64_t count, steps, whole;  // whole: steps of as many pixels as an operand has; the last may be of one less
  const Operand* const* g;      // [count]
  int64_t g_step, y_step;       // from step to step, in operands
};

// Adds to wgrad[r, j] for R rows and NV vectors. y: the lines that one position of the window takes, null beyond the
// border; g is read from column n on, y from operand `shift` on.
template <class P, int R, int NV>
__attribute__((noinline)) void wgrad_tile(const WgradLines<P> lines, const typename P::Operand* const* y, int64_t n,
                                          int64_t shift, typename P::A* wgrad, int64_t wgrad_pitch) {
  using A = typename P::A;
  constexpr int L = kLanes<A>;
  Vec<A> acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[r][j] = load_vec(wgrad + r * wgrad_pitch + j * L);
  for (int64_t i = 0; i < lines.count; ++i) {
    if (!y[i]) continue;
    const typename P::Operand *a = lines.g[i] + n, *b = y[i] + shift;
    for (int64_t k = 0; k < lines.steps; ++k) {
      typename P::Right right[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        right[j] = P::load_right(b + j * L);
        // A pixel beside the last one's neighbours may not be finite, and must not be multiplied with a zero of g.
        if constexpr (P::kDepth > 1)
          if (k == lines.whole) right[j] = P::first_number(right[j]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const typename P::Operand left = a[r];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) P::multiply_add(acc[r][j], left, right[j]);
      }
      a += lines.g_step;
      b += lines.y_step;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store_vec(wgrad + r * wgrad_pitch + j * L, acc[r][j]);
}

// One task's sums [taps, N, C], rows and columns rounded up.
template <class P>
struct TaskWgrad {
  using A = typename P::A;
  using Operand = typename P::Operand;
  int64_t N, C;
  int taps;

  bool shorter() const { return round_up(N, kShortRows) < round_up(N, kLongRows); }
  int64_t rows() const { return round_up(N, shorter() ? kShortRows : kLongRows); }
  int64_t pitch() const { return padded<A>(C); }
  int64_t size() const { return taps * rows() * pitch(); }

  // y[row]: as in wgrad_tile, for each row of the window. y_pitch: of pixels, in operands.
  void add(const WgradLines<P>& lines, const Operand* const* const* y, int64_t y_pitch, A* sums) const {
    for_column_blocks<A>(0, C, [&](int64_t c, auto vectors) {
      constexpr int NV = decltype(vectors)::value;
      for (int t = 0; t < taps; ++t) {
        A* to = sums + t * rows() * pitch() + c;
        if (shorter())
          add_rows<kShortRows, NV>(lines, y[t / 3], t % 3 * y_pitch + c, to);
        else
          add_rows<kLongRows, NV>(lines, y[t / 3], t % 3 * y_pitch + c, to);
      }
    });
  }
  // Adds up the tasks' sums in their order.
  void finish(const Each<A> all, int tasks, const Taps<A> to, const Pool& pool) const {
    pool.run([&](int task) {
      const Range channels = part(N, 1, pool.tasks, task);
      for (int64_t n = channels.begin; n < channels.end; ++n)
        for (int64_t c = 0; c < C; c += kLanes<A>)
          for (int t = 0; t < taps; ++t) {
            const int64_t at = (t * rows() + n) * pitch() + c;
            Vec<A> total = {};
            for (int i = 0; i < tasks; ++i) total += load_vec(all[i] + at);
            alignas(64) A totals[kLanes<A>];
            store_vec(totals, total);
            A* out = to.data + n * to.output + c * to.input + t * to.tap;
            for (int64_t i = 0; i < std::min<int64_t>(kLanes<A>, C - c); ++i) out[i * to.input] = totals[i];
          }
    });
  }

 private:
  template <int R, int NV>
  void add_rows(const WgradLines<P>& lines, const Operand* const* y, int64_t shift, A* to) const {
    for (int64_t n = 0; n < N; n += R) wgrad_tile<P, R, NV>(lines, y, n, shift, to + n * pitch(), pitch());
  }
};

// A band of a line as pairs along the pixels: operand [i, c] = pixels i and i + 1, counted from the one before the
// band. wgrad takes every second of them, the even ones or the odd ones as its position in the window has it.
template <class P, class Source>
DX_INLINE void fill_pairs(Stripes::Band band, int64_t line_width, int64_t C, const Source source,
                          typename P::Operand* line, int64_t pitch) {
  using A = typename P::A;
  // Pixels that exist, counted as the pairs are.
  const int64_t begin = band.begin > 0 ? 0 : 1, end = band.width + (band.begin + band.width < line_width ? 2 : 1);
  for_columns<A>(C, [&](int64_t c, auto columns) {
    const auto constants = source.at(c);
    Vec<A> pair[2] = {};
    if (begin == 0) pair[0] = source.value(constants, band.begin - 1, c, columns);
    for (int64_t i = 0; i < band.width + 2; ++i) {
      pair[1] = i + 1 >= begin && i + 1 < end ? source.value(constants, band.begin + i, c, columns) : Vec<A>{};
      P::store_along_rows(line + i * pitch, c, pair);
      pair[0] = pair[1];
    }
  });
}
