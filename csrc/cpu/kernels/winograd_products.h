// The products of Winograd's points with the weights, and where they are worth their transforms.
#pragma once

// out[j, tile] = sum over the inner dimension of in[.., tile] * weights for NV vectors of columns of all tiles; `in`
// and `out` begin at a point of their first vectors. Each of `slices` has K channels.
template <int O, int R, int NV>
__attribute__((noinline)) void point_product(int64_t tiles, int64_t slices, int64_t K, const float* in,
                                             int64_t in_vector, const float* weights, float* out, int64_t out_vector,
                                             ReadsAhead& ahead) {
  constexpr int L = kLanes<float>;
  for (int64_t t = 0; t < tiles; t += R) {
    Vec<float> acc[R][NV];
    set_zero<float>(acc);
    const float *a = in + t * Points<O>::kTile, *b = weights;
    for (int64_t slice = 0; slice < slices; ++slice)
      for (int64_t k0 = 0; k0 < K; k0 += L, a += in_vector)
        for (int64_t k = 0; k < std::min<int64_t>(L, K - k0); ++k, b += NV * L) {
          if (k % 2 == 0) ahead.step();                                 // often enough
          if (k < R) prefetch<1>(a, in_vector + k * Points<O>::kTile);  // a tile's next numbers lie far behind
          Vec<float> right[NV];
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) right[j] = load_vec(b + j * L);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            const float left = a[r * Points<O>::kTile + k];
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) acc[r][j] += left * right[j];
          }
        }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) store_vec(out + j * out_vector + (t + r) * Points<O>::kTile, acc[r][j]);
  }
}

// What the products of one pass have in common, whatever lies in a vector's lanes: the inner dimension is made of the
// slices' K channels.
template <int O>
struct TileProducts {
  static constexpr int kOutputs = O;
  static constexpr int64_t kStrip = 16;  // channels that are packed at a time, to be transformed from the first cache
  TileGroups<O> groups;
  int64_t K, N;
  int slices;
  Taps<const float> weight;  // its `input` is the inner dimension

  TileProducts(const TileGroups<O>& groups, int64_t K, int64_t N, int slices, Taps<const float> weight)
      : groups(groups), K(K), N(N), slices(slices), weight(weight) {}

  // One vector of columns, from n on, of a row of tiles without Winograd's sums, which numbers that are not finite
  // would spread in: outputs as in transform_outputs.
  template <class Source>
  __attribute__((noinline)) void sum_directly(const TileRows<O>& tiles, int64_t row, TileBand band, const Source source,
                                              int64_t n, float* const (&outputs)[O]) const {
    constexpr int L = kLanes<float>;
    const int64_t width = tiles.image.width, columns = std::min<int64_t>(L, N - n);
    for (int64_t i = 0; i < tiles.lines(row); ++i)
      for (int64_t w = O * band.begin; w < std::min(width, O * (band.begin + band.count)); ++w) {
        Vec<float> sum = {};
        for (int tap = 0; tap < slices * 9; ++tap) {
          const int64_t line = tiles.input_line(row, tap / 9, int(i) + tap / 3 % 3), pixel = w + tap % 3 - 1;
          if (line < 0 || pixel < 0 || pixel >= width) continue;
          for_columns<float>(K, [&](int64_t k, auto of_k) {
            float values[L], weights[L] = {};
            store_vec(values, source.value(source.at(k), line * width + pixel, k, of_k));
            for (int64_t j = 0; j < std::min<int64_t>(L, K - k); ++j) {
              const float* from = weight.data + n * weight.output + (k + j) * weight.input + tap * weight.tap;
              for (int64_t c = 0; c < columns; ++c) weights[c] = from[c * weight.output];
              sum += values[j] * load_vec(weights);
            }
          });
        }
        store_vec(outputs[i] + (w - O * band.begin) * L, sum);
      }
  }
};

// A product for each point: the lanes are columns, in blocks of vectors.
template <int O>
struct PointProducts : TileProducts<O> {
  using Inputs = Points<O>;
  using Base = TileProducts<O>;
  using Base::groups, Base::K, Base::N, Base::slices, Base::weight, Base::kStrip;
  static constexpr int kMostBlock = kMostVectors;
  static constexpr int kForm = 3;            // of packed weights
  static constexpr double kPixelCycles = 0;  // of direct sums, beside which these are estimated

