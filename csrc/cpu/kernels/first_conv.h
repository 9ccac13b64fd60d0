// out = conv(x) + bias of a network's images, which have few channels, with any window. In channels_last memory the
// numbers that a row of the window covers are a stretch of a line of pixels; the next output's stretch begins `stride`
// pixels further on, and may overlap it. So a product takes its left operands off the line as it is: patches are not
// gathered. A task keeps the lines that a line of outputs is made of, with their padding, in the type that is
// multiplied: images of any type and layout are converted as they are read.
//
// The inner dimension is that of a stretch, for each row of the window in turn; rows beyond the border are left out.
#pragma once

// Tiles of the rows that a line leaves behind its last whole tile.
constexpr int kLastTileRows = kRowUnit % 4 == 0 ? 4 : 2;
// Products that are summed one after another at most, but for those of one row of the window: each rounds the sum so
// far, and in parts the errors are smaller. A window of 7x7 on three channels has 147, 7x7x7 on one has 343.
constexpr int64_t kChain = 192;

struct NoAside {
  DX_INLINE void step() {}
};

template <class T, class P>
class FirstConvolution {
  using A = Acc<T>;
  using Operand = typename P::Operand;
  using Number = typename P::Number;
  static constexpr int L = kLanes<A>;

  const FirstConv<T>& p;
  const Pool& pool;
  const Pooling& g;
  const int64_t window_rows, stretch;  // stretch: the numbers that a row of the window covers
  const int64_t chain_rows;            // whose products are summed one after another
  const int64_t steps, packed_count, weight_count;
  const int64_t positions, line_size;  // pixels of a line that tiles read; room for a vector behind them
  Scratch scratch;
  TaskScratch own;
  A* bias;
  const Each<Operand> packed;
  const Each<A> arranged, widened;
  const Each<Number> lines;
  const Each<int64_t> held;  // which line of x each of a task's lines is

  // A row of the window: the line that it lies on, and its weights in a block of one column.
  struct Row {
    const Number* line;
    int64_t weights;
  };
  const Each<Row> rows;

 public:
  FirstConvolution(const FirstConv<T>& p, const Pool& pool)
      : p(p),
        pool(pool),
        g(p.geometry),
        window_rows(g.window[0] * g.window[1]),
        stretch(g.window[2] * p.C),
        chain_rows(std::max<int64_t>(kChain / stretch, 1)),
        steps(depth_steps<P>(stretch)),
        packed_count(padded<A>(p.N) * steps * window_rows),
        weight_count(p.N * stretch * window_rows),
        positions((round_up(g.out[2], kLastTileRows) - 1) * g.stride[2] + g.window[2]),
        line_size(round_up(positions * p.C, L) + L),
        scratch(Scratch::bytes<A>(padded<A>(p.N))),
        own(pool.tasks, Scratch::bytes<Operand>(packed_count) + Scratch::bytes<A>(weight_count) +
                            Scratch::bytes<A>(window_rows * stretch) + Scratch::bytes<Number>(window_rows * line_size) +
                            Scratch::bytes<int64_t>(window_rows) + Scratch::bytes<Row>(window_rows)),
        bias(scratch.take<A>(padded<A>(p.N))),
        packed(own.take<Operand>(packed_count)),
        arranged(own.take<A>(weight_count)),
        widened(own.take<A>(window_rows * stretch)),
        lines(own.take<Number>(window_rows * line_size)),
        held(own.take<int64_t>(window_rows)),
        rows(own.take<Row>(window_rows)) {
    std::fill_n(bias, padded<A>(p.N), A(0));
    if (p.bias) std::copy_n(p.bias, p.N, bias);
  }

  void run() const {
    pool.run([&](int task) {
      pack(task);
      std::fill_n(lines[task], window_rows * line_size, Number{});
      std::fill_n(held[task], window_rows, int64_t(-1));
      const Range range = part(g.batch * g.out[0] * g.out[1], 1, pool.tasks, task);
      for (int64_t line = range.begin; line < range.end; ++line) {
        const int64_t count = find_rows(task, line);
        for_column_blocks<A>(0, p.N, [&](int64_t n, auto vectors) {
          constexpr int NV = decltype(vectors)::value;
          int64_t w = 0;
          for (; w + kTileRows<NV> <= g.out[2]; w += kTileRows<NV>) tile<kTileRows<NV>, NV>(task, count, line, w, n);
          for (; w < g.out[2]; w += kLastTileRows) tile<kLastTileRows, NV>(task, count, line, w, n);
        });
      }
    });
  }

