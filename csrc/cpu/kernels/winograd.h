// Winograd's F(2x2, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015, section 4.1): two
// by two outputs of a 3x3 convolution from 16 products instead of 36,
//   Y = A^T [ sum over the channels of (G w G^T) * (B^T d B) ] A,
// where d is the tile of four by four inputs around them, and * goes number by number. For each of the 16 points that
// is a product of matrices, tiles x channels. Only additions, and halves of the weights, stand around the products, and
// a sum has as many terms as there are channels, not nine times as many: its error is about that of the sum itself.
//
// The same with the gradient: dgrad is the convolution with the window turned round, and
//   dW = G^T [ sum over the tiles of (A g A^T) * (B^T d B) ] G.
// A window of three slices along the depth is a sum of three such products, which continue one another.
//
// What is not finite would reach all four outputs of a tile, and those next to it: such tiles are summed directly.
#pragma once

// Multiplied in the arithmetic type, as float: of pairs of bf16 the sums B^T d B would be rounded once more, and double
// is there for its digits.
template <class P>
constexpr bool kHasWinograd = std::is_same<P, Fma<float>>::value;

constexpr int kPoints = 16;

// Tiles of a product, as rows: two heights are compiled, of which the one is used that leaves fewer rows over.
template <int NV>
constexpr int kLongTiles = kRegisters == 32 ? (NV == 3 ? 8 : 14)
                                            : (NV == 1                              ? 6
                                               : kMostVectors * 6 + 3 <= kRegisters ? 6
                                                                                    : 4);
template <int NV>
constexpr int kShortTiles = kRegisters == 32 ? 8 : 4;

// A stretch of tiles that lie side by side in their rows.
struct TileBand {
  int64_t begin, count;
};

// The slices of the window that lie within the volume.
struct SliceRange {
  int begin, end;
};

// Rows of tiles: each is two lines of outputs, the last one of a plane possibly one, and four lines of inputs.
struct TileRows {
  const ImageLines image;
  const int64_t across, down, count;  // tiles of a row, rows of a plane, rows of all images

  explicit TileRows(const ImageLines& image)
      : image(image),
        across((image.width + 1) / 2),
        down((image.height + 1) / 2),
        count(image.count / std::max<int64_t>(1, image.height) * down) {}

  int slices() const { return image.along_depth; }
  int64_t line(int64_t row) const { return row / down * image.height + row % down * 2; }
  int64_t lines(int64_t row) const { return std::min<int64_t>(2, image.height - row % down * 2); }
  // Calls f(line of the row, its first pixel in a band as a row of all pixels, pixels) for its lines.
  template <class F>
  DX_INLINE void for_lines(int64_t row, TileBand band, const F& f) const {
    const int64_t begin = 2 * band.begin, pixels = std::min(2 * band.count, image.width - begin);
    for (int64_t i = 0; i < lines(row); ++i) f(i, (line(row) + i) * image.width + begin, pixels);
  }
  SliceRange present(int64_t row) const {
    const int64_t d = row / down % image.depth, half = image.along_depth / 2;
    return {int(std::max<int64_t>(0, half - d)), int(std::min<int64_t>(slices(), image.depth - d + half))};
  }
  // The line of inputs i of a row in a slice of the window, -1 beyond the border.
  int64_t input_line(int64_t row, int slice, int i) const {
    const int64_t plane = row / down, h = row % down * 2 - 1 + i;
    const int64_t d = plane % image.depth + slice - image.along_depth / 2;
    if (h < 0 || h >= image.height || d < 0 || d >= image.depth) return -1;
    return (plane - plane % image.depth + d) * image.height + h;
  }
};

// How tiles are worked on: `rows` rows of `band` tiles at a time; how their products' columns are cut.
struct TileGroups {
  int vectors = 1;  // of a block of columns
  int64_t band = 1, bands = 1, rows = 1;
  double work = 0;  // multiply-adds of vectors for each number of the inner dimension, all tiles and points

  // N: columns of the product. tile_bytes: of all that is kept of a tile, of which `kept` should fit. many: whether
  // work of each group is saved by large ones; small ones have what they need nearer.
  TileGroups(const TileRows& tiles, int64_t N, int64_t tile_bytes, int64_t kept, bool many) {
    constexpr int64_t kMostTiles = 112;
    const int64_t most = std::max<int64_t>(1, std::min(kMostTiles, kept / tile_bytes));
    bands = (tiles.across + most - 1) / most;
    band = (tiles.across + bands - 1) / bands;
    for (int nv = 1; nv <= kMostVectors; ++nv)
      for (int64_t r = 1; r <= std::max<int64_t>(1, std::min(most / band, tiles.count)); ++r) {
        const double columns = double(round_up(N, nv * kLanes<float>) / kLanes<float>);
        const double loads = 1 + 0.15 / nv;  // of numbers of the left operand
        const double here = columns * loads * double(covered(r * band, nv)) / double(r * band);
        if (work == 0 || here < (many ? 1.001 : 0.999) * work) work = here, vectors = nv, rows = r;
      }
    work *= double(tiles.count * tiles.across * kPoints);
  }
  int64_t most() const { return rows * band; }
  int64_t block() const { return vectors * kLanes<float>; }