  PointProducts(const TileGroups<O>& groups, int64_t K, int64_t N, int slices, Taps<const float> weight,
                bool backwards = false)
      : Base(groups, K, N, slices, weight) {
    if (backwards) {  // the window turned round
      this->weight.data += (slices * 9 - 1) * weight.tap;
      this->weight.tap = -weight.tap;
    }
  }

  // Tiles that a product of blocks of so many vectors takes.
  static int64_t covered(int64_t tiles, int vectors) {
    if (vectors == 1) return std::min(round_up(tiles, kLongTiles<1>), round_up(tiles, kShortTiles<1>));
    if (vectors == 2) return std::min(round_up(tiles, kLongTiles<2>), round_up(tiles, kShortTiles<2>));
    return std::min(round_up(tiles, kLongTiles<3>), round_up(tiles, kShortTiles<3>));
  }
  // Multiply-adds of vectors for a number of the inner dimension and a point of so many tiles.
  static double work(int64_t N, int vectors, int64_t tiles) {
    const double columns = double(round_up(N, vectors * kLanes<float>) / kLanes<float>);
    const double loads = 1 + 0.15 / vectors;  // of numbers of the left operand
    return columns * loads * double(covered(tiles, vectors));
  }
  int64_t columns() const { return round_up(N, groups.block()); }
  // Of a block at one point, with a vector more: of an even number of channels that makes an odd number of vectors, so
  // that all points of a weight, which the transform writes after each other, don't fall into one set of a cache.
  int64_t point_size() const { return slices * K * groups.block() + kLanes<float>; }
  int64_t block_size() const { return Winograd<O>::kPoints * point_size(); }
  int64_t points_size() const { return columns() / groups.block() * block_size(); }
  int64_t strip_size() const { return groups.block() * kStrip * slices * 9; }

  // Transforms some channels of the inner dimension, a multiple of kStrip from `begin` on. strip: of strip_size().
  void transform(Range range, float* strip, float* points) const {
    const int64_t block = groups.block();
    for (int64_t k = range.begin; k < range.end; k += kStrip) {
      const int64_t channels = std::min(kStrip, range.end - k);
      Taps<const float> from = weight;
      from.data += k * weight.input;
      for (int64_t n = 0; n < N; n += block, from.data += block * weight.output) {
        const Packing<Fma<float>> packing = {from, channels, N - n, slices * 9, channels, strip};
        packing.block(0, block, 0, channels);
        transform_weights<O>(strip, channels, slices, block, points + n / block * block_size() + k * block, K * block,
                             point_size());
      }
    }
  }

  // out = in * points for so many tiles, of some slices alone. Products take whole tiles of rows, so that zeros are
  // put behind the last one.
  void run(const float* points, const Points<O> in, const Points<O> out, int64_t tiles, SliceRange range,
           ReadsAhead& ahead) const {
    const int64_t vectors = Points<O>::vectors_of(K), beyond = covered(tiles, groups.vectors) - tiles;
    for (int64_t v = range.begin * vectors; v < range.end * vectors; ++v)
      std::fill_n(in.at(v, tiles), beyond * Points<O>::kTile, 0.f);
    if (groups.vectors == 1) run_blocks<1>(points, in, out, tiles, range, ahead);
    if (groups.vectors == 2) run_blocks<2>(points, in, out, tiles, range, ahead);
    if constexpr (kMostVectors == 3)
      if (groups.vectors == 3) run_blocks<3>(points, in, out, tiles, range, ahead);
  }

  // The outputs of a row of tiles as transform_outputs has them: `tile` is the first, n the first column of a vector.
  bool outputs(const Points<O> out, int64_t n, int64_t tile, int64_t count, float* const (&lines)[O]) const {
    return transform_outputs<O>(out.at(n / kLanes<float>, tile), count, lines);
  }

 private:
  template <int NV>
  void run_blocks(const float* points, const Points<O> in, const Points<O> out, int64_t tiles, SliceRange range,
                  ReadsAhead& ahead) const {
    constexpr int kLong = kLongTiles<NV>, kShort = kShortTiles<NV>;
    const auto product =
        round_up(tiles, kLong) <= round_up(tiles, kShort) ? point_product<O, kLong, NV> : point_product<O, kShort, NV>;
    constexpr int L = kLanes<float>;
    const int64_t block = groups.block(), vectors = Points<O>::vectors_of(K);
    for (int64_t n = 0; n < N; n += block)
      for (int p = 0; p < Winograd<O>::kPoints; ++p) {
        const float* weights = points + n / block * block_size() + p * point_size() + range.begin * K * block;
        product(tiles, range.end - range.begin, K, in.at(range.begin * vectors, 0) + p * L, in.tiles * Points<O>::kTile,
                weights, out.at(n / L, 0) + p * L, out.tiles * Points<O>::kTile, ahead);
      }
  }
};

