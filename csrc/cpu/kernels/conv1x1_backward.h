// The backward pass of z = relu(bn(x)) @ W^T in one pass over x and G: for each panel of rows
//   dz    (through norm2 and its ReLU, when grad_out is the gradient behind them)
//   y   = relu(bn(x))                           recomputed
//   dW += dz^T @ y                              one sum per task
//   dy  = (dz @ W) masked by bn(x) > 0          never stored
//   G   = s * dy + (G | grad_in | 0),  sum(dy),  sum(dy (x - m))
#pragma once

// What one task works on: panels of rows of its columns. dz is an operand twice: of dgrad along its columns (the inner
// dimension is N), of wgrad along its rows (the inner dimension is M). Where an operand is a single number the two are
// the same.
template <class T, class P>
struct BackwardPanels {
  using A = Acc<T>;
  using Operand = typename P::Operand;
  static constexpr bool kSame = P::kDepth == 1;

  int64_t y_pitch, dz_pitch, dz_rows_pitch, rows, wgrad_rows;
  int64_t y_size, dz_size, dz_rows_size, wgrad_size;

  // C: the columns of the task that has most.
  BackwardPanels(int64_t C, int64_t N, bool want_wgrad)
      : y_pitch(panel_pitch<A>(C)),
        dz_pitch(panel_pitch<A>(kSame ? N : depth_steps<P>(N))),
        dz_rows_pitch(panel_pitch<A>(N)),
        rows(panel_rows<P>(std::max(y_pitch, dz_rows_pitch) / P::kDepth * int64_t(sizeof(Operand)))),
        wgrad_rows(round_up(N, kRowUnit)),
        y_size(want_wgrad ? rows / P::kDepth * y_pitch : 0),
        dz_size(rows * dz_pitch),
        dz_rows_size(want_wgrad && !kSame ? rows / P::kDepth * dz_rows_pitch : 0),
        wgrad_size(want_wgrad ? wgrad_rows * y_pitch : 0) {}
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

// dW[i, c] += sum over the panel's rows of dz[row, i] * y[row, c] for the task's columns; a tile's rows are output
// channels here. ahead: an aside, as in tile_product.
template <class P>
DX_INLINE void add_wgrad(int64_t N, int64_t C, int64_t steps, AlongRows<P> dz, AlongRows<P> y, typename P::A* wgrad,
                         ReadsAhead& ahead) {
  using A = typename P::A;
  for_column_blocks<A>(0, C, [&](int64_t c, auto vectors) {
    constexpr int NV = decltype(vectors)::value, R = kTileRows<NV>;
    for (int64_t i = 0; i < N; i += R) {
      Vec<A> acc[R][NV];
      tile_product<P, NV, 1, 0>(steps, dz.data + i, 1, dz.pitch, y.data + c, y.pitch, acc, ahead);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
          A* w = wgrad + (i + r) * y.pitch + c + j * kLanes<A>;
          store_vec(w, load_vec(w) + acc[r][j]);
        }
    }
  });
}

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
    const int64_t C = range.end - range.begin;
    Operand* own = operands[task];
    const Operand* packed = weights.of_task(task, [&](Operand* to) { packing.columns(to, task % grid.columns); });
    const AlongRows<P> y = {own, panels.y_pitch};
    const AlongColumns<P> dz = {own + panels.y_size, panels.dz_pitch};
    const AlongRows<P> dz_rows = {Panels::kSame ? dz.data : dz.data + panels.dz_size, panels.dz_rows_pitch};
    A* wgrad = wgrads[task];
    std::fill_n(own, panels.operands(), Operand{});  // columns beyond the last one stay zero
    std::fill_n(wgrad, panels.wgrad_size, A(0));
    for_panels(all, panels.rows, [&](int64_t m0, int64_t rows) {
      const Rows<const T> grad = {p.grad_out.row(m0), p.grad_out.pitch};
      const DzPanel<P> put_dz = {dz, dz_rows, want_wgrad && !Panels::kSame};
      if (p.z)
        fill_panel<A>(rows, p.N, DzRows<T>{grad, {p.z.row(m0), p.z.pitch}, norm2}, put_dz);
      else
        fill_panel<A>(rows, p.N, GivenRows<T>{grad}, put_dz);
      const Rows<const T> x = {p.x.data + range.begin, p.x.pitch};
      const int64_t next = m0 + rows, next_rows = std::min(panels.rows, all.end - next);
      // Of a wide panel what is added to would lie too long in the second cache, where the product's operands are.
      constexpr int64_t kAheadBytes = 128 * 1024;
      const bool wide = rows * C * int64_t(sizeof(T)) > kAheadBytes;
      const Rows<const T> in_columns = in ? Rows<const T>{in.data + range.begin, in.pitch} : x;
      // wgrad asks for what the next panel's dz is made of, dgrad for the rest.
      const ReadAhead of_grad(p.grad_out, next, next_rows, p.N), of_x(x, next, next_rows, C);
      const ReadAhead of_z(p.z ? p.z : p.grad_out, next, p.z ? next_rows : 0, p.N);
      const ReadAhead of_in(in_columns, next, in && !wide ? next_rows : 0, C);
      ReadsAhead ahead = want_wgrad ? ReadsAhead(of_in, of_x) : ReadsAhead(of_in, of_x, of_z, of_grad);
      if (want_wgrad) {
        fill_panel<A>(rows, C, NormalisedRows<T>{{x.row(m0), x.pitch}, affine.from(range.begin)}, y);
        ReadsAhead ahead_of_dz(of_z, of_grad);
        add_wgrad<P>(p.N, C, depth_steps<P>(rows), dz_rows, y, wgrad, ahead_of_dz);
      }

      for_column_blocks<A>(range.begin, range.end, [&](int64_t n, auto vectors) {
        constexpr int NV = decltype(vectors)::value, R = kTileRows<NV>;
        const Rows<const T> from_n = {in_columns.data + n - range.begin, in_columns.pitch};
        ahead.set_first(ReadAhead(from_n, m0, in && wide ? rows : 0, std::min<int64_t>(NV * L, range.end - n)));
        DgradColumns<T> columns[NV];
        for (int j = 0; j < NV; ++j) columns[j] = DgradColumns<T>(p, in, affine, m0, n + j * L);
        for (int64_t r0 = 0; r0 < rows; r0 += R) {
          alignas(64) A tile[NV][R][L];
          const int64_t tile_rows = std::min<int64_t>(R, rows - r0);
          {
            Vec<A> acc[R][NV];
            tile_product<P, NV, 0, 1>(steps, dz.data + r0 * dz.pitch, dz.pitch, 1, packed + n * steps, NV * L, acc,
                                      ahead);
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
        for_columns<A>(range.end - range.begin, [&](int64_t c, auto columns) {
          Vec<A> total = {};
          for (int row = 0; row < grid.rows; ++row)
            total += load_vec(wgrads[row * grid.columns + column] + i * panels.y_pitch + c);
          columns.store(p.grad_conv_weight + i * p.C + range.begin + c, total);
        });
      }
  });
}