  // Tiles that a product of blocks of so many vectors takes.
  static int64_t covered(int64_t tiles, int vectors) {
    if (vectors == 1) return std::min(round_up(tiles, kLongTiles<1>), round_up(tiles, kShortTiles<1>));
    if (vectors == 2) return std::min(round_up(tiles, kLongTiles<2>), round_up(tiles, kShortTiles<2>));
    return std::min(round_up(tiles, kLongTiles<3>), round_up(tiles, kShortTiles<3>));
  }

  // Calls f(band, first row, rows) for a task's groups.
  template <class F>
  void for_task(const TileRows& tiles, int tasks, int task, const F& f) const {
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
// the other, a product takes every 17th vector: were it every 16th, they would all fall into the same few cache sets.
struct Points {
  static constexpr int64_t kTile = (kPoints + 1) * kLanes<float>;
  float* data;
  int64_t tiles;

  // Products read and write whole tiles of rows.
  static int64_t tiles_of(int64_t tiles) { return tiles + kLongTiles<1> - 1; }
  static int64_t vectors_of(int64_t columns) { return padded<float>(columns) / kLanes<float>; }
  static int64_t size(int64_t tiles, int64_t vectors) { return tiles_of(tiles) * vectors * kTile; }
  Points(float* data, int64_t tiles) : data(data), tiles(tiles_of(tiles)) {}

  DX_INLINE float* at(int64_t vector, int64_t tile) const { return data + (vector * tiles + tile) * kTile; }
};

// ---- transforms -----------------------------------------------------------------------------------------------------
// B^T along one dimension.
DX_INLINE void input_points(const Vec<float> (&d)[4], Vec<float> (&u)[4]) {
  u[0] = d[0] - d[2];
  u[1] = d[1] + d[2];
  u[2] = d[2] - d[1];
  u[3] = d[1] - d[3];
}
// A along one dimension.
DX_INLINE void gradient_points(Vec<float> g0, Vec<float> g1, Vec<float> (&v)[4]) {
  v[0] = g0;
  v[1] = g0 + g1;
  v[2] = g0 - g1;
  v[3] = -g1;
}

// Zero, or NaN if one of the numbers was not finite.
DX_INLINE Vec<float> finite_check(Vec<float> v) { return v * Vec<float>{}; }
inline bool all_zero(Vec<float> v) {
  float numbers[kLanes<float>];
  store_vec(numbers, v);
  float sum = 0;
  for (float number : numbers) sum += number;
  return sum == 0;
}

// Transforms the inputs of a row of tiles: line i's first pixel is source's row lines[i] * width, -1 beyond the border.
// The first tile is `tile` in `to`, the first vector of columns `vector`. Calls centers(tile, c, left, right) with the
// two by two pixels that a tile has for itself. Whether all inputs were finite.
template <class Source, class Centers>
DX_INLINE bool transform_inputs(const int64_t (&lines)[4], int64_t width, TileBand band, int64_t C, const Source source,
                                const Points to, int64_t vector, int64_t tile, const Centers centers) {
  bool finite = true;
  for_columns<float>(C, [&](int64_t c, auto columns) {
    const auto constants = source.at(c);
    Vec<float> check = {};
    Vec<float> own[4][2];  // of neighbouring columns of pixels: those of the two lines of outputs
    Vec<float> u[4][4];    // and of all four lines, B^T along the height
    const auto read = [&](int64_t w, int at) {
      Vec<float> d[4] = {};
      if (w >= 0 && w < width)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          if (lines[i] >= 0) {
            d[i] = source.value(constants, lines[i] * width + w, c, columns);
            check += finite_check(d[i]);
          }
      own[at][0] = d[1];
      own[at][1] = d[2];
      input_points(d, u[at]);
    };
    read(2 * band.begin - 1, 0);
    read(2 * band.begin, 1);
    float* out = to.at(vector + c / kLanes<float>, tile);
    for (int64_t t = 0; t < band.count; ++t, out += Points::kTile) {
      read(2 * (band.begin + t) + 1, 2);
      read(2 * (band.begin + t) + 2, 3);
      centers(tile + t, c, own[1], own[2]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vec<float> d[4] = {u[0][i], u[1][i], u[2][i], u[3][i]};
        Vec<float> v[4];
        input_points(d, v);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store_vec(out + (4 * i + j) * kLanes<float>, v[j]);
        u[0][i] = u[2][i];
        u[1][i] = u[3][i];
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) own[1][i] = own[3][i];
    }
    finite &= all_zero(check);
  });
  return finite;
}
struct NoCenters {
  DX_INLINE void operator()(int64_t, int64_t, const Vec<float> (&)[2], const Vec<float> (&)[2]) const {}
};

// The slices that some of the rows from `row` on have.
inline SliceRange present_slices(const TileRows& tiles, int64_t row, int64_t rows) {
  SliceRange all = tiles.present(row);
  for (int64_t i = 1; i < rows; ++i) {
    const SliceRange here = tiles.present(row + i);
    all = {std::min(all.begin, here.begin), std::max(all.end, here.end)};
  }
  return all;
}

// Transforms the inputs of some rows of tiles, the slices' vectors of columns one after the other: of the slices asked
// for, zeros where a row has none. centers as in transform_inputs. Whether all inputs were finite.
template <class Source, class Centers = NoCenters>
DX_INLINE bool transform_rows(const TileRows& tiles, TileBand band, int64_t row, int64_t rows, SliceRange slices,
                              int64_t C, const Source source, const Points to, const Centers centers = {}) {
  const int64_t vectors = Points::vectors_of(C);
  bool finite = true;
  for (int64_t i = 0; i < rows; ++i) {
    const SliceRange present = tiles.present(row + i);
    for (int slice = slices.begin; slice < slices.end; ++slice) {
      const int64_t vector = slice * vectors, tile = i * band.count;
      if (slice < present.begin || slice >= present.end) {
        for (int64_t v = vector; v < vector + vectors; ++v)
          std::fill_n(to.at(v, tile), band.count * Points::kTile, 0.f);
        continue;
      }
      int64_t lines[4];
      for (int j = 0; j < 4; ++j) lines[j] = tiles.input_line(row + i, slice, j);
      const bool middle = slice == tiles.slices() / 2;
      finite &= transform_inputs(lines, tiles.image.width, band, C, source, to, vector, tile,
                                 [&](int64_t t, int64_t c, const auto& left, const auto& right) {
                                   if (middle) centers(t, c, left, right);
                                 });
    }
  }
  return finite;
}

// Transforms K channels of a block of columns of the weights, packed as a direct convolution takes them, [taps, K,
// block], into [points, slices, all channels, block]: G w G^T, with G = [1 0 0; 1/2 1/2 1/2; 1/2 -1/2 1/2; 0 0 1].
inline void transform_weights(const float* taps, int64_t K, int slices, int64_t block, float* points,
                              int64_t channels) {
  constexpr int L = kLanes<float>;
  const auto along = [](Vec<float> a, Vec<float> b, Vec<float> c, Vec<float>(&to)[4]) {
    const Vec<float> half = broadcast(0.5f), ends = (a + c) * half, middle = b * half;
    to[0] = a;
    to[1] = ends + middle;
    to[2] = ends - middle;
    to[3] = c;
  };
  for (int slice = 0; slice < slices; ++slice)
    for (int64_t i = 0; i < K * block; i += L) {
      const float* from = taps + slice * 9 * K * block + i;
      float* to = points + slice * channels * block + i;
      Vec<float> rows[3][4], w[4];
      for (int h = 0; h < 3; ++h) {
        const float* row = from + h * 3 * K * block;
        along(load_vec(row), load_vec(row + K * block), load_vec(row + 2 * K * block), rows[h]);
      }
      for (int j = 0; j < 4; ++j) {
        along(rows[0][j], rows[1][j], rows[2][j], w);
        for (int h = 0; h < 4; ++h) store_vec(to + (4 * h + j) * slices * channels * block, w[h]);
      }
    }
}

// Y = A^T m A for one vector of columns of a row of tiles, of which `m` is the first: outputs[line] are `count` pairs
// of pixels, a vector each. Whether all of them are finite.
DX_INLINE bool transform_outputs(const float* m, int64_t count, float* const (&outputs)[2]) {
  constexpr int L = kLanes<float>;
  Vec<float> check = {};
  for (int64_t t = 0; t < count; ++t, m += Points::kTile) {
    Vec<float> upper[4], lower[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec<float> a = load_vec(m + j * L), b = load_vec(m + (4 + j) * L), c = load_vec(m + (8 + j) * L),
                       d = load_vec(m + (12 + j) * L);
      upper[j] = a + b + c;
      lower[j] = b - c - d;
    }
    const Vec<float> y[2][2] = {{upper[0] + upper[1] + upper[2], upper[1] - upper[2] - upper[3]},
                                {lower[0] + lower[1] + lower[2], lower[1] - lower[2] - lower[3]}};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        store_vec(outputs[i] + (2 * t + j) * L, y[i][j]);
        check += finite_check(y[i][j]);
      }
  }
  return all_zero(check);
}
