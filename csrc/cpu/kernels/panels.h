// Panels: rows in the form of an operand, normalised or not, as many as fit the caches; and how tasks share rows and
// columns.
#pragma once

// The distance of a panel's rows, with room for whole tiles and vectors: an odd number of vectors, as rows of a
// power-of-two distance would all fall into the same cache sets.
template <class A>
inline int64_t panel_pitch(int64_t operands) {
  const int64_t vectors = (round_up(operands, kRowUnit) + kLanes<A> - 1) / kLanes<A>;
  return (vectors | 1) * kLanes<A>;
}

// Rows of a panel of so many bytes a row: whole tiles, a quarter of an L2 cache of 1 MiB, and at most 96 steps of an
// inner dimension of rows, of which 48 columns of a right operand then fit an L1 cache.
template <class P>
inline int64_t panel_rows(int64_t row_bytes) {
  constexpr int64_t kPanelBytes = 256 * 1024, kMostRows = 96 * P::kDepth;
  static_assert(kMostRows % kRowUnit == 0, "panels are made of whole tiles");
  return std::max<int64_t>(kRowUnit, std::min(kMostRows, kPanelBytes / row_bytes / kRowUnit * kRowUnit));
}

// The same of two panels that are multiplied and filled by turns; at most an eighth of a task's rows, since nothing is
// multiplied while the first one is filled.
template <class P>
inline int64_t panel_rows_by_turns(int64_t row_bytes, int64_t rows) {
  const int64_t eighth = std::max<int64_t>(kRowUnit, (rows / 8 + kRowUnit - 1) / kRowUnit * kRowUnit);
  return std::min(eighth, panel_rows<P>(2 * row_bytes));
}

// Rows that a panel is filled by at a time, so that what belongs to a column is loaded once for all of them.
constexpr int kRowGroup = kRowUnit % 4 == 0 ? 4 : 2;
static_assert(kRowUnit % kRowGroup == 0, "panels are made of whole groups");

// Calls target.put(row, c, v) for every group of `whole` rows and vector of columns, with v[i] = source.value(
// source.at(c), first + row + i, c, columns), zero beyond `rows`. Source and target come by value: what they point to
// is then known not to change by the stores.
template <class A, class Source, class Target>
DX_INLINE void fill_rows(int64_t first, int64_t rows, int64_t whole, int64_t C, const Source source,
                         const Target target) {
  for (int64_t row = 0; row < whole; row += kRowGroup)
    for_columns<A>(C, [&](int64_t c, auto columns) {
      const auto constants = source.at(c);
      Vec<A> v[kRowGroup];
      if (row + kRowGroup <= rows)
#pragma GCC unroll 4
        for (int i = 0; i < kRowGroup; ++i) v[i] = source.value(constants, first + row + i, c, columns);
      else
        for (int i = 0; i < kRowGroup; ++i)
          v[i] = row + i < rows ? source.value(constants, first + row + i, c, columns) : Vec<A>{};
      target.put(row, c, v);
    });
}
// Fills a panel up to the next whole tile.
template <class A, class Source, class Target>
DX_INLINE void fill_panel(int64_t rows, int64_t C, const Source source, const Target target) {
  fill_rows<A>(0, rows, round_up(rows, kRowUnit), C, source, target);
}

// y = relu(bn(x)), from the first row and column of x on.
template <class T>
struct NormalisedRows {
  using A = Acc<T>;
  Rows<const T> x;
  Affine<A> norm;
  DX_INLINE auto at(int64_t c) const { return norm.at(c); }
  template <class Columns>
  DX_INLINE Vec<A> value(const typename Affine<A>::Columns& at, int64_t row, int64_t c, Columns columns) const {
    return relu<A>(at(columns.load(x.row(row) + c)));
  }
};

// A panel's rows as an operand whose inner dimension is the columns, or the rows.
template <class P>
struct AlongColumns {
  typename P::Operand* data;
  int64_t pitch;
  DX_INLINE void put(int64_t row, int64_t c, const Vec<typename P::A> (&v)[kRowGroup]) const {
#pragma GCC unroll 4
    for (int i = 0; i < kRowGroup; ++i) P::store_along_columns(data + (row + i) * pitch, c, v[i]);
  }
};

template <class P>
struct AlongRows {
  typename P::Operand* data;
  int64_t pitch;  // of kDepth rows
  DX_INLINE void put(int64_t row, int64_t c, const Vec<typename P::A> (&v)[kRowGroup]) const {
#pragma GCC unroll 4
    for (int i = 0; i < kRowGroup; i += P::kDepth) P::store_along_rows(data + (row + i) / P::kDepth * pitch, c, v + i);
  }
};

// ---- tasks ----------------------------------------------------------------------------------------------------------
// Tasks as a grid: each has a range of rows and a range of columns. Where rows are many they alone are split, as every
// range of columns repeats the work of the prologue.
struct Grid {
  int rows, columns;
  Range row_range(int task, int64_t M) const { return part(M, kTileRows<kMostVectors>, rows, task / columns); }
  template <class A>
  Range column_range(int task, int64_t C) const {
    return part(C, kLanes<A>, columns, task % columns);
  }
};
// prologue: the work on a row that a range of columns repeats, in vectors of columns.
template <class A>
inline Grid make_grid(int tasks, int64_t M, int64_t C, double prologue) {
  const int64_t tiles = (M + kTileRows<kMostVectors> - 1) / kTileRows<kMostVectors>;
  const int64_t vectors = (C + kLanes<A> - 1) / kLanes<A>;
  Grid best = {tasks, 1};
  double least = 0;
  for (int columns = 1; columns <= tasks; ++columns) {
    if (tasks % columns) continue;
    const int rows = tasks / columns;
    const double work = double((tiles + rows - 1) / rows) * (double((vectors + columns - 1) / columns) + prologue);
    if (columns == 1 || work < least) least = work, best = {rows, columns};
  }
  return best;
}
