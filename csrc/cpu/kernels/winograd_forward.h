// The forward pass of conv3x3.h by Winograd's products: rows of tiles are normalised and transformed on their way into
// the cache, multiplied there, and transformed back on their way into the outputs' rows.
#pragma once

template <class T, class Products>
class WinogradForward {
  static constexpr int L = kLanes<float>, O = Products::kOutputs;

  const BnReluConv3x3<T>& p;
  const Pool& pool;
  const TileRows<O> tiles;
  const int slices;
  const int64_t in_vectors, norm_size;
  Products products;
  Scratch scratch;
  TaskScratch task_scratch;
  CallWeights<float> weights;
  const Each<float> operands, strips, norms, biases;
  const TaskMoments moments;

  // What a task has: inputs, outputs, and the lines of the latter.
  int64_t in_size() const { return Points<O>::size(products.groups.most(), in_vectors); }
  int64_t out_size() const { return Points<O>::size(products.groups.most(), products.columns() / L); }
  int64_t lines_size() const { return O * O * products.groups.band * L; }
  int64_t task_size() const { return in_size() + out_size() + lines_size(); }

 public:
  static TileGroups<O> groups(const BnReluConv3x3<T>& p, const TileRows<O>& tiles) {
    constexpr int64_t kKept = 400 * 1024;
    const int64_t vectors = tiles.slices() * Points<O>::vectors_of(p.C) + Points<O>::vectors_of(p.N);
    const int64_t bytes = vectors * Points<O>::kTile * int64_t(sizeof(float));
    return TileGroups<O>::template of<Products>(tiles, p.N, bytes, kKept, false);
  }
  WinogradForward(const BnReluConv3x3<T>& p, const TileRows<O>& tiles, const TileGroups<O>& groups, const Pool& pool,
                  PackedWeights* kept)
      : p(p),
        pool(pool),
        tiles(tiles),
        slices(tiles.slices()),
        in_vectors(slices * Points<O>::vectors_of(p.C)),
        norm_size(p.norm.mean ? p.C : 0),
        products(groups, p.C, p.N, slices, p.weight),
        scratch(CallWeights<float>::bytes(kept, products.points_size())),
        task_scratch(pool.tasks, Scratch::bytes<float>(task_size()) +
                                     CallWeights<float>::task_bytes(kept, products.points_size()) +
                                     Scratch::bytes<float>(products.strip_size()) + Affine<float>::bytes(norm_size) +
                                     Scratch::bytes<float>(Conv3x3Output<T>::bias_size(p.N)) + TaskMoments::bytes(p.N)),
        weights(scratch, task_scratch, kept,
                {Products::kForm, slices, Winograd<O>::kPoints, L, products.points_size(), groups.vectors},
                products.points_size()),
        operands(task_scratch.take<float>(task_size())),
        strips(task_scratch.take<float>(products.strip_size())),
        norms(task_scratch.take<float>(Affine<float>::size(norm_size))),
        biases(task_scratch.take<float>(Conv3x3Output<T>::bias_size(p.N))),
        moments(task_scratch, pool.tasks, p.N) {}

  void run() {
    weights.write(pool, [&](float* to, int task, int tasks) {
      products.transform(part(p.C, products.kStrip, tasks, task), strips[task], to);
    });
    pool.run([&](int task) {
      if (p.norm.mean)
        run_task(task, NormalisedRows<T>{p.x, Affine<float>(norms[task], p.norm, p.C)});
      else
        run_task(task, GivenPixels<T>{p.x});
    });
    if (p.out_mean) moments.finish(p.N, p.out_mean, p.out_var);
  }

 private:
  template <class Source>
  void run_task(int task, const Source source) const {
    float* own = operands[task];
    const float* points = weights.of_task(task, [&](float* to) { products.transform({0, p.C}, strips[task], to); });
    const int64_t most = products.groups.most();
    const typename Products::Inputs in(own, most);
    const Points<O> out(own += in_size(), most);
    own += out_size();
    float* lines[O];
    for (int i = 0; i < O; ++i) lines[i] = own + i * (lines_size() / O);
    MomentsSum sum = moments.begin(task);
    const Conv3x3Output<T> output(biases[task], p);
    products.groups.for_task(tiles, pool.tasks, task, [&](TileBand band, int64_t row, int64_t rows) {
      const SliceRange present = present_slices(tiles, row, rows);
      transform_rows<false>(tiles, band, row, rows, present, p.C, source, in);
      ReadsAhead ahead(own_lines(tiles, products.groups, Rows<const T>{p.out.data, p.out.pitch}, p.N, row, rows),
                       read_ahead(tiles, products.groups, p.x, p.C, row, rows));
      products.run(points, in, out, rows * band.count, present, ahead);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t n = 0; n < p.N; n += L) {
          if (!products.outputs(out, n, i * band.count, band.count, lines))
            products.sum_directly(tiles, row + i, band, source, n, lines);
          tiles.for_lines(row + i, band, [&](int64_t line, int64_t m, int64_t pixels) {
            output.template write<1>(n, lines[line], 0, m, pixels);
          });
        }
        if (p.out_mean && products.groups.bands == 1)
          sum.add_panel(p.out.row(tiles.line(row + i) * tiles.image.width), p.out.pitch,
                        tiles.lines(row + i) * tiles.image.width, p.N);
        else if (p.out_mean)
          tiles.for_lines(row + i, band, [&](int64_t, int64_t m, int64_t pixels) {
            sum.add_panel(p.out.row(m), p.out.pitch, pixels, p.N);
          });
      }
    });
  }
};

// Runs by these products where an estimate says that they are faster than P's; returns whether it does.
template <class Products, class P, class T>
bool run_products(const BnReluConv3x3<T>& p, const Pool& pool, PackedWeights* kept) {
  constexpr int O = Products::kOutputs;
  using Forward = WinogradForward<T, Products>;
  const TileRows<O> tiles(ImageLines(p.images, p.window));
  const TileGroups<O> groups = Forward::groups(p, tiles);
  const WinogradCost<O> cost = {tiles, p.C, p.N, pool.tasks};
  const double direct = cost.template direct<P>(Products::kPixelCycles);
  if (!use_winograd(tiles, cost.forward(groups, kept != nullptr), direct)) return false;
  Forward(p, tiles, groups, pool, kept).run();
  return true;
}
template <int O, class P, class T>
bool run_winograd(const BnReluConv3x3<T>& p, const Pool& pool, PackedWeights* kept) {
#if DX_VECTOR_BYTES == 64
  if constexpr (O == LaneProducts::kOutputs)
    if (LaneProducts::pays(p.N)) return run_products<LaneProducts, P>(p, pool, kept);
#endif
  return run_products<PointProducts<O>, P>(p, pool, kept);
}

template <class T, class P = Product<T>>
void bn_relu_conv3x3(const BnReluConv3x3<T>& p, const Pool& pool, PackedWeights* kept) {
  constexpr int O = kWinogradOutputs<T, P>;
  if constexpr (O > 0)
    if (run_winograd<O, P>(p, pool, kept)) return;
  Conv3x3Forward<T, P>(p, pool, kept).run();
}
