// Per-channel sums that are exact enough to be taken once and the same from run to run: float within a panel of rows
// that lies in the cache, double across panels, tasks merged in their order.
#pragma once

constexpr int kPanelRows = 64;
// For which memory is asked where work goes row by row: the processor's own prefetching loses its way at the ends of
// pages, and where rows are short parts of wider ones.
constexpr int64_t kRowsAhead = 16;

// Mean and squared deviations. A panel's mean is taken first, then the deviations from it (corrected by what the
// rounded mean missed); panels are merged by Chan's formula, so a large mean costs no digits.
struct MomentsSum {
  int64_t* count;
  double *mean, *m2;  // [C]

  MomentsSum from(int64_t c) const { return {count, mean + c, m2 + c}; }

  // Adds a panel of at most a few hundred rows, which the caller has just written or which fits the cache.
  template <class T>
  void add_panel(const T* x, int64_t pitch, int64_t rows, int64_t C) {
    using A = Acc<T>;
    if (rows == 0) return;
    const double before = double(*count), per_row = 1.0 / double(rows), share = double(rows) / (before + double(rows));
    const double weight = before * share;
    for_column_stretches<A, 8>(C, [&](int64_t c, auto columns, auto vectors) {
      constexpr int NV = decltype(vectors)::value, L = kLanes<A>;
      Vec<A> center[NV] = {}, rest[NV] = {}, square[NV] = {};
      for (int64_t m = 0; m < rows; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) center[j] += columns.load(x + m * pitch + c + j * L);
      for (int j = 0; j < NV; ++j) center[j] /= A(rows);
      for (int64_t m = 0; m < rows; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) {
          const Vec<A> d = columns.load(x + m * pitch + c + j * L) - center[j];
          rest[j] += d;
          square[j] += d * d;
        }
      for (int j = 0; j < NV; ++j)
        merge_channels<A>(c + j * L, int(std::min<int64_t>(L, C - c - j * L)), center[j], rest[j], square[j], per_row,
                          share, weight);
    });
    *count += rows;
  }

 private:
  // The panel's mean is center + rest / rows, its squared deviations square - rest^2 / rows. This is merge() of
  // common.h with what all channels have in common taken once.
  template <class A>
  DX_INLINE void merge_channels(int64_t c, int n, Vec<A> center, Vec<A> rest, Vec<A> square, double per_row,
                                double share, double weight) {
    alignas(64) A centers[kLanes<A>], rests[kLanes<A>], squares[kLanes<A>];
    store_vec(centers, center);
    store_vec(rests, rest);
    store_vec(squares, square);
    for (int i = 0; i < n; ++i) {
      const double missed = is_finite(centers[i]) ? double(rests[i]) * per_row : 0.0;
      const double panel_mean = double(centers[i]) + missed, delta = panel_mean - mean[c + i];
      mean[c + i] = is_finite(delta) ? mean[c + i] + delta * share : mean[c + i] + panel_mean;
      m2[c + i] += double(squares[i]) - double(rests[i]) * missed + delta * (delta * weight);  // no inf * 0
    }
  }
};

class TaskMoments {
 public:
  // Of each task.
  static size_t bytes(int64_t C) { return Scratch::bytes<double>(2 * padded<double>(C)) + Scratch::bytes<int64_t>(1); }
  TaskMoments(TaskScratch& scratch, int tasks, int64_t C)
      : tasks_(tasks),
        Cp_(padded<double>(C)),
        data_(scratch.take<double>(2 * Cp_)),
        counts_(scratch.take<int64_t>(1)) {}
  MomentsSum operator[](int i) const { return {counts_[i], data_[i], data_[i] + Cp_}; }
  // A task's, of no rows yet: each task has to begin its own.
  MomentsSum begin(int task) const {
    std::fill_n(data_[task], 2 * Cp_, 0.0);
    *counts_[task] = 0;
    return (*this)[task];
  }

