// The passes that read and write each element once: statistics, appending features (dropout), BN + ReLU and its
// backward, the gradient of a feature with its statistics' share.
#pragma once

template <class T>
void channel_stats(const ChannelStats<T>& p, const Pool& pool) {
  TaskScratch scratch(pool.tasks, TaskMoments::bytes(p.C));
  const TaskMoments moments(scratch, pool.tasks, p.C);
  pool.run([&](int task) {
    MomentsSum sum = moments.begin(task);
    for_panels(part(p.M, kPanelRows, pool.tasks, task), kPanelRows,
               [&](int64_t m, int64_t rows) { sum.add_panel(p.x.row(m), p.x.pitch, rows, p.C); });
  });
  moments.finish(p.C, p.mean, p.var);
}

template <class T>
void append_features(const AppendFeatures<T>& p, const Pool& pool) {
  using A = Acc<T>;
  TaskScratch scratch(pool.tasks, TaskMoments::bytes(p.C));
  const TaskMoments moments(scratch, pool.tasks, p.C);
  const DropFactors<A> drop(p.drop_rate, p.seed, p.layer, p.drop_rows);
  pool.run([&](int task) {
    MomentsSum sum = moments.begin(task);
    const DropFactors<A> factors = drop;
    const int64_t C = p.C;
    for_panels(part(p.M, kPanelRows, pool.tasks, task), kPanelRows, [&](int64_t m0, int64_t rows) {
      for (int64_t m = m0; m < m0 + rows; ++m) {
        const T* src = p.src.row(m);
        T* out = p.out.row(m);
        prefetch_row<1>(out, C, p.out.pitch, kRowsAhead);
        if (factors) {
          const auto of_row = factors.row(m);
          for_columns<A>(
              C, [=](int64_t c, auto columns) { columns.store(out + c, columns.load(src + c) * of_row.at(c)); });
        } else {
          for_columns<A>(C, [=](int64_t c, auto columns) { columns.copy(src + c, out + c); });
        }
      }
      // Without dropout the two are the same, and the source's rows lie closer together.
      const Rows<const T> stored = factors ? Rows<const T>{p.out.data, p.out.pitch} : p.src;
      if (p.mean) sum.add_panel(stored.row(m0), stored.pitch, rows, C);
    });
  });
  if (p.mean) moments.finish(p.C, p.mean, p.var);
}

template <class T>
void bn_relu(const BnRelu<T>& p, const Pool& pool) {
  using A = Acc<T>;
  Scratch scratch(Affine<A>::bytes(p.C));
  const Affine<A> affine(scratch, p.norm, p.C);
  pool.run([&](int task) {
    const Range range = part(p.M, kPanelRows, pool.tasks, task);
    // One row after the other: several at a time, which would load the norm once for all, take twice the time.
    for (int64_t m = range.begin; m < range.end; ++m) {
      const T* x = p.x.row(m);
      T* out = p.out.row(m);
      for_columns<A>(
          p.C, [&](int64_t c, auto columns) { columns.store(out + c, relu<A>(affine.at(c)(columns.load(x + c)))); });
    }
  });
}

// Where no statistics lie behind a column its slope is zero, and a NaN or an infinity of x must not get in by 0 * x.
template <class A>
DX_INLINE Vec<A> times_or_zero(Vec<A> slope, Vec<A> x) {
  const Vec<A> zero = {};
  return slope == zero ? zero : slope * x;
}

// g = dropout'(grad + (gm + 2 (x - m) gv) / M): every consumer has contributed, so this gradient is complete.
template <class T>
void feature_grad(const FeatureGrad<T>& p, const Pool& pool) {
  using A = Acc<T>;
  const int64_t Cp = padded<A>(p.C);
  Scratch scratch(3 * Scratch::bytes<A>(Cp));
  A *slopes = scratch.take<A>(Cp), *offsets = scratch.take<A>(Cp);
  const A* means = padded_copy(scratch, p.mean, p.C);
  std::fill_n(slopes, Cp, A(0));
  std::fill_n(offsets, Cp, A(0));
  for (int64_t c = 0; c < p.C; ++c) {
    slopes[c] = A(2) * p.grad_var[c] / A(p.M);
    offsets[c] = p.grad_mean[c] / A(p.M);
  }
  const DropFactors<A> drop(p.drop_rate, p.seed, p.layer, p.drop_rows);
  pool.run([&](int task) {
    const DropFactors<A> factors = drop;
    const int64_t C = p.C;
    const A *slope = slopes, *offset = offsets, *mean = means;
    const Range range = part(p.M, kPanelRows, pool.tasks, task);
    for (int64_t m = range.begin; m < range.end; ++m) {
      const T *x = p.x.row(m), *grad = p.grad.row(m);
      T* out = p.out.row(m);
      prefetch_row<1>(x, C, p.x.pitch, kRowsAhead);
      prefetch_row<1>(grad, C, p.grad.pitch, kRowsAhead);
      const auto of_row = factors.row(m);
      for_columns<A>(C, [=](int64_t c, auto columns) {
        const Vec<A> xc = columns.load(x + c) - load_vec(mean + c);
        const Vec<A> share = load_vec(offset + c) + times_or_zero<A>(load_vec(slope + c), xc);
        const Vec<A> g = columns.load(grad + c) + share;
        columns.store(out + c, factors ? g * of_row.at(c) : g);
      });
    }
  });
}