 private:
  // ---- weights: [window_rows, stretch, N] ---------------------------------------------------------------------------
  void pack(int task) const {
    Taps<const A> w = p.wide_weight;
    if (!w)
      w = arrange(p.weight, task);
    else if (w.input != 1)
      w = arrange(w, task);
    w.output = window_rows * stretch, w.tap = stretch;
    TapsPacking<P>{w, stretch, p.N, window_rows}.share(packed[task], 0, 1);
  }
  // The weight in the type of sums, with its input channels behind its taps.
  template <class W>
  Taps<const A> arrange(const Taps<const W>& weight, int task) const {
    const int64_t count = window_rows * stretch, taps = count / p.C;
    A *to = arranged[task], *wide = widened[task];
    for (int64_t n = 0; n < p.N; ++n, to += count) {
      const W* from = weight.data + n * count;
      for_columns<A>(count, [&](int64_t i, auto columns) { columns.store(wide + i, columns.load(from + i)); });
      for (int64_t c = 0; c < p.C; ++c)
        for (int64_t t = 0; t < taps; ++t) to[t * p.C + c] = wide[c * weight.input + t * weight.tap];
    }
    return {arranged[task], count, 1, p.C};
  }

  // ---- lines -------------------------------------------------------------------------------------------------------
  // The rows of the window that lie within the image, for a line of outputs. Lines that the task does not hold yet are
  // filled; each takes the place of one that has left the window.
  int64_t find_rows(int task, int64_t line) const {
    const int64_t oh = line % g.out[1], od = line / g.out[1] % g.out[0], n = line / (g.out[1] * g.out[0]);
    const Range ds = inside(g, 0, od), hs = inside(g, 1, oh);
    int64_t count = 0;
    for (int64_t d = ds.begin; d < ds.end; ++d)
      for (int64_t h = hs.begin; h < hs.end; ++h) {
        const int64_t slot = d % g.window[0] * g.window[1] + h % g.window[1];
        const int64_t of_x = (n * g.size[0] + d) * g.size[1] + h;
        Number* numbers = lines[task] + slot * line_size;
        if (held[task][slot] != of_x) {
          held[task][slot] = of_x;
          const int64_t offset = n * p.strides.image + d * p.strides.spatial[0] + h * p.strides.spatial[1];
          if (p.x)
            fill_line(p.x + offset, numbers);
          else
            fill_line(p.wide_x + offset, numbers);
        }
        const int64_t row = within(g, 0, d, od) * g.window[1] + within(g, 1, h, oh);
        rows[task][count++] = {numbers, row * steps};
      }
    return count;
  }
  // Its padding is zero from the beginning.
  template <class X>
  void fill_line(const X* x, Number* line) const {
    const int64_t width = std::min(g.size[2], positions - g.padding[2]);
    if (width <= 0) return;
    Number* to = line + g.padding[2] * p.C;
    if (p.strides.channel == 1 && p.strides.spatial[2] == p.C)
      for_columns<A>(width * p.C, [&](int64_t i, auto columns) { put(to + i, columns.load(x + i)); });
    else
      for (int64_t c = 0; c < p.C; ++c) fill_channel(x + c * p.strides.channel, width, to + c);
  }
  template <class X>
  void fill_channel(const X* x, int64_t width, Number* to) const {
    const int64_t distance = p.strides.spatial[2];
    for_columns<A>(width, [&](int64_t w, auto columns) {
      const int count = lanes_of<A>(columns);
      X neighbours[L] = {};
      const X* from = x + w;
      if (distance != 1) {
        for (int i = 0; i < count; ++i) neighbours[i] = x[(w + i) * distance];
        from = neighbours;
      }
      Number numbers[L];
      put(numbers, columns.load(from));
      for (int i = 0; i < count; ++i) to[(w + i) * p.C] = numbers[i];
    });
  }
  static DX_INLINE void put(Number* to, Vec<A> v) { P::store_along_columns(reinterpret_cast<Operand*>(to), 0, v); }

