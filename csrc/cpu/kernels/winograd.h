// Winograd's F(OxO, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015, section 4): O by O
// outputs of a 3x3 convolution from (O + 2)^2 products instead of 9 O^2,
//   Y = A^T [ sum over the channels of (G w G^T) * (B^T d B) ] A,
// where d is the tile of O + 2 by O + 2 inputs around them, and * goes number by number. For each of a tile's points
// that is a product of matrices, tiles x channels. A sum has as many terms as there are channels, not nine times as
// many; the matrices A, B and G are in winograd_transforms.h.
//
// The same with the gradient: dgrad is the convolution with the window turned round, and
//   dW = G^T [ sum over the tiles of (A g A^T) * (B^T d B) ] G.
// A window of three slices along the depth is a sum of three such products, which continue one another.
//
// What is not finite would reach all outputs of a tile, and those next to it: such tiles are summed directly.
#pragma once

// How many outputs a tile has along a side; 0: products are direct ones. Numbers stored in 16 bits leave a float's sum
// room for the larger tile, a quarter of the direct products, and it is ahead of dot products of bf16, which are twice
// as fast as float's. Those can't be had for the points: B^T d B would be rounded once more. double is there for its
// digits.
template <class T, class P>
constexpr int kWinogradOutputs = sizeof(T) == 2                       ? 4
                                 : std::is_same<P, Fma<float>>::value ? 2
                                                                      : 0;

// Tiles of a product, as rows: two heights are compiled, of which the one is used that leaves fewer rows over. The
// short one of a single vector is not 8: with two multiply-adds a cycle, of four cycles each, Intel's cores would have
// all eight sums under way and wait for each number that is late.
template <int NV>
constexpr int kLongTiles = kRegisters == 32 ? (NV == 3 ? 8 : 14)
                                            : (NV == 1                              ? 6
                                               : kMostVectors * 6 + 3 <= kRegisters ? 6
                                                                                    : 4);
template <int NV>
constexpr int kShortTiles = kRegisters == 32 ? (NV == 1 ? 16 : 8) : 4;

// A stretch of tiles that lie side by side in their rows.
struct TileBand {
  int64_t begin, count;
};

// The slices of the window that lie within the volume.
struct SliceRange {
  int begin, end;
};

// Rows of tiles: each is O lines of outputs, the last one of a plane possibly fewer, and O + 2 lines of inputs.
template <int O>
struct TileRows {
  const ImageLines image;
  const int64_t across, down, count;  // tiles of a row, rows of a plane, rows of all images

  explicit TileRows(const ImageLines& image)
      : image(image),
        across((image.width + O - 1) / O),
        down((image.height + O - 1) / O),
        count(image.count / std::max<int64_t>(1, image.height) * down) {}

  int slices() const { return image.along_depth; }
  int64_t line(int64_t row) const { return row / down * image.height + row % down * O; }
  int64_t lines(int64_t row) const { return std::min<int64_t>(O, image.height - row % down * O); }
  // Calls f(line of the row, its first pixel in a band as a row of all pixels, pixels) for its lines.
  template <class F>
  DX_INLINE void for_lines(int64_t row, TileBand band, const F& f) const {
    const int64_t begin = O * band.begin, pixels = std::min(O * band.count, image.width - begin);
    for (int64_t i = 0; i < lines(row); ++i) f(i, (line(row) + i) * image.width + begin, pixels);
  }
  SliceRange present(int64_t row) const {
    const int64_t d = row / down % image.depth, half = image.along_depth / 2;
    return {int(std::max<int64_t>(0, half - d)), int(std::min<int64_t>(slices(), image.depth - d + half))};
  }
  // The line of inputs i of a row in a slice of the window, -1 beyond the border.
  int64_t input_line(int64_t row, int slice, int i) const {
    const int64_t plane = row / down, h = row % down * O - 1 + i;
    const int64_t d = plane % image.depth + slice - image.along_depth / 2;
    if (h < 0 || h >= image.height || d < 0 || d >= image.depth) return -1;
    return (plane - plane % image.depth + d) * image.height + h;
  }
};

