// Memory that a kernel asks for while it multiplies.
#pragma once

// Asks for the rows that the next panel is made of, one cache line at a time, or some in each of `steps` steps of the
// work on this one: memory is read while the processor multiplies, which waits where it is asked for many at once. The
// last vector of a row may be part of one, but a processor waits for all of its lines.
class ReadAhead {
 public:
  ReadAhead() : ReadAhead(Rows<const float>{nullptr, 0}, 0, 0, 0) {}
  template <class T>
  ReadAhead(Rows<const T> x, int64_t first, int64_t rows, int64_t C, int64_t steps = 1)
      : row_(reinterpret_cast<const char*>(x.row(first))),
        line_(line_of(row_)),
        pitch_(x.pitch * int64_t(sizeof(T))),
        bytes_(padded<Acc<T>>(C) * int64_t(sizeof(T))),
        rows_(C > 0 ? std::max<int64_t>(0, rows) : 0),
        lines_(rows_ * (bytes_ + kLine) / kLine),
        steps_(std::max<int64_t>(1, steps)) {}
  DX_INLINE void step() {
    for (due_ += lines_; due_ >= steps_; due_ -= steps_) line();
  }
  // Asks for one line; returns whether there was one left.
  DX_INLINE bool line() {
    if (rows_ == 0) return false;
    __builtin_prefetch(line_, 0, 2);
    line_ += kLine;
    if (line_ >= row_ + bytes_) row_ += pitch_, line_ = line_of(row_), --rows_;
    return true;
  }

 private:
  static constexpr int64_t kLine = 64;
  // Rows begin anywhere in a line.
  static const char* line_of(const char* p) { return p - reinterpret_cast<uintptr_t>(p) % kLine; }

  const char *row_, *line_;
  int64_t pitch_, bytes_, rows_, lines_, steps_, due_ = 0;
};

// Several of them, one after the other from the last on, a line or two at a time.
class ReadsAhead {
 public:
  template <class... Reads>
  explicit ReadsAhead(const Reads&... reads) : reads_{reads...}, left_(int(sizeof...(reads))), several_(left_ > 1) {}
  DX_INLINE void step() {
    line();
    if (several_) line();
  }

 private:
  DX_INLINE void line() {
    if (left_ == 0) return;
    if (!reads_[left_ - 1].line()) --left_;
  }

  ReadAhead reads_[4];
  int left_;
  bool several_;
};

// A rectangle of numbers that is asked for.
struct ReadRows {
  const char* data = nullptr;
  int64_t pitch = 0, bytes = 0, rows = 0;  // pitch: in bytes
  ReadRows() = default;
  // No rows of a null x.
  template <class T>
  ReadRows(Rows<const T> x, Range rows, int64_t column, int64_t columns)
      : data(x ? reinterpret_cast<const char*>(x.row(rows.begin) + column) : nullptr),
        pitch(x.pitch * int64_t(sizeof(T))),
        bytes(columns * int64_t(sizeof(T))),
        rows(x ? rows.end - rows.begin : 0) {}
};

// Where a tile's product asks for memory: a little further on in each step, so that a line is asked for several times
// where steps are many. It knows no end of the rectangle, and has no branch: one that a processor guesses wrong now and
// then would cost more than asking twice.
struct ReadCursor {
  const char* row;
  int64_t offset, pitch, bytes, stride, rows_left;
  DX_INLINE void step() {
    __builtin_prefetch(row + offset, 0, 2);
    offset += stride;
    const int64_t over = -int64_t(offset >= bytes);  // all bits or none
    row += pitch & over;
    offset &= ~over;
    rows_left += over;
  }
};

// Several rectangles, asked for one after the other from the first on, evenly over so many steps of products: what asks
// for much at once waits for places where a request can be, and so do the product's own loads.
class SpreadReads {
 public:
  template <class... Reads>
  explicit SpreadReads(int64_t steps, const Reads&... reads)
      : reads_{reads...},
        stride_(std::min(2 * kLine, ((reads.rows * (reads.bytes + kBeyond)) + ...) / std::max<int64_t>(1, steps) + 1)) {
  }
  // For a tile's product. go_on: where it has come to.
  DX_INLINE ReadCursor cursor() {
    if (cursor_.rows_left <= 0) begin_next();
    return cursor_;
  }
  DX_INLINE void go_on(const ReadCursor& cursor) { cursor_ = cursor; }

 private:
  static constexpr int kMost = 4;
  // A stride is at most two lines, as processors fetch a line's neighbour too. A row may begin anywhere in a line, so
  // it is gone along until the line of its last byte has been met, and then on average half a stride further.
  static constexpr int64_t kLine = 64, kBeyond = kLine + kLine / 2;
  void begin_next() {
    // Where nothing is left to ask for: memory that is there, since for any other a processor searches its tables.
    cursor_ = {reinterpret_cast<const char*>(this), 0, 0, 0, 0, 0};
    while (cursor_.rows_left == 0 && next_ < kMost) {
      const ReadRows& reads = reads_[next_++];
      if (reads.rows > 0) cursor_ = {reads.data, 0, reads.pitch, reads.bytes + kLine - 1, stride_, reads.rows};
    }
  }

  ReadRows reads_[kMost];
  int64_t stride_;
  ReadCursor cursor_ = {};
  int next_ = 0;
};