  // ---- products ----------------------------------------------------------------------------------------------------
  // of a line from w on, NV vectors of columns from n on.
  template <int R, int NV>
  DX_INLINE void tile(int task, int64_t count, int64_t line, int64_t w, int64_t n) const {
    constexpr int kDepth = P::kDepth;
    const int64_t whole = stretch / kDepth, distance = g.stride[2] * p.C;
    const Operand* block = packed[task] + n * steps * window_rows;
    NoAside nothing;
    Vec<A> acc[R][NV], before[R][NV];  // before: the sum of earlier rows, if there are so many
    set_zero<A>(acc);
    for (int64_t i = 0, end = std::min(count, chain_rows);; end = std::min(count, end + chain_rows)) {
      for (; i < end; ++i) {
        const Number* left = rows[task][i].line + w * distance;
        const Operand* right = block + rows[task][i].weights * NV * L;
        add_product<P, 0, kDepth>(whole, left, distance, kDepth, right, NV * L, acc, nothing);
      }
      if (end > chain_rows) add<R, NV>(before, acc);
      if (end == count) break;
      std::memcpy(before, acc, sizeof(acc));
      set_zero<A>(acc);
    }
    if constexpr (kDepth > 1)
      if (whole < steps) add_last(rows[task], count, w * distance + whole * kDepth, block + whole * NV * L, acc);
    // Copies, as what is stored might be anything that a pointer leads to.
    const Rows<T> out = {p.out.row(line * g.out[2] + w) + n, p.out.pitch};
    const int64_t pixels = std::min<int64_t>(R, g.out[2] - w), columns = p.N - n;
    Vec<A> add[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) add[j] = load_vec(bias + n + j * L);
    if (pixels == R && columns >= NV * L)
      write(acc, add, out, R, Whole{});
    else
      write(acc, add, out, pixels, Part{int(std::min<int64_t>(columns - (NV - 1) * L, L))});
  }
  // The last numbers of stretches of an odd count, two of which make an operand: what follows them in a line may not be
  // finite, and must not be multiplied with a zero. `at`: of the first output's; block: their weights'.
  template <int R, int NV>
  DX_INLINE void add_last(const Row* of, int64_t count, int64_t at, const Operand* block, Vec<A> (&acc)[R][NV]) const {
    const Number zero = {};
    for (int64_t i = 0; i < count; i += 2) {
      const bool two = i + 1 < count;
      const int64_t distance = g.stride[2] * p.C;
      const Number *a = of[i].line + at, *b = two ? of[i + 1].line + at : &zero;
      typename P::Right right[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        right[j] = P::load_right(block + (of[i].weights * NV + j) * L);
        if (two) right[j] = P::joined(right[j], P::load_right(block + (of[i + 1].weights * NV + j) * L));
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Operand left = P::joined(a[r * distance], b[two ? r * distance : 0]);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) P::multiply_add(acc[r][j], left, right[j]);
      }
    }
  }
  template <int R, int NV>
  static DX_INLINE void add(const Vec<A> (&from)[R][NV], Vec<A> (&to)[R][NV]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) to[r][j] += from[r][j];
  }
  // last: the columns of the last vector.
  template <int R, int NV, class Columns>
  static DX_INLINE void write(const Vec<A> (&acc)[R][NV], const Vec<A> (&add)[NV], Rows<T> out, int64_t pixels,
                              Columns last) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if (r >= pixels) break;
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        T* to = out.row(r) + j * L;
        if (j < NV - 1)
          store(to, acc[r][j] + add[j]);
        else
          last.store(to, acc[r][j] + add[j]);
      }
    }
  }
};

template <class T>
void first_conv(const FirstConv<T>& p, const Pool& pool) {
  FirstConvolution<T, Product<T>>(p, pool).run();
}