// How tiles are worked on: `rows` rows of `band` tiles at a time; how their products' columns are cut.
template <int O>
struct TileGroups {
  int vectors = 1;  // of a block of columns
  int64_t band = 1, bands = 1, rows = 1;
  double work = 0;  // multiply-adds of vectors for each number of the inner dimension, all tiles and points

  // N: columns of the products, whose class says what they cost. tile_bytes: of all that is kept of a tile, of which
  // `kept` should fit. many: whether work of each group is saved by large ones; small ones have what they need nearer.
  template <class Products>
  static TileGroups of(const TileRows<O>& tiles, int64_t N, int64_t tile_bytes, int64_t kept, bool many) {
    constexpr int64_t kMostTiles = 112;
    const int64_t most = std::max<int64_t>(1, std::min(kMostTiles, kept / tile_bytes));
    TileGroups groups;
    groups.bands = (tiles.across + most - 1) / most;
    groups.band = (tiles.across + groups.bands - 1) / groups.bands;
    double& work = groups.work;
    for (int nv = 1; nv <= Products::kMostBlock; ++nv)
      for (int64_t r = 1; r <= std::max<int64_t>(1, std::min(most / groups.band, tiles.count)); ++r) {
        const double here = Products::work(N, nv, r * groups.band) / double(r * groups.band);
        if (work == 0 || here < (many ? 1.001 : 0.999) * work) work = here, groups.vectors = nv, groups.rows = r;
      }
    work *= double(tiles.count * tiles.across * Winograd<O>::kPoints);
    return groups;
  }
  int64_t most() const { return rows * band; }
  int64_t block() const { return vectors * kLanes<float>; }

  // Calls f(band, first row, rows) for a task's groups.
  template <class F>
  void for_task(const TileRows<O>& tiles, int tasks, int task, const F& f) const {
    const Range range = part(bands * tiles.count, 1, tasks, task);
    for (int64_t i = range.begin; i < range.end;) {
      const int64_t first = i % tiles.count, begin = i / tiles.count * band;
      const int64_t n = std::min({rows, tiles.count - first, range.end - i});
      f(TileBand{begin, std::min(band, tiles.across - begin)}, first, n);
      i += n;
    }
  }
};

// Numbers of tiles, [vectors of columns, tiles, points, lanes]: a transform reads or writes a tile's points one after
// the other, a product takes one vector of each: were their distance even, they would fall into few cache sets.
template <int O>
struct Points {
  static constexpr int64_t kTile = (Winograd<O>::kPoints + 1) * kLanes<float>;
  float* data;
  int64_t tiles;

  // Products read and write whole tiles of rows.
  static int64_t tiles_of(int64_t tiles) { return tiles + std::max(kLongTiles<1>, kShortTiles<1>) - 1; }
  static int64_t vectors_of(int64_t columns) { return padded<float>(columns) / kLanes<float>; }
  static int64_t size(int64_t tiles, int64_t vectors) { return tiles_of(tiles) * vectors * kTile; }
  Points(float* data, int64_t tiles) : data(data), tiles(tiles_of(tiles)) {}

  DX_INLINE float* at(int64_t vector, int64_t tile) const { return data + (vector * tiles + tile) * kTile; }
  // A tile's inputs at the points of row i, where products read them.
  static DX_INLINE void put(float* tile, int i, const Vec<float> (&points)[O + 2]) {
#pragma GCC unroll 8
    for (int j = 0; j < O + 2; ++j) store_vec(tile + ((O + 2) * i + j) * kLanes<float>, points[j]);
  }
};

// ---- transforms -----------------------------------------------------------------------------------------------------
// Zero, or NaN if one of the numbers was not finite.
DX_INLINE Vec<float> finite_check(Vec<float> v) { return v * Vec<float>{}; }
inline bool all_zero(Vec<float> v) {
#if DX_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0;
#else
  float numbers[kLanes<float>];
  store_vec(numbers, v);
  float sum = 0;
  for (float number : numbers) sum += number;
  return sum == 0;
#endif
}

