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
  // What is asked for before all others, instead of what was so till now.
  void set_first(const ReadAhead& first) { first_ = first; }
  DX_INLINE void step() {
    line();
    if (several_) line();
  }

 private:
  DX_INLINE void line() {
    if (first_.line() || left_ == 0) return;
    if (!reads_[left_ - 1].line()) --left_;
  }

  ReadAhead first_, reads_[4];
  int left_;
  bool several_;
};
