// The backward pass of conv3x3_backward.h by Winograd's products. Rows of tiles of the gradient are transformed twice:
// with the tiles around them for dgrad, alone for wgrad; those of the inputs as in the forward pass.
#pragma once

// sums[r, j] += sum over the tiles of v[tile, r] * u[j, tile] for R rows and NV vectors of columns of one point.
template <int O, int R, int NV>
__attribute__((noinline)) void point_wgrad(int64_t tiles, const float* v, const float* u, int64_t u_vector, float* sums,
                                           int64_t pitch) {
  constexpr int L = kLanes<float>;
  Vec<float> acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[r][j] = load_vec(sums + r * pitch + j * L);
  for (int64_t t = 0; t < tiles; ++t, v += Points<O>::kTile, u += Points<O>::kTile) {
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

// Each task's sums: of the products over its tiles, [points, N, slices * C], rows and columns rounded up; and wgrad's
// own, [taps, N, C], which tiles that are summed directly go to at once.
template <int O>
class WinogradWgrad {
  static constexpr int L = kLanes<float>;

 public:
  int64_t N, C;
  int slices;

  int64_t rows() const { return padded<float>(N); }
  int64_t slice_pitch() const { return padded<float>(C); }
  int64_t pitch() const { return slices * slice_pitch(); }
  int64_t points_size() const { return Winograd<O>::kPoints * rows() * pitch(); }
  int64_t taps_size() const { return slices * 9 * N * slice_pitch(); }

  // Rows of a tile of wgrad's products: of one vector of v.
  static constexpr int kRows = kLongRows == 8 ? 8 : 4;

  // sums += v^T * u for so many tiles.
  void add(const Points<O> v, const Points<O> u, int64_t tiles, float* sums) const {
    for (int p = 0; p < Winograd<O>::kPoints; ++p)
      for (int64_t n = 0; n < N; n += L) {
        const int64_t width = std::min<int64_t>(L, N - n);
        const bool shorter = kRows == 8 && (width <= 6 || (width > 8 && width <= 12));
        const int64_t step = shorter ? 6 : kRows;
        for_column_blocks<float>(0, pitch(), [&](int64_t c, auto vectors) {
          constexpr int NV = decltype(vectors)::value;
          const auto tile = shorter ? point_wgrad<O, 6, NV> : point_wgrad<O, kRows, NV>;
          for (int64_t r = 0; r < width; r += step)
            tile(tiles, v.at(n / L, 0) + p * L + r, u.at(c / L, 0) + p * L, u.tiles * Points<O>::kTile,
                 sums + (p * rows() + n + r) * pitch() + c, pitch());
        });
      }
  }

  // The same of the pixels of a row of tiles, as a direct convolution has them.
  template <class Grad, class Source>
  __attribute__((noinline)) void add_directly(const TileRows<O>& tiles, int64_t row, TileBand band, const Grad grad,
                                              const Source source, float* taps) const {
    const int64_t width = tiles.image.width;
    tiles.for_lines(row, band, [&](int64_t i, int64_t m, int64_t pixels) {
      for (int64_t w = 0; w < pixels; ++w)
        for (int tap = 0; tap < slices * 9; ++tap) {
          const int64_t line = tiles.input_line(row, tap / 9, int(i) + tap / 3 % 3);
          const int64_t pixel = O * band.begin + w + tap % 3 - 1;
          if (line < 0 || pixel < 0 || pixel >= width) continue;
          for_columns<float>(N, [&](int64_t n, auto columns) {
            float g[L];
            store_vec(g, grad.value(grad.at(n), m + w, n, columns));
            for (int64_t j = 0; j < std::min<int64_t>(L, N - n); ++j)
              for_columns<float>(C, [&](int64_t c, auto of_c) {
                float* to = taps + (tap * N + n + j) * slice_pitch() + c;
                store_vec(to, load_vec(to) + g[j] * source.value(source.at(c), line * width + pixel, c, of_c));
              });
          });
        }
    });
  }

  // taps += G^T m G of the products' sums m.
  void turn_back(const float* points, float* taps) const {
    constexpr int I = O + 2;
    for (int64_t n = 0; n < N; ++n)
      for (int slice = 0; slice < slices; ++slice)
        for (int64_t c = 0; c < C; c += L) {
          const float* from = points + n * pitch() + slice * slice_pitch() + c;
          Vec<float> half_way[I][3];
#pragma GCC unroll 8
          for (int i = 0; i < I; ++i) {
            Vec<float> m[I];
#pragma GCC unroll 8
            for (int j = 0; j < I; ++j) m[j] = load_vec(from + (I * i + j) * rows() * pitch());
            Winograd<O>::taps(m, half_way[i]);
          }
#pragma GCC unroll 3
          for (int j = 0; j < 3; ++j) {
            Vec<float> m[I], column[3];
#pragma GCC unroll 8
            for (int i = 0; i < I; ++i) m[i] = half_way[i][j];
            Winograd<O>::taps(m, column);
#pragma GCC unroll 3
            for (int i = 0; i < 3; ++i) {
              float* to = taps + ((slice * 9 + 3 * i + j) * N + n) * slice_pitch() + c;
              store_vec(to, load_vec(to) + column[i]);
            }
          }
        }
  }

  // Adds up the tasks' sums in their order.
  void finish(const Each<float> taps, int tasks, const Taps<float> to, const Pool& pool) const {
    pool.run([&](int task) {
      const Range channels = part(N, 1, pool.tasks, task);
      for (int64_t n = channels.begin; n < channels.end; ++n)
        for (int tap = 0; tap < slices * 9; ++tap)
          for (int64_t c = 0; c < C; c += L) {
            Vec<float> sum = {};
            for (int i = 0; i < tasks; ++i) sum += load_vec(taps[i] + (tap * N + n) * slice_pitch() + c);
            alignas(64) float numbers[L];
            store_vec(numbers, sum);
            float* out = to.data + n * to.output + c * to.input + tap * to.tap;
            for (int64_t i = 0; i < std::min<int64_t>(L, C - c); ++i) out[i * to.input] = numbers[i];
          }
    });
  }
};

template <class T, int O>
class WinogradBackward {
  static constexpr int L = kLanes<float>;

  const BnReluConv3x3Backward<T>& p;
  const Pool& pool;
  const TileRows<O> tiles;
  const int slices;
  PointProducts<O> products;  // of dgrad
  const WinogradWgrad<O> wgrad;
  const int64_t y_vectors;  // of the inputs, or of dgrad's outputs, which follow them
  Scratch scratch;
  TaskScratch task_scratch;
  const Conv3x3Gradients<T> all;
  CallWeights<float> weights;
  const Each<float> operands, wgrads, taps, strips;

  // What a task has: inputs or outputs, the gradient for dgrad and for wgrad, and the lines of outputs.
  int64_t size_of(int64_t vectors) const { return Points<O>::size(products.groups.most(), vectors); }
  int64_t y_size() const { return size_of(y_vectors); }
  int64_t dgrad_size() const { return size_of(slices * Points<O>::vectors_of(p.N)); }
  int64_t wgrad_size() const { return size_of(Points<O>::vectors_of(p.N)); }
  int64_t lines_size() const { return O * O * products.groups.band * L; }
  int64_t task_size() const { return y_size() + dgrad_size() + wgrad_size() + lines_size(); }

 public:
  static TileGroups<O> groups(const BnReluConv3x3Backward<T>& p, const TileRows<O>& tiles) {
    constexpr int64_t kKept = 1024 * 1024;  // wgrad's sums are loaded and stored once a group
    const int64_t vectors =
        tiles.slices() * Points<O>::vectors_of(p.C) + (tiles.slices() + 1) * Points<O>::vectors_of(p.N);
    const int64_t bytes = vectors * Points<O>::kTile * int64_t(sizeof(float));
    return TileGroups<O>::template of<PointProducts<O>>(tiles, p.C, bytes, kKept, true);
  }
  WinogradBackward(const BnReluConv3x3Backward<T>& p, const TileRows<O>& tiles, const TileGroups<O>& groups,
                   const Pool& pool)
      : p(p),
        pool(pool),
        tiles(tiles),
        slices(tiles.slices()),
        products(groups, p.N, p.C, tiles.slices(), {p.weight.data, p.weight.input, p.weight.output, p.weight.tap},
                 true),
        wgrad{p.N, p.C, slices},
        y_vectors(std::max(slices * Points<O>::vectors_of(p.C), products.columns() / L)),
        scratch(Conv3x3Gradients<T>::bytes(p, pool.tasks) + CallWeights<float>::bytes(nullptr, products.points_size())),
        task_scratch(pool.tasks, Scratch::bytes<float>(task_size()) + Scratch::bytes<float>(wgrad.points_size()) +
                                     Scratch::bytes<float>(wgrad.taps_size()) +
                                     CallWeights<float>::task_bytes(nullptr, products.points_size()) +
                                     Scratch::bytes<float>(products.strip_size())),
        all(scratch, p, pool.tasks),
        weights(scratch, task_scratch, nullptr, {}, products.points_size()),
        operands(task_scratch.take<float>(task_size())),
        wgrads(task_scratch.take<float>(wgrad.points_size())),
        taps(task_scratch.take<float>(wgrad.taps_size())),
        strips(task_scratch.take<float>(products.strip_size())) {}

  void run() {
    if (all.want_dgrad)
      weights.write(pool, [&](float* to, int task, int tasks) {
        products.transform(part(p.N, products.kStrip, tasks, task), strips[task], to);
      });
    pool.run([&](int task) {
      if (p.norm.mean)
        run_task(task, NormalisedRows<T>{p.x, all.affine});
      else
        run_task(task, GivenPixels<T>{p.x});
    });
    all.finish();
    if (all.want_wgrad) wgrad.finish(taps, pool.tasks, p.grad_conv_weight, pool);
  }

 private:
  template <class Source>
  void run_task(int task, const Source source) {
    float* own = operands[task];
    float* own_wgrads = wgrads[task];
    if (all.want_wgrad) {
      std::fill_n(own_wgrads, wgrad.points_size(), 0.f);
      std::fill_n(taps[task], wgrad.taps_size(), 0.f);
    }
    const float* points = nullptr;
    if (all.want_dgrad)
      points = weights.of_task(task, [&](float* to) { products.transform({0, p.N}, strips[task], to); });
    const int64_t most = products.groups.most();
    const Points<O> y(own, most), of_dgrad(own += y_size(), most), of_wgrad(own += dgrad_size(), most);
    own += wgrad_size();
    float* lines[O];
    for (int i = 0; i < O; ++i) lines[i] = own + i * (lines_size() / O);
    products.groups.for_task(tiles, pool.tasks, task, [&](TileBand band, int64_t row, int64_t rows) {
      const int64_t count = rows * band.count;
      bool finite = transform_grad(task, band, row, rows, of_dgrad, of_wgrad);
      if (all.want_wgrad) {
        finite &= transform_rows<true>(tiles, band, row, rows, {0, slices}, p.C, source, y);
        if (finite)
          wgrad.add(of_wgrad, y, count, own_wgrads);
        else
          add_directly(task, band, row, rows, source);
      }
      if (!all.want_dgrad) return;
      const auto& groups = products.groups;
      const Rows<const T> out = {p.grad_x.data, p.grad_x.pitch}, in = p.scaled && p.grad_in ? p.grad_in : out;
      ReadsAhead ahead(own_lines(tiles, groups, in ? in : p.x, p.C, row, in ? rows : 0),
                       read_ahead(tiles, groups, p.x, p.C, row, rows),
                       read_ahead(tiles, groups, p.grad, p.N, row, rows),
                       read_ahead(tiles, groups, p.features ? p.features : p.grad, p.N, row, p.features ? rows : 0));
      products.run(points, of_dgrad, y, count, present_slices(tiles, row, rows), ahead);
      for (int64_t c = 0; c < p.C; c += L) {
        InputGradColumns<T> columns = all.columns(c);
        for (int64_t i = 0; i < rows; ++i) {
          if (!transform_outputs<O>(y.at(c / L, i * band.count), band.count, lines))
            products.sum_directly(tiles, row + i, band, all.grad, c, lines);
          tiles.for_lines(row + i, band,
                          [&](int64_t line, int64_t m, int64_t pixels) { columns.add(lines[line], m, pixels); });
        }
        all.add(task, c, columns);
      }
    });
    if (all.want_wgrad) wgrad.turn_back(own_wgrads, taps[task]);
  }

  // The gradient's tiles of both products; and the bias' sums.
  bool transform_grad(int task, TileBand band, int64_t row, int64_t rows, const Points<O> of_dgrad,
                      const Points<O> of_wgrad) const {
    const auto centers = [&](int64_t t, int64_t n, const auto& pixels) {
      constexpr int I = O + 2;
      Vec<float> columns[O][I];
#pragma GCC unroll 4
      for (int j = 0; j < O; ++j) Winograd<O>::gradients(pixels[j], columns[j]);
      float* to = of_wgrad.at(n / L, t);
#pragma GCC unroll 8
      for (int i = 0; i < I; ++i) {
        Vec<float> line[O], v[I];
#pragma GCC unroll 4
        for (int j = 0; j < O; ++j) line[j] = columns[j][i];
        Winograd<O>::gradients(line, v);
#pragma GCC unroll 8
        for (int j = 0; j < I; ++j) store_vec(to + (I * i + j) * L, v[j]);
      }
      if (!p.grad_conv_bias) return;
      Vec<float> sum = columns[0][1];  // at the point 1
      for (int j = 1; j < O; ++j) sum += columns[j][1];
      all.bias_sums.template add<float>(task, n, sum, Vec<float>{});
    };
    return transform_rows<true>(tiles, band, row, rows, {0, slices}, p.N, all.grad, of_dgrad, centers);
  }

  template <class Source>
  void add_directly(int task, TileBand band, int64_t row, int64_t rows, const Source source) {
    for (int64_t i = 0; i < rows; ++i) wgrad.add_directly(tiles, row + i, band, all.grad, source, taps[task]);
  }
};

template <class T, class P = Product<T>>
void bn_relu_conv3x3_backward(const BnReluConv3x3Backward<T>& p, const Pool& pool) {
  constexpr int O = kWinogradOutputs<T, P>;
  if constexpr (O > 0) {
    const TileRows<O> tiles(ImageLines(p.images, p.window));
    const TileGroups<O> groups = WinogradBackward<T, O>::groups(p, tiles);
    const WinogradCost<O> cost = {tiles, p.C, p.N, pool.tasks};
    if (use_winograd(tiles, cost.backward(groups), 2 * cost.template direct<P>(0)))
      return WinogradBackward<T, O>(p, tiles, groups, pool).run();
  }
  Conv3x3Backward<T, P>(p, pool).run();
}