struct NoCenters {
  template <class Pixels>
  DX_INLINE void operator()(int64_t, int64_t, const Pixels&) const {}
};

// Transforms the inputs of a row of tiles: line i's first pixel is source's row lines[i] * width, -1 beyond the border.
// The first tile is `tile` in `to`, the first vector of columns `vector`. Calls centers(tile, c, pixels) with the
// columns of pixels that a tile has for itself. Whether all inputs were finite, where that is asked for.
//
// One vector of columns goes along the whole row: what its pixels are along the height then stays in registers from a
// tile to the next, where they are enough (O = 2).
template <int O, bool kChecks, class Source, class To, class Centers>
DX_INLINE bool transform_inputs(const int64_t (&lines)[O + 2], int64_t width, TileBand band, int64_t C,
                                const Source source, const To to, int64_t vector, int64_t tile, const Centers centers) {
  constexpr int I = O + 2, L = kLanes<float>;
  constexpr bool kCenters = !std::is_same<Centers, NoCenters>::value;
  Vec<float> check = {};
  for_columns<float>(C, [&](int64_t c, auto columns) {
    const auto constants = source.at(c);
    Vec<float> u[I][I];                   // B^T along the height of a tile's columns of pixels
    Vec<float> own[kCenters ? I : 1][O];  // and the lines of outputs in them
    const auto read = [&](int64_t w, int at) __attribute__((always_inline)) {
      Vec<float> d[I] = {};
      if (w >= 0 && w < width)
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i)
          if (lines[i] >= 0) d[i] = source.value(constants, lines[i] * width + w, c, columns);
      Winograd<O>::inputs(d, u[at]);
      if constexpr (kChecks) check += finite_check(u[at][0] + u[at][I - 1]);  // every line is in one of them
      if constexpr (kCenters)
#pragma GCC unroll 4
        for (int i = 0; i < O; ++i) own[at][i] = d[1 + i];
    };
    int64_t w = O * band.begin - 1;
    read(w, O);
    read(w + 1, O + 1);
    float* out = to.at(vector + c / L, tile);
    for (int64_t t = 0; t < band.count; ++t, w += O, out += Points<O>::kTile) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {  // the last two columns of pixels are the next tile's first
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i) u[j][i] = u[O + j][i];
        if constexpr (kCenters)
#pragma GCC unroll 4
          for (int i = 0; i < O; ++i) own[j][i] = own[O + j][i];
      }
#pragma GCC unroll 4
      for (int j = 2; j < I; ++j) read(w + j, j);
#pragma GCC unroll 8
      for (int i = 0; i < I; ++i) {
        Vec<float> d[I], points[I];
#pragma GCC unroll 8
        for (int j = 0; j < I; ++j) d[j] = u[j][i];
        Winograd<O>::inputs(d, points);
        To::put(out, i, points);
      }
      if constexpr (kCenters) {
        Vec<float> pixels[O][O];
#pragma GCC unroll 4
        for (int j = 0; j < O; ++j)
#pragma GCC unroll 4
          for (int i = 0; i < O; ++i) pixels[j][i] = own[1 + j][i];
        centers(tile + t, c, pixels);
      }
    }
  });
  return all_zero(check);
}
// The slices that some of the rows from `row` on have.
template <int O>
inline SliceRange present_slices(const TileRows<O>& tiles, int64_t row, int64_t rows) {
  SliceRange all = tiles.present(row);
  for (int64_t i = 1; i < rows; ++i) {
    const SliceRange here = tiles.present(row + i);
    all = {std::min(all.begin, here.begin), std::max(all.end, here.end)};
  }
  return all;
}

