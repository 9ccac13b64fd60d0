// The backward pass of z = relu(bn(x)) @ W^T in one pass over x and G: for each panel of rows
//   dz    (through norm2 and its ReLU, when grad_out is the gradient behind them)
// and in it for each block of columns
//   y   = relu(bn(x))                           recomputed
//   dW += dz^T @ y                              one sum per task
//   dy  = (dz @ W) masked by bn(x) > 0          never stored
//   G   = s * dy + (G | grad_in | 0),  sum(dy),  sum(dy (x - m))
#pragma once

// What one task works on: dz of a panel of rows, and y of the same rows and one block of columns, which stays in the
// first cache for all output channels. dz is an operand twice: of dgrad along its columns (the inner dimension is N),
// of wgrad along its rows (the inner dimension is M). Where an operand is a single number the two are the same.
template <class T, class P>
struct BackwardPanels {
  using A = Acc<T>;
  using Operand = typename P::Operand;
  static constexpr bool kSame = P::kDepth == 1;

  int64_t dz_pitch, dz_rows_pitch, rows, wgrad_rows;
  int64_t y_size, dz_size, dz_rows_size, wgrad_size;

  // C: the columns of the task that has most, in whole vectors.
  BackwardPanels(int64_t C, int64_t N, bool want_wgrad)
      : dz_pitch(panel_pitch<A>(kSame ? N : depth_steps<P>(N))),
        dz_rows_pitch(panel_pitch<A>(N)),
        rows(panel_rows<P>(dz_rows_pitch / P::kDepth * int64_t(sizeof(Operand)))),
        wgrad_rows(round_up(N, kRowUnit)),
        y_size(want_wgrad ? rows / P::kDepth * kMostVectors * kLanes<A> : 0),
        dz_size(rows * dz_pitch),
        dz_rows_size(want_wgrad && !kSame ? rows / P::kDepth * dz_rows_pitch : 0),
        wgrad_size(want_wgrad ? wgrad_rows * C : 0) {}
  int64_t operands() const { return y_size + dz_size + dz_rows_size; }
};

// dz behind norm2 and its ReLU; and as it is given.
template <class T>
struct DzRows {
  using A = Acc<T>;
  Rows<const T> grad, z;
  NormBackward<A> norm;
  DX_INLINE auto at(int64_t c) const { return norm.at(c); }
  template <class Columns>
  DX_INLINE Vec<A> value(const typename NormBackward<A>::Columns& at, int64_t row, int64_t c, Columns columns) const {
    return at(columns.load(z.row(row) + c), columns.load(grad.row(row) + c));
  }
};
template <class T>
struct GivenRows {
  Rows<const T> grad;
  DX_INLINE int at(int64_t) const { return 0; }
  template <class Columns>
  DX_INLINE Vec<Acc<T>> value(int, int64_t row, int64_t c, Columns columns) const {
    return columns.load(grad.row(row) + c);
  }
};
template <class P>
struct DzPanel {
  AlongColumns<P> of_dgrad;
  AlongRows<P> of_wgrad;
  bool both;
  DX_INLINE void put(int64_t row, int64_t c, const Vec<typename P::A> (&v)[kRowGroup]) const {
    of_dgrad.put(row, c, v);
    if (both) of_wgrad.put(row, c, v);
  }
};

// dW[i, c] += sum over the panel's rows of dz[row, i] * y[row, c] for a block of columns; a tile's rows are output
// channels here. first: nothing has been added yet, and the block's memory is not read.
template <class P, int NV>
DX_INLINE void add_wgrad(int64_t N, int64_t steps, AlongRows<P> dz, const typename P::Operand* y, typename P::A* wgrad,
                         bool first, SpreadReads& ahead) {
  using A = typename P::A;
  constexpr int R = kTileRows<NV>, L = kLanes<A>;
  for (int64_t i = 0; i < N; i += R, wgrad += R * NV * L) {
    Vec<A> acc[R][NV];
    ReadCursor reads = ahead.cursor();
    tile_product<P, NV, 1, 0>(steps, dz.data + i, 1, dz.pitch, y, NV * L, acc, reads);
    ahead.go_on(reads);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        A* w = wgrad + (r * NV + j) * L;
        store_vec(w, first ? acc[r][j] : load_vec(w) + acc[r][j]);
      }
  }
}