  template <class A>
  void finish(int64_t C, A* mean, A* var) const {
    finish({0, C}, 0, 1, mean, var);
  }
  // Merges what the tasks first, first + step, ... have of a range of channels.
  template <class A>
  void finish(Range channels, int first, int step, A* mean, A* var) const {
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      Moments<double> all = {0, 0, 0};
      for (int i = first; i < tasks_; i += step)
        all = merge(all, Moments<double>{double(*counts_[i]), (*this)[i].mean[c], (*this)[i].m2[c]});
      mean[c] = A(all.mean);
      var[c] = A(all.m2 / all.count);
    }
  }

 private:
  int tasks_;
  int64_t Cp_;
  Each<double> data_;
  Each<int64_t> counts_;
};

// The two sums of a BatchNorm's backward pass: sum(dy) and sum(dy (x - mean)).
class TaskSums {
 public:
  static size_t bytes(int tasks, int64_t C) { return Scratch::bytes<double>(2 * tasks * padded<double>(C)); }
  TaskSums(Scratch& scratch, int tasks, int64_t C)
      : tasks_(tasks), Cp_(padded<double>(C)), data_(scratch.take<double>(2 * tasks * Cp_)) {
    std::fill_n(data_, 2 * tasks * Cp_, 0.0);
  }
  // Adds what one panel (or one line of pixels) gave to a vector of columns. Lanes beyond C must hold zeros or be
  // padding.
  template <class A>
  DX_INLINE void add(int task, int64_t c, Vec<A> dy, Vec<A> dy_xc) const {
    alignas(64) A a[kLanes<A>], b[kLanes<A>];
    store_vec(a, dy);
    store_vec(b, dy_xc);
    double *sum = data_ + 2 * task * Cp_ + c, *sum_xc = sum + Cp_;
    const int n = int(std::min<int64_t>(kLanes<A>, Cp_ - c));
    for (int i = 0; i < n; ++i) sum[i] += double(a[i]), sum_xc[i] += double(b[i]);
  }
  double dy(int64_t c) const { return total(0, c); }
  double dy_xc(int64_t c) const { return total(1, c); }

  // grad_bias = sum dy,  grad_weight = r sum dy (x - mean)
  template <class A>
  void finish(int64_t C, const A* rstd, A* grad_weight, A* grad_bias) const {
    for (int64_t c = 0; c < C; ++c) {
      grad_bias[c] = A(dy(c));
      grad_weight[c] = A(double(rstd[c]) * dy_xc(c));
    }
  }

 private:
  double total(int which, int64_t c) const {
    double sum = 0;
    for (int i = 0; i < tasks_; ++i) sum += data_[(2 * i + which) * Cp_ + c];
    return sum;
  }
  int tasks_;
  int64_t Cp_;
  double* data_;
};

// Sums of all columns over a few rows, on their way to TaskSums; they lie in the first cache.
template <class A>
class RowSums {
 public:
  static size_t bytes(int tasks, int64_t C) { return Scratch::bytes<A>(2 * tasks * padded<A>(C)); }
  RowSums(Scratch& scratch, int tasks, int64_t C) : Cp_(padded<A>(C)), data_(scratch.take<A>(2 * tasks * Cp_)) {}
  RowSums of_task(int task) const {
    RowSums own = *this;
    own.data_ += 2 * task * Cp_;
    return own;
  }
  void clear() const { std::fill_n(data_, 2 * Cp_, A(0)); }
  // Adds a vector of columns of N rows.
  template <int N>
  DX_INLINE void add(int64_t c, const Vec<A> (&dy)[N], const Vec<A> (&xc)[N]) const {
    Vec<A> sum = load_vec(data_ + c), sum_xc = load_vec(data_ + Cp_ + c);
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
      sum += dy[i];
      sum_xc += dy[i] * xc[i];
    }
    store_vec(data_ + c, sum);
    store_vec(data_ + Cp_ + c, sum_xc);
  }
  void flush(const TaskSums& sums, int task) const {
    for (int64_t c = 0; c < Cp_; c += kLanes<A>) sums.add<A>(task, c, load_vec(data_ + c), load_vec(data_ + Cp_ + c));
  }

 private:
  int64_t Cp_;
  A* data_;
};

// Runs f(first row, rows) over the panels of a range.
template <class F>
DX_INLINE void for_panels(Range range, int64_t panel, const F& f) {
  for (int64_t m = range.begin; m < range.end; m += panel) f(m, std::min(panel, range.end - m));
}