// Transforms the inputs of some rows of tiles, the slices' vectors of columns one after the other: of the slices asked
// for, zeros where a row has none. centers as in transform_inputs. Whether all inputs were finite.
template <bool kChecks, int O, class Source, class To, class Centers = NoCenters>
DX_INLINE bool transform_rows(const TileRows<O>& tiles, TileBand band, int64_t row, int64_t rows, SliceRange slices,
                              int64_t C, const Source source, const To to, const Centers centers = {}) {
  const int64_t vectors = Points<O>::vectors_of(C);
  bool finite = true;
  for (int64_t i = 0; i < rows; ++i) {
    const SliceRange present = tiles.present(row + i);
    for (int slice = slices.begin; slice < slices.end; ++slice) {
      const int64_t vector = slice * vectors, tile = i * band.count;
      if (slice < present.begin || slice >= present.end) {
        for (int64_t v = vector; v < vector + vectors; ++v)
          std::fill_n(to.at(v, tile), band.count * Points<O>::kTile, 0.f);
        continue;
      }
      int64_t lines[O + 2];
      for (int j = 0; j < O + 2; ++j) lines[j] = tiles.input_line(row + i, slice, j);
      const auto transform = [&](const auto& of_slice) {
        finite &= transform_inputs<O, kChecks>(lines, tiles.image.width, band, C, source, to, vector, tile, of_slice);
      };
      if (slice == tiles.slices() / 2)
        transform(centers);
      else
        transform(NoCenters{});
    }
  }
  return finite;
}

// G w G^T of a vector of columns: load(tap) is the weight, put(i, j, v) takes what there is at the point (i, j).
template <int O, class Load, class Put>
DX_INLINE void transform_weight(const Load& load, const Put& put) {
  constexpr int I = O + 2;
  Vec<float> rows[3][I];
#pragma GCC unroll 3
  for (int h = 0; h < 3; ++h) Winograd<O>::weights({load(3 * h), load(3 * h + 1), load(3 * h + 2)}, rows[h]);
#pragma GCC unroll 8
  for (int j = 0; j < I; ++j) {
    Vec<float> w[I];
    Winograd<O>::weights({rows[0][j], rows[1][j], rows[2][j]}, w);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) put(i, j, w[i]);
  }
}

// Transforms K channels of a block of columns of the weights, packed as a direct convolution takes them, [taps, K,
// block]: G w G^T. Points lie `point` apart, slices of one `slice`.
template <int O>
inline void transform_weights(const float* taps, int64_t K, int slices, int64_t block, float* points, int64_t slice,
                              int64_t point) {
  constexpr int L = kLanes<float>, I = O + 2;
  for (int s = 0; s < slices; ++s, taps += 9 * K * block, points += slice)
    for (int64_t at = 0; at < K * block; at += L)
      transform_weight<O>([&](int tap) __attribute__((always_inline)) { return load_vec(taps + at + tap * K * block); },
                          [&](int i, int j, Vec<float> v)
                              __attribute__((always_inline)) { store_vec(points + at + (I * i + j) * point, v); });
}

// Y = A^T m A for one vector of columns of a row of tiles, of which `m` is the first: outputs[line] are `count` times O
// pixels, a vector each. Whether all of them are finite.
template <int O>
DX_INLINE bool transform_outputs(const float* m, int64_t count, float* const (&outputs)[O]) {
  constexpr int L = kLanes<float>, I = O + 2;
  Vec<float> check = {};
  for (int64_t t = 0; t < count; ++t, m += Points<O>::kTile) {
    Vec<float> lines[O][I];
#pragma GCC unroll 8
    for (int j = 0; j < I; ++j) {
      Vec<float> column[I], y[O];
#pragma GCC unroll 8
      for (int i = 0; i < I; ++i) column[i] = load_vec(m + (I * i + j) * L);
      Winograd<O>::outputs(column, y);
#pragma GCC unroll 4
      for (int i = 0; i < O; ++i) lines[i][j] = y[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < O; ++i) {
      Vec<float> y[O];
      Winograd<O>::outputs(lines[i], y);
#pragma GCC unroll 4
      for (int j = 0; j < O; ++j) {
        store_vec(outputs[i] + (O * t + j) * L, y[j]);
        check += finite_check(y[j]);
      }
    }
  }
  return all_zero(check);
}