// What the products of a panel ask for on the way: the next panel; or, where a panel is so wide that its x and what is
// added to would lie too long in the second cache, where the products' operands are, the columns that follow.
template <class T>
struct PanelReads {
  Rows<const T> x, in, z, grad;  // x, in: from the task's first column on; in, z: or null
  Range rows, next;              // of the panel and of the one behind it
  int64_t C, N;

  PanelReads(const BnReluConv1x1Backward<T>& p, Rows<const T> in, Range columns, Range rows, Range next)
      : x{p.x.data + columns.begin, p.x.pitch},
        in{in ? in.data + columns.begin : nullptr, in.pitch},
        z(p.z),
        grad(p.grad_out),
        rows(rows),
        next(next),
        C(columns.end - columns.begin),
        N(p.N) {}
  bool wide() const {
    constexpr int64_t kWideBytes = 256 * 1024;
    return (rows.end - rows.begin) * C * int64_t(sizeof(T)) > kWideBytes;
  }
  // The next panel, beside so many steps.
  SpreadReads of_panel(int64_t steps) const {
    return SpreadReads(steps, ReadRows(grad, next, 0, N), ReadRows(z, next, 0, N), ReadRows(x, next, 0, C),
                       ReadRows(in, next, 0, C));
  }
  // Beside the product of `width` columns from c on: an equal share of the next panel's dz, and the columns that
  // follow.
  SpreadReads of_block(int64_t steps, int64_t c, int64_t width) const {
    const int64_t count = next.end - next.begin, end = std::min(c + width, C);
    const Range share = {next.begin + count * c / C, next.begin + count * end / C};
    const Range of_columns = end < C ? rows : next;
    const int64_t column = end < C ? end : 0, columns = std::min(width, C - column);
    return SpreadReads(steps, ReadRows(grad, share, 0, N), ReadRows(z, share, 0, N),
                       ReadRows(x, of_columns, column, columns), ReadRows(in, of_columns, column, columns));
  }
};

// What follows dz @ W for one vector of columns: the mask, the two sums, and s * dy into G. Pointers are members of
// their own (not looked up in the arguments), as a store through them could otherwise change the arguments for the
// compiler.
template <class T>
struct DgradColumns {
  using A = Acc<T>;
  const T *x, *in;  // in: what grad_x is added to, or null
  T* out;
  int64_t x_pitch, in_pitch, out_pitch;
  int width;  // columns of this vector that exist
  typename Affine<A>::Columns norm;
  Vec<A> sum, sum_xc;

  DgradColumns() = default;
  DgradColumns(const BnReluConv1x1Backward<T>& p, Rows<const T> in, const Affine<A>& affine, int64_t m0, int64_t c)
      : x(p.x.row(m0) + c),
        in(in ? in.row(m0) + c : nullptr),
        out(p.grad_x.row(m0) + c),
        x_pitch(p.x.pitch),
        in_pitch(in.pitch),
        out_pitch(p.grad_x.pitch),
        width(int(std::min<int64_t>(kLanes<A>, p.C - c))),
        norm(affine.at(c)),
        sum{},
        sum_xc{} {}

  DX_INLINE void add_tile(const A (*tile)[kLanes<A>], int64_t r0, int64_t rows) {
    if (width == kLanes<A>)
      add_tile(tile, r0, rows, Whole{});
    else
      add_tile(tile, r0, rows, Part{width});
  }
  template <class Columns>
  DX_INLINE void add_tile(const A (*tile)[kLanes<A>], int64_t r0, int64_t rows, Columns columns) {
    Vec<A> s = sum, s_xc = sum_xc;
    const T *x_row = x + r0 * x_pitch, *in_row = in ? in + r0 * in_pitch : nullptr;
    T* out_row = out + r0 * out_pitch;
    for (int64_t r = 0; r < rows; ++r, x_row += x_pitch, in_row += in ? in_pitch : 0, out_row += out_pitch) {
      const Vec<A> xc = columns.load(x_row) - norm.mean;
      const Vec<A> dy = relu_mask<A>(norm.of_centered(xc), load_vec(tile[r]));
      s += dy;
      s_xc += dy * xc;
      Vec<A> g = dy * norm.scale;
      if (in) g += columns.load(in_row);
      columns.store(out_row, g);
    }
    sum = s;
    sum_xc = s_xc;
  }
};