// The lines that the next group is made of, where they lie behind each other in memory.
template <int O, class T>
inline ReadAhead read_ahead(const TileRows<O>& tiles, const TileGroups<O>& groups, Rows<const T> x, int64_t C,
                            int64_t row, int64_t rows) {
  const ImageLines& image = tiles.image;
  const int64_t first = std::min(tiles.line(row) + O * rows + image.reach, image.count - 1);
  const int64_t lines = groups.bands == 1 ? std::min(O * rows, image.count - first) : 0;
  return ReadAhead(x, first * image.width, lines * image.width, C);
}
// Those that this group's outputs go to, or are added to.
template <int O, class T>
inline ReadAhead own_lines(const TileRows<O>& tiles, const TileGroups<O>& groups, Rows<const T> x, int64_t C,
                           int64_t row, int64_t rows) {
  const int64_t first = tiles.line(row), last = row + rows - 1;
  const int64_t lines = groups.bands == 1 && rows > 0 ? tiles.line(last) + tiles.lines(last) - first : 0;
  return ReadAhead(x, first * tiles.image.width, lines * tiles.image.width, C);
}

// ---- which --------------------------------------------------------------------------------------------------------
// An estimate of cycles, fitted to what `python -m benchmarks.conv3x3` measured: a multiply-add of vectors is one.
template <int O>
struct WinogradCost {
  using W = Winograd<O>;
  const TileRows<O>& tiles;
  int64_t C, N;
  int tasks;

  double vectors(int64_t columns) const { return double(Points<O>::vectors_of(columns)); }
  double tile_count() const { return double(tiles.count * tiles.across); }
  // Tasks wait for the one that has the most.
  double spread(int64_t units) const {
    return units < tasks ? 1.0 : double((units + tasks - 1) / tasks * tasks) / double(units);
  }
  // per_pixel: what reading and writing it costs beside its products.
  template <class P>
  double direct(double per_pixel) const {
    const double pixels = double(tiles.image.count * tiles.image.width), columns = vectors(N);
    const double turned = P::kDepth > 1 ? 1.5 : 1.15;  // beside half as many products it counts twice
    const double lanes = C >= 16 ? turned * double(std::min(round_up(N, 8), round_up(N, 12))) / kLanes<float> : columns;
    const double products = 1.08 * 9 * tiles.slices() * double(depth_steps<P>(C)) * std::min(columns, lanes);
    return pixels * (products + per_pixel) * spread(tiles.image.count);
  }
  // packed: weights are transformed already, or will be for other calls.
  double forward(const TileGroups<O>& groups, bool packed) const {
    const double inner = double(tiles.slices() * C);
    const double transforms = W::kInputCycles * tiles.slices() * vectors(C) + W::kOutputCycles * vectors(N);
    return (groups.work * inner + tile_count() * transforms) * spread(groups.bands * tiles.count) +
           (packed ? 0 : W::kWeightCycles * inner * vectors(N) * tasks);
  }
  double backward(const TileGroups<O>& groups) const {
    const double wgrad = double(W::kPoints * N) * tiles.slices() * vectors(C);
    const double inputs = tiles.slices() * (vectors(C) + vectors(N)) + vectors(N);
    const double transforms = 1.5 * (W::kInputCycles * inputs + W::kOutputCycles * vectors(C));  // from memory
    return (groups.work * double(tiles.slices() * N) + tile_count() * (wgrad + transforms)) *
               spread(groups.bands * tiles.count) +
           2 * W::kWeightCycles * double(tiles.slices() * N) * vectors(C) * tasks;
  }
};

template <int O>
inline bool use_winograd(const TileRows<O>& tiles, double winograd, double direct) {
  if (tiles.image.along_height == 1 || winograd_use() == WinogradUse::kNever) return false;
  return winograd_use() == WinogradUse::kAlways || winograd < direct;
}