template <class T>
void bn_relu_backward_reduce(const BnReluBackwardReduce<T>& p, const Pool& pool) {
  using A = Acc<T>;
  Scratch scratch(Affine<A>::bytes(p.C) + TaskSums::bytes(pool.tasks, p.C));
  const Affine<A> affine(scratch, p.norm, p.C);
  const TaskSums sums(scratch, pool.tasks, p.C);
  pool.run([&](int task) {
    for_panels(part(p.M, kPanelRows, pool.tasks, task), kPanelRows, [&](int64_t m0, int64_t rows) {
      for_column_stretches<A, 8>(p.C, [&](int64_t c, auto columns, auto vectors) {
        constexpr int NV = decltype(vectors)::value, L = kLanes<A>;
        Vec<A> sum[NV] = {}, sum_xc[NV] = {};
        typename Affine<A>::Columns norm[NV];
        for (int j = 0; j < NV; ++j) norm[j] = affine.at(c + j * L);
        for (int64_t m = m0; m < m0 + rows; ++m)
#pragma GCC unroll 8
          for (int j = 0; j < NV; ++j) {
            const Vec<A> xc = columns.load(p.x.row(m) + c + j * L) - norm[j].mean;
            const Vec<A> u = norm[j].of_centered(xc);
            const Vec<A> dy = relu_mask<A>(u, columns.load(p.grad.row(m) + c + j * L));
            if (p.out) columns.store(p.out.row(m) + c + j * L, relu<A>(u));
            sum[j] += dy;
            sum_xc[j] += dy * xc;
          }
        for (int j = 0; j < NV; ++j) sums.add<A>(task, c + j * L, sum[j], sum_xc[j]);
      });
    });
  });
  sums.finish(p.C, affine.rstd, p.grad_weight, p.grad_bias);
}

// The input gradient of a norm, once its two sums are known:
//   dx = s (dy - sum(dy)/M - (x - m) r^2 sum(dy (x - m))/M) = s (dy - center - (x - m) slope)
// and s * dy when the norm is frozen (center and slope are zero).
template <class A>
struct NormBackward {
  Affine<A> affine;
  A *center, *slope;  // [padded C]

  static size_t bytes(int64_t C) { return Affine<A>::bytes(C) + 2 * Scratch::bytes<A>(padded<A>(C)); }
  NormBackward(Scratch& scratch, const Norm<A>& norm, const A* grad_weight, const A* grad_bias, int64_t M, int64_t C)
      : affine(scratch, norm, C), center(scratch.take<A>(padded<A>(C))), slope(scratch.take<A>(padded<A>(C))) {
    std::fill_n(center, padded<A>(C), A(0));
    std::fill_n(slope, padded<A>(C), A(0));
    if (!grad_bias) return;
    for (int64_t c = 0; c < C; ++c) {
      center[c] = grad_bias[c] / A(M);
      slope[c] = affine.rstd[c] * grad_weight[c] / A(M);
    }
  }
  struct Columns {
    typename Affine<A>::Columns norm;
    Vec<A> center, slope;
    // dy is the gradient before the ReLU's mask.
    DX_INLINE Vec<A> operator()(Vec<A> x, Vec<A> dy) const {
      const Vec<A> xc = x - norm.mean;
      const Vec<A> share = center + times_or_zero<A>(slope, xc);
      return norm.scale * (relu_mask<A>(norm.of_centered(xc), dy) - share);
    }
  };
  DX_INLINE Columns at(int64_t c) const { return {affine.at(c), load_vec(center + c), load_vec(slope + c)}; }
};

template <class T>
void bn_relu_backward(const BnReluBackward<T>& p, const Pool& pool) {
  using A = Acc<T>;
  Scratch scratch(NormBackward<A>::bytes(p.C));
  const NormBackward<A> backward(scratch, p.norm, p.grad_weight, p.grad_bias, p.M, p.C);
  pool.run([&](int task) {
    const Range range = part(p.M, kPanelRows, pool.tasks, task);
    for (int64_t m = range.begin; m < range.end; ++m) {
      const T *x = p.x.row(m), *grad = p.grad.row(m);
      T* out = p.grad_x.row(m);
      for_columns<A>(p.C, [&](int64_t c, auto columns) {
        columns.store(out + c, backward.at(c)(columns.load(x + c), columns.load(grad + c)));
      });
    }
  });
}