// Tiles of NV vectors that so many rows take.
template <int NV>
inline int64_t tiles(int64_t rows) {
  return (rows + kTileRows<NV> - 1) / kTileRows<NV>;
}

template <class T, class P = Product<T>>
void bn_relu_conv1x1_backward(const BnReluConv1x1Backward<T>& p, const Pool& pool) {
  using A = Acc<T>;
  using Operand = typename P::Operand;
  using Panels = BackwardPanels<T, P>;
  constexpr int L = kLanes<A>;
  const bool want_wgrad = p.grad_conv_weight != nullptr;
  const Grid grid = make_grid<A>(pool.tasks, p.M, p.C, 0.5);
  const Range widest = grid.template column_range<A>(grid.columns - 1, p.C);
  const Panels panels(round_up(widest.end - widest.begin, L), p.N, want_wgrad);
  const int64_t steps = depth_steps<P>(p.N);
  const int64_t packed_count = packed_size<P>(p.N, p.C);
  Scratch scratch(Affine<A>::bytes(p.C) + NormBackward<A>::bytes(p.N) +
                  CallWeights<Operand>::bytes(nullptr, packed_count) + TaskSums::bytes(grid.rows, p.C));
  TaskScratch task_scratch(pool.tasks, Scratch::bytes<Operand>(panels.operands()) +
                                           Scratch::bytes<A>(panels.wgrad_size) +
                                           CallWeights<Operand>::task_bytes(nullptr, packed_count));
  const Affine<A> affine(scratch, p.norm, p.C);
  // Without z there is no norm2 to go through; an all-zero stand-in keeps one code path.
  const NormBackward<A> norm2(scratch, p.z ? p.z_norm : Norm<A>{p.norm.mean, p.norm.var, nullptr, nullptr, 1.0},
                              p.z_grad_weight, p.z_grad_bias, p.M, p.z ? p.N : 0);
  CallWeights<Operand> weights(scratch, task_scratch, nullptr, {}, packed_count);
  const RightPacking<P> packing = {p.weight, p.N, p.C, p.C, 1, grid.columns};
  const Each<Operand> operands = task_scratch.take<Operand>(panels.operands());
  const Each<A> wgrads = task_scratch.take<A>(panels.wgrad_size);
  const TaskSums sums(scratch, grid.rows, p.C);
  weights.write(pool, [&](Operand* to, int task, int tasks) { packing.share(to, task, tasks); });

  const Rows<const T> in =
      p.grad_in ? p.grad_in : Rows<const T>{p.accumulate ? p.grad_x.data : nullptr, p.grad_x.pitch};

  pool.run([&](int task) {
    const Range all = grid.row_range(task, p.M), range = grid.template column_range<A>(task, p.C);
    Operand *own = operands[task], *y = own;
    const Operand* packed = weights.of_task(task, [&](Operand* to) { packing.columns(to, task % grid.columns); });
    const AlongColumns<P> dz = {own + panels.y_size, panels.dz_pitch};
    const AlongRows<P> dz_rows = {Panels::kSame ? dz.data : dz.data + panels.dz_size, panels.dz_rows_pitch};
    A* wgrad = wgrads[task];
    std::fill_n(own, panels.operands(), Operand{});  // columns beyond the last one stay zero
    if (all.begin == all.end) std::fill_n(wgrad, panels.wgrad_size, A(0));
    for_panels(all, panels.rows, [&](int64_t m0, int64_t rows) {
      const Rows<const T> grad = {p.grad_out.row(m0), p.grad_out.pitch};
      const DzPanel<P> put_dz = {dz, dz_rows, want_wgrad && !Panels::kSame};
      if (p.z)
        fill_panel<A>(rows, p.N, DzRows<T>{grad, {p.z.row(m0), p.z.pitch}, norm2}, put_dz);
      else
        fill_panel<A>(rows, p.N, GivenRows<T>{grad}, put_dz);
      const int64_t next = m0 + rows;
      const PanelReads<T> reads(p, in, range, {m0, next}, {next, std::min(next + panels.rows, all.end)});
      const auto product_steps = [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        return (want_wgrad ? tiles<NV>(p.N) * depth_steps<P>(rows) : 0) + tiles<NV>(rows) * steps;
      };
      int64_t panel_steps = 0;
      for_column_blocks<A>(range.begin, range.end,
                           [&](int64_t, auto vectors) { panel_steps += product_steps(vectors); });
      SpreadReads ahead = reads.of_panel(panel_steps);

      for_column_blocks<A>(range.begin, range.end, [&](int64_t n, auto vectors) {
        constexpr int NV = decltype(vectors)::value, R = kTileRows<NV>;
        if (reads.wide()) ahead = reads.of_block(product_steps(vectors), n - range.begin, NV * L);
        if (want_wgrad) {
          const NormalisedRows<T> of_block = {{p.x.row(m0) + n, p.x.pitch}, affine.from(n)};
          fill_panel<A>(rows, std::min<int64_t>(NV * L, range.end - n), of_block, AlongRows<P>{y, NV * L});
          add_wgrad<P, NV>(p.N, depth_steps<P>(rows), dz_rows, y, wgrad + (n - range.begin) * panels.wgrad_rows,
                           m0 == all.begin, ahead);
        }
        DgradColumns<T> columns[NV];
        for (int j = 0; j < NV; ++j) columns[j] = DgradColumns<T>(p, in, affine, m0, n + j * L);
        for (int64_t r0 = 0; r0 < rows; r0 += R) {
          alignas(64) A tile[NV][R][L];
          const int64_t tile_rows = std::min<int64_t>(R, rows - r0);
          {
            Vec<A> acc[R][NV];
            ReadCursor cursor = ahead.cursor();
            tile_product<P, NV, 0, 1>(steps, dz.data + r0 * dz.pitch, dz.pitch, 1, packed + n * steps, NV * L, acc,
                                      cursor);
            ahead.go_on(cursor);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
              for (int j = 0; j < NV; ++j) store_vec(tile[j][r], acc[r][j]);
          }
          for (int j = 0; j < NV; ++j) columns[j].add_tile(tile[j], r0, tile_rows);
        }
        for (int j = 0; j < NV; ++j) sums.add<A>(task / grid.columns, n + j * L, columns[j].sum, columns[j].sum_xc);
      });
    });
  });

  sums.finish(p.C, affine.rstd, p.grad_weight, p.grad_bias);
  if (p.grad_mean)
    for (int64_t c = 0; c < p.C; ++c) {
      const auto d = bn_statistics_grad<A>(affine.scale(c), affine.rstd[c], A(sums.dy(c)), A(sums.dy_xc(c)));
      p.grad_mean[c] += d.mean;
      p.grad_var[c] += d.var;
    }
  if (!want_wgrad) return;
  pool.run([&](int task) {
    const Range channels = part(p.N, 1, pool.tasks, task);
    for (int64_t i = channels.begin; i < channels.end; ++i)
      for (int column = 0; column < grid.columns; ++column) {
        const Range range = grid.template column_range<A>(column, p.C);
        for_column_blocks<A>(range.begin, range.end, [&](int64_t n, auto vectors) {
          constexpr int NV = decltype(vectors)::value;
          const int64_t of_channel = (n - range.begin) * panels.wgrad_rows + i * NV * L;
          for_columns<A>(std::min<int64_t>(NV * L, range.end - n), [&](int64_t c, auto columns) {
            Vec<A> total = {};
            for (int row = 0; row < grid.rows; ++row)
              total += load_vec(wgrads[row * grid.columns + column] + of_channel + c);
            columns.store(p.grad_conv_weight + i * p.C + n + c, total);
          });
        });
      }
  });
}
