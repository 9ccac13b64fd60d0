// Lines of images as operands of the 3x3 convolutions: which lines a line of outputs is made of, which of them a task
// keeps in its cache, and how they are filled.
//
// A line is a row of pixels along W. A line of outputs takes the lines (d + i, h + j) of its own image, i and j in
// -1 .. 1; in the order (n, d, h) of all lines these lie at constant distances. Lines beyond an image's border are
// zeros, as padding comes after BatchNorm and ReLU. Long lines are cut into bands, each of which brings the pixel
// before it and the one behind it.
#pragma once

struct ImageLines {
  const int64_t depth, height, width;
  const int64_t count;  // lines of all images
  const int along_depth, along_height;
  const int rows;       // of the window: 1, 3 or 9 lines that a line of outputs is made of
  const int64_t reach;  // how far before and behind a line its neighbours lie

  ImageLines(const Images& images, const int64_t (&window)[3])
      : depth(images.size[0]),
        height(images.size[1]),
        width(images.size[2]),
        count(images.batch * depth * height),
        along_depth(int(window[0])),
        along_height(int(window[1])),
        rows(along_depth * along_height),
        reach((along_depth > 1 && depth > 1 ? height : 0) + (along_height > 1 && height > 1 ? 1 : 0)) {}

  // The first line of the image that a line is of, and the first of the next one.
  int64_t image_begin(int64_t line) const { return line / (depth * height) * depth * height; }
  int64_t image_end(int64_t line) const { return image_begin(line) + depth * height; }

  // The line that the window's row i takes for a line of outputs; -1 where that lies beyond the border.
  int64_t neighbour(int64_t line, int i) const {
    const int64_t h = line % height + i % along_height - along_height / 2;
    const int64_t d = line / height % depth + i / along_height - along_depth / 2;
    if (h < 0 || h >= height || d < 0 || d >= depth) return -1;
    return image_begin(line) + d * height + h;
  }
};

constexpr int kMostWindowRows = 9;

// How the lines are worked on: in bands of `width` pixels, `lines` of a band at a time. Tasks have ranges of lines,
// band after band.
struct Stripes {
  static constexpr int64_t kMostLines = 64;
  int64_t width, bands, lines;

  // pixel_bytes: of all operands of a pixel.
  Stripes(const ImageLines& image, int64_t pixel_bytes, int tasks) {
    pixel_bytes = std::max<int64_t>(1, pixel_bytes);  // a convolution of no channels is its bias
    // Half an L2 cache of 1 MiB for what is kept; enough pixels to make loads and stores of sums and the work per
    // stripe small beside the products, and not more.
    constexpr int64_t kKeptBytes = 512 * 1024, kPixels = 224, kLeastBand = 32, kLeastPart = 8;
    const int64_t widest = std::max(kLeastBand, kKeptBytes / ((1 + 2 * image.reach) * pixel_bytes));
    bands = std::max<int64_t>(1, (image.width + widest - 1) / widest);
    // Few long lines: bands for every task.
    const int64_t wanted = (tasks + image.count - 1) / std::max<int64_t>(1, image.count);
    bands = std::max(bands, std::min(wanted, image.width / kLeastPart));
    width = (image.width + bands - 1) / bands;
    if (bands > 1) width += width % 2;  // pairs of pixels never reach into the next band
    bands = (image.width + width - 1) / width;
    const int64_t fitting = kKeptBytes / (width * pixel_bytes) - 2 * image.reach;
    lines = std::max<int64_t>(1, std::min({kPixels / width, fitting, kMostLines}));
  }

  // Calls f(band, first line, lines, whether it starts a band of the task) for a task's stripes.
  template <class F>
  void for_task(const ImageLines& image, int tasks, int task, const F& f) const {
    const Range range = part(bands * image.count, 1, tasks, task);
    for (int64_t i = range.begin; i < range.end;) {
      const int64_t band = i / image.count, line = i % image.count;
      const int64_t count = std::min({lines, image.count - line, range.end - i});
      f(Band{band * width, std::min(width, image.width - band * width)}, line, count, i == range.begin || line == 0);
      i += count;
    }
  }
  struct Band {
    int64_t begin, width;  // pixels of each line
  };
};

// Lines of a band as operands, those that a stripe and its neighbours need, in a ring: `positions` pixels each, of
// which the first is the one before the band.
template <class P>
struct LineRing {
  using Operand = typename P::Operand;
  Operand *data, *zeros;
  int64_t slots, positions, pitch;

  static int64_t positions_of(int64_t width) { return round_up(width, kRowGroup) + 2; }
  // Tiles read some pixels beyond a line's end, whose products nobody looks at.
  static constexpr int64_t kBeyond = 16;
  int64_t line_size() const { return positions * pitch; }
  int64_t size() const { return (slots * positions + kBeyond) * pitch; }
  int64_t zeros_size() const { return (positions + kBeyond) * pitch; }
  Operand* line(int64_t l) const { return data + l % slots * line_size(); }
};

// ---- filling --------------------------------------------------------------------------------------------------------
// Rows as they are, where x is normalised already.
template <class T>
struct GivenPixels {
  Rows<const T> x;
  DX_INLINE int at(int64_t) const { return 0; }
  template <class Columns>
  DX_INLINE Vec<Acc<T>> value(int, int64_t row, int64_t c, Columns columns) const {
    return columns.load(x.row(row) + c);
  }
};

// One pixel of a line of operands along its columns, or of zeros.
template <class P, class Source>
DX_INLINE void put_pixel(int64_t row, bool exists, int64_t C, const Source source, typename P::Operand* to) {
  using A = typename P::A;
  for_columns<A>(C, [&](int64_t c, auto columns) {
    P::store_along_columns(to, c, exists ? source.value(source.at(c), row, c, columns) : Vec<A>{});
  });
}

// A band of a line with the pixels before and behind it: source's row 0 is the line's first pixel.
template <class P, class Source, class Target>
DX_INLINE void fill_band(Stripes::Band band, int64_t line_width, int64_t C, const Source source, const Target target,
                         typename P::Operand* line, int64_t pitch) {
  using A = typename P::A;
  put_pixel<P>(band.begin - 1, band.begin > 0, C, source, line);
  fill_rows<A>(band.begin, band.width, round_up(band.width, kRowGroup), C, source, target);
  const int64_t end = band.begin + band.width;
  put_pixel<P>(end, end < line_width, C, source, line + (band.width + 1) * pitch);
}
