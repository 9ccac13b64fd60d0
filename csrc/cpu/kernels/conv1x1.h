// z = relu(bn(x)) @ W^T: BatchNorm and ReLU as the prologue of the 1x1 convolution. A panel of rows is normalised into
// cache-sized scratch, while the panel before it is multiplied; the normalised tensor never exists in memory. The
// output's statistics are taken from the panel just written, as stored.
#pragma once

template <class T, class P = Product<T>>
void bn_relu_conv1x1(const BnReluConv1x1<T>& p, const Pool& pool, PackedWeights* kept) {
  using A = Acc<T>;
  using Operand = typename P::Operand;
  constexpr int L = kLanes<A>;
  const Grid grid = make_grid<A>(pool.tasks, p.M, p.N, 0.5 * P::kDepth);
  const int64_t steps = depth_steps<P>(p.C), pitch = panel_pitch<A>(steps), Np = padded<A>(p.N);
  const int64_t panel = panel_rows_by_turns<P>(pitch * int64_t(sizeof(Operand)), p.M / grid.rows);
  const int64_t panel_size = panel * pitch;
  const int64_t packed_count = packed_size<P>(p.C, p.N);
  Scratch scratch(CallWeights<Operand>::bytes(kept, packed_count));
  TaskScratch own(pool.tasks, 2 * Scratch::bytes<Operand>(panel_size) + Affine<A>::bytes(p.C) + Scratch::bytes<A>(Np) +
                                  CallWeights<Operand>::task_bytes(kept, packed_count) + TaskMoments::bytes(p.N));
  const PackedForm form = {1, sizeof(Operand), P::kDepth, kLanes<A>, packed_count, grid.columns};
  CallWeights<Operand> weights(scratch, own, kept, form, packed_count);
  const RightPacking<P> packing = {p.weight, p.C, p.N, 1, p.C, grid.columns};
  const Each<Operand> even = own.take<Operand>(panel_size), odd = own.take<Operand>(panel_size);
  const Each<A> norms = own.take<A>(Affine<A>::size(p.C)), biases = own.take<A>(Np);
  const TaskMoments moments(own, pool.tasks, p.N);
  weights.write(pool, [&](Operand* to, int task, int tasks) { packing.share(to, task, tasks); });

  pool.run([&](int task) {
    AlongColumns<P> y = {even[task], pitch}, next_y = {odd[task], pitch};
    const Range all = grid.row_range(task, p.M), range = grid.template column_range<A>(task, p.N);
    MomentsSum sum = moments.begin(task).from(range.begin);
    const Affine<A> affine(norms[task], p.norm, p.C);
    A* const bias = biases[task];
    std::fill_n(bias, Np, A(0));
    if (p.out_bias) std::copy_n(p.out_bias, p.N, bias);
    const Operand* packed = weights.of_task(task, [&](Operand* to) { packing.columns(to, task % grid.columns); });
    int64_t products = 0;  // steps of a panel's
    for_column_blocks<A>(range.begin, range.end, [&](int64_t, auto vectors) {
      products += panel / kTileRows<decltype(vectors)::value> * steps;
    });
    const int64_t vectors = panel * (padded<A>(p.C) / L);  // that are filled beside them
    const int64_t every = p.C > 0 ? std::max<int64_t>(1, products / vectors) : 1;
    const auto fills = [&](int64_t m, const AlongColumns<P>& to) {
      const int64_t rows = std::clamp<int64_t>(all.end - m, 0, panel), behind = m + panel < all.end ? panel : 0;
      return PanelAhead<P, T>(rows, p.C, {{p.x.row(m), p.x.pitch}, affine}, to, behind, every);
    };
    fills(all.begin, y).finish();
    for_panels(all, panel, [&](int64_t m0, int64_t rows) {
      PanelAhead<P, T> next = fills(m0 + panel, next_y);
      for_column_blocks<A>(range.begin, range.end, [&](int64_t n, auto vectors) {
        constexpr int NV = decltype(vectors)::value, R = kTileRows<NV>;
        for (int64_t r0 = 0; r0 < rows; r0 += R) {
          Vec<A> acc[R][NV];
          tile_product<P, NV, 0, 1>(steps, y.data + r0 * pitch, pitch, 1, packed + n * steps, NV * L, acc, next);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            if (r0 + r >= rows) break;
            T* out = p.out.row(m0 + r0 + r) + n;
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) {
              Vec<A> v = acc[r][j] + load_vec(bias + n + j * L);
              if (p.out_relu) v = relu<A>(v);
              const int64_t left = p.N - (n + j * L);
              if (left >= L)
                store(out + j * L, v);
              else
                store_part(out + j * L, v, int(left));
            }
          }
        }
      });
      next.finish();
      std::swap(y, next_y);
      if (p.out_mean) sum.add_panel(p.out.row(m0) + range.begin, p.out.pitch, rows, range.end - range.begin);
    });
  });
  if (p.out_mean)
    for (int i = 0; i < grid.columns; ++i)
      moments.finish(grid.template column_range<A>(i, p.N), i, grid.columns, p.out_mean, p.out_var);
}
