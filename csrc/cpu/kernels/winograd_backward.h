// The backward pass of conv3x3_backward.h by Winograd's products. Rows of tiles of the gradient are transformed twice:
// with the tiles around them for dgrad, alone for wgrad; those of the inputs as in the forward pass.
#pragma once

// sums[r, j] += sum over the tiles of v[tile, r] * u[j, tile] for R rows and NV vectors of columns of one point.
template <int R, int NV>
__attribute__((noinline)) void point_wgrad(int64_t tiles, const float* v, const float* u, int64_t u_vector, float* sums,
                                           int64_t pitch) {
  constexpr int L = kLanes<float>;
  Vec<float> acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[r][j] = load_vec(sums + r * pitch + j * L);
  for (int64_t t = 0; t < tiles; ++t, v += Points::kTile, u += Points::kTile) {
    Vec<float> right[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) right[j] = load_vec(u + j * u_vector);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float left = v[r];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[r][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store_vec(sums + r * pitch + j * L, acc[r][j]);
}

// Sums of wgrad's products over the tiles, [points, N, slices * C], rows and columns rounded up, one for each task; and
// [taps, N, C] of the tiles that are summed directly.
class WinogradWgrad {
  static constexpr int L = kLanes<float>;

 public:
  int64_t N, C;
  int slices;

  int64_t rows() const { return padded<float>(N); }
  int64_t slice_pitch() const { return padded<float>(C); }
  int64_t pitch() const { return slices * slice_pitch(); }
  int64_t points_size() const { return kPoints * rows() * pitch(); }
  int64_t direct_size() const { return slices * 9 * N * slice_pitch(); }

  // Rows of a tile of wgrad's products: of one vector of v.
  static constexpr int kRows = kLongRows == 8 ? 8 : 4;

  // sums += v^T * u for so many tiles.
  void add(const Points v, const Points u, int64_t tiles, float* sums) const {
    for (int p = 0; p < kPoints; ++p)
      for (int64_t n = 0; n < N; n += L) {
        const int64_t width = std::min<int64_t>(L, N - n);
        const bool shorter = kRows == 8 && (width <= 6 || (width > 8 && width <= 12));
        const int64_t step = shorter ? 6 : kRows;
        for_column_blocks<float>(0, pitch(), [&](int64_t c, auto vectors) {
          constexpr int NV = decltype(vectors)::value;
          const auto tile = shorter ? point_wgrad<6, NV> : point_wgrad<kRows, NV>;
          for (int64_t r = 0; r < width; r += step)
            tile(tiles, v.at(n / L, 0) + p * L + r, u.at(c / L, 0) + p * L, u.tiles * Points::kTile,
                 sums + (p * rows() + n + r) * pitch() + c, pitch());
        });
      }
  }

  // The same of the pixels of a row of tiles, as a direct convolution has them.
  template <class Grad, class Source>
  __attribute__((noinline)) void add_directly(const TileRows& tiles, int64_t row, TileBand band, const Grad grad,
                                              const Source source, float* direct) const {
    const int64_t width = tiles.image.width;
    tiles.for_lines(row, band, [&](int64_t i, int64_t m, int64_t pixels) {
      for (int64_t w = 0; w < pixels; ++w)
        for (int tap = 0; tap < slices * 9; ++tap) {
          const int64_t line = tiles.input_line(row, tap / 9, int(i) + tap / 3 % 3);
          const int64_t pixel = 2 * band.begin + w + tap % 3 - 1;
          if (line < 0 || pixel < 0 || pixel >= width) continue;
          for_columns<float>(N, [&](int64_t n, auto columns) {
            float g[L];
            store_vec(g, grad.value(grad.at(n), m + w, n, columns));
            for (int64_t j = 0; j < std::min<int64_t>(L, N - n); ++j)
              for_columns<float>(C, [&](int64_t c, auto of_c) {
                float* to = direct + (tap * N + n + j) * slice_pitch() + c;
                store_vec(to, load_vec(to) + g[j] * source.value(source.at(c), line * width + pixel, c, of_c));
              });
          });
        }
    });
  }

  // Adds up the tasks' sums in their order. used: whether a task has any direct ones.
  void finish(const Each<float> points, const Each<float> direct, const bool* used, int tasks, const Taps<float> to,
              const Pool& pool) const {
    pool.run([&](int task) {
      const Range channels = part(N, 1, pool.tasks, task);
      for (int64_t n = channels.begin; n < channels.end; ++n)
        for (int slice = 0; slice < slices; ++slice)
          for (int64_t c = 0; c < C; c += L) {
            Vec<float> taps[9];
            of_points(points, n * pitch() + slice * slice_pitch() + c, tasks, taps);
            for (int t = 0; t < 9; ++t) {
              const int64_t at = ((slice * 9 + t) * N + n) * slice_pitch() + c;
              for (int i = 0; i < tasks; ++i)
                if (used[i]) taps[t] += load_vec(direct[i] + at);
              alignas(64) float numbers[L];
              store_vec(numbers, taps[t]);
              float* out = to.data + n * to.output + c * to.input + (slice * 9 + t) * to.tap;
              for (int64_t i = 0; i < std::min<int64_t>(L, C - c); ++i) out[i * to.input] = numbers[i];
            }
          }
    });
  }

 private:
  // G^T m G of a vector of columns.
  void of_points(const Each<float> points, int64_t at, int tasks, Vec<float> (&taps)[9]) const {
    const auto along = [](const Vec<float>(&m)[4], Vec<float>(&to)[3]) {
      const Vec<float> half = broadcast(0.5f), sum = (m[1] + m[2]) * half;
      to[0] = m[0] + sum;
      to[1] = (m[1] - m[2]) * half;
      to[2] = sum + m[3];
    };
    Vec<float> half_way[4][3];
    for (int i = 0; i < 4; ++i) {
      Vec<float> m[4] = {};
      for (int j = 0; j < 4; ++j)
        for (int task = 0; task < tasks; ++task) m[j] += load_vec(points[task] + at + (4 * i + j) * rows() * pitch());
      along(m, half_way[i]);
    }
    for (int j = 0; j < 3; ++j) {
      const Vec<float> m[4] = {half_way[0][j], half_way[1][j], half_way[2][j], half_way[3][j]};
      Vec<float> column[3];
      along(m, column);
      for (int i = 0; i < 3; ++i) taps[3 * i + j] = column[i];
    }
  }
};

template <class T>
class WinogradBackward {
  static constexpr int L = kLanes<float>;

  const BnReluConv3x3Backward<T>& p;
  const Pool& pool;
  const TileRows tiles;
  const int slices;
  PointProducts products;  // of dgrad
  const WinogradWgrad wgrad;
  const int64_t y_vectors;  // of the inputs, or of dgrad's outputs, which follow them
  Scratch scratch;
  TaskScratch task_scratch;
  const Conv3x3Gradients<T> all;
  float* points;
  const Each<float> operands, wgrads, direct, strips;
  bool* used;

  // What a task has: inputs or outputs, the gradient for dgrad and for wgrad, and two lines of outputs.
  int64_t size_of(int64_t vectors) const { return Points::size(products.groups.most(), vectors); }
  int64_t y_size() const { return size_of(y_vectors); }
  int64_t dgrad_size() const { return size_of(slices * Points::vectors_of(p.N)); }
  int64_t wgrad_size() const { return size_of(Points::vectors_of(p.N)); }
  int64_t lines_size() const { return 4 * products.groups.band * L; }
  int64_t task_size() const { return y_size() + dgrad_size() + wgrad_size() + lines_size(); }

 public:
  static TileGroups groups(const BnReluConv3x3Backward<T>& p, const TileRows& tiles) {
    constexpr int64_t kKept = 1024 * 1024;  // wgrad's sums are loaded and stored once a group
    const int64_t vectors = tiles.slices() * Points::vectors_of(p.C) + (tiles.slices() + 1) * Points::vectors_of(p.N);
    return TileGroups(tiles, p.C, vectors * Points::kTile * int64_t(sizeof(float)), kKept, true);
  }
  WinogradBackward(const BnReluConv3x3Backward<T>& p, const TileRows& tiles, const TileGroups& groups, const Pool& pool)
      : p(p),
        pool(pool),
        tiles(tiles),
        slices(tiles.slices()),
        products(groups, p.N, p.C, tiles.slices(), {p.weight.data, p.weight.input, p.weight.output, p.weight.tap},
                 true),
        wgrad{p.N, p.C, slices},
        y_vectors(std::max(slices * Points::vectors_of(p.C), products.columns() / L)),
        scratch(Conv3x3Gradients<T>::bytes(p, pool.tasks) + Scratch::bytes<float>(products.points_size()) +
                Scratch::bytes<bool>(pool.tasks)),
        task_scratch(pool.tasks, Scratch::bytes<float>(task_size()) + Scratch::bytes<float>(wgrad.points_size()) +
                                     Scratch::bytes<float>(wgrad.direct_size()) +
                                     Scratch::bytes<float>(products.strip_size())),
        all(scratch, p, pool.tasks),
        points(scratch.take<float>(products.points_size())),
        operands(task_scratch.take<float>(task_size())),
        wgrads(task_scratch.take<float>(wgrad.points_size())),
        direct(task_scratch.take<float>(wgrad.direct_size())),
        strips(task_scratch.take<float>(products.strip_size())),
        used(scratch.take<bool>(pool.tasks)) {
    std::fill_n(used, pool.tasks, false);
  }

  void run() {
    if (all.want_dgrad) products.transform(strips, points, pool);
    pool.run([&](int task) {
      if (p.norm.mean)
        run_task(task, NormalisedRows<T>{p.x, all.affine});
      else
        run_task(task, GivenPixels<T>{p.x});
    });
    all.finish();
    if (all.want_wgrad) wgrad.finish(wgrads, direct, used, pool.tasks, p.grad_conv_weight, pool);
  }

 private:
  template <class Source>
  void run_task(int task, const Source source) {
    float* own = operands[task];
    float* own_wgrads = wgrads[task];
    if (all.want_wgrad) std::fill_n(own_wgrads, wgrad.points_size(), 0.f);
    const int64_t most = products.groups.most();
    const Points y(own, most), of_dgrad(own += y_size(), most), of_wgrad(own += dgrad_size(), most);
    own += wgrad_size();
    float* const lines[2] = {own, own + lines_size() / 2};
    products.groups.for_task(tiles, pool.tasks, task, [&](TileBand band, int64_t row, int64_t rows) {
      const int64_t count = rows * band.count;
      bool finite = transform_grad(task, band, row, rows, of_dgrad, of_wgrad);
      if (all.want_wgrad) {
        finite &= transform_rows(tiles, band, row, rows, {0, slices}, p.C, source, y);
        if (finite)
          wgrad.add(of_wgrad, y, count, own_wgrads);
        else
          add_directly(task, band, row, rows, source);
      }
      if (!all.want_dgrad) return;
      const int64_t blocks = products.blocks();
      ReadAhead next_x = read_ahead(tiles, products.groups, p.x, p.C, row, rows, blocks);
      ReadAhead next_grad = read_ahead(tiles, products.groups, p.grad, p.N, row, rows, blocks);
      ReadAhead next_features =
          read_ahead(tiles, products.groups, p.features ? p.features : p.grad, p.N, row, p.features ? rows : 0, blocks);
      // What is added to comes from memory too, for this group's outputs.
      const bool adds = p.scaled && (p.grad_in || p.accumulate) && products.groups.bands == 1;
      const Rows<const T> in = !adds ? p.x : p.grad_in ? p.grad_in : Rows<const T>{p.grad_x.data, p.grad_x.pitch};
      const int64_t first = tiles.line(row) * tiles.image.width,
                    own_lines = tiles.line(row + rows - 1) + tiles.lines(row + rows - 1) - tiles.line(row);
      ReadAhead own_in(in, first, adds ? own_lines * tiles.image.width : 0, p.C, blocks);
      products.run(of_dgrad, y, count, present_slices(tiles, row, rows),
                   [&] { next_x.step(), next_grad.step(), next_features.step(), own_in.step(); });
      for (int64_t c = 0; c < p.C; c += L) {
        InputGradColumns<T> columns = all.columns(c);
        for (int64_t i = 0; i < rows; ++i) {
          if (!transform_outputs(y.at(c / L, i * band.count), band.count, lines))
            products.sum_directly(tiles, row + i, band, all.grad, c, lines);
          tiles.for_lines(row + i, band,
                          [&](int64_t line, int64_t m, int64_t pixels) { columns.add(lines[line], m, pixels); });
        }
        all.add(task, c, columns);
      }
    });
  }

  // The gradient's tiles of both products; and the bias' sums.
  bool transform_grad(int task, TileBand band, int64_t row, int64_t rows, const Points of_dgrad,
                      const Points of_wgrad) const {
    const auto centers = [&](int64_t t, int64_t n, const Vec<float>(&left)[2], const Vec<float>(&right)[2]) {
      Vec<float> a[4], b[4], v[4];
      gradient_points(left[0], left[1], a);
      gradient_points(right[0], right[1], b);
      float* to = of_wgrad.at(n / L, t);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        gradient_points(a[i], b[i], v);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store_vec(to + (4 * i + j) * L, v[j]);
      }
      if (p.grad_conv_bias) all.bias_sums.template add<float>(task, n, a[1] + b[1], Vec<float>{});
    };
    return transform_rows(tiles, band, row, rows, {0, slices}, p.N, all.grad, of_dgrad, centers);
  }

  template <class Source>
  void add_directly(int task, TileBand band, int64_t row, int64_t rows, const Source source) {
    float* own = direct[task];
    if (!used[task]) std::fill_n(own, wgrad.direct_size(), 0.f);
    used[task] = true;
    for (int64_t i = 0; i < rows; ++i) wgrad.add_directly(tiles, row + i, band, all.grad, source, own);
  }
};

template <class T, class P = Product<T>>
void bn_relu_conv3x3_backward(const BnReluConv3x3Backward<T>& p, const Pool& pool) {
  if constexpr (kHasWinograd<P>) {
    const TileRows tiles(ImageLines(p.images, p.window));
    const TileGroups groups = WinogradBackward<T>::groups(p, tiles);
    const WinogradCost cost = {tiles, p.C, p.N, pool.tasks};
    if (use_winograd(tiles, cost.backward(groups), 2 * cost.direct()))
      return WinogradBackward<T>(p, tiles, groups, pool).run();
  }
  Conv3x3Backward<T, P>(p, pool).run();
}
