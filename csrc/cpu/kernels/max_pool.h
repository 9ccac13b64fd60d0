// BatchNorm, ReLU and max pooling in one read (the stem), and their backward passes. The backward pass gathers: an
// input pixel asks each window that covers it whether it was the maximum, so nothing is scattered and no order matters.
#pragma once

template <class A>
DX_INLINE Vec<A> load_index(const uint8_t* p, int n) {
  Vec<A> v = {};
  for (int i = 0; i < n; ++i) v[i] = A(p[i]);
  return v;
}
template <class A>
DX_INLINE int lanes_at(int64_t c, int64_t C) {
  return int(std::min<int64_t>(kLanes<A>, C - c));
}

template <class T>
void bn_relu_max_pool(const BnReluPool<T>& p, const Pool& pool) {
  using A = Acc<T>;
  const Pooling& g = p.pooling;
  Scratch scratch(Affine<A>::bytes(p.C));
  const Affine<A> affine(scratch, p.norm, p.C);
  pool.run([&](int task) {
    const Range lines = part(g.batch * g.out[0] * g.out[1], 1, pool.tasks, task);
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      const int64_t oh = line % g.out[1], od = line / g.out[1] % g.out[0], n = line / (g.out[1] * g.out[0]);
      for (int64_t ow = 0; ow < g.out[2]; ++ow) {
        const int64_t out_row = line * g.out[2] + ow;
        for_columns<A>(p.C, [&](int64_t c, auto columns) {
          // PyTorch's rule: the first maximum in scan order, and NaN always wins.
          const auto norm = affine.at(c);
          Vec<A> best = broadcast(-A(INFINITY)), where = {};
          bool first = true;
          for (int64_t i = 0; i < g.window[0]; ++i)
            for (int64_t j = 0; j < g.window[1]; ++j)
              for (int64_t k = 0; k < g.window[2]; ++k) {
                const int64_t d = od * g.stride[0] - g.padding[0] + i, h = oh * g.stride[1] - g.padding[1] + j,
                              w = ow * g.stride[2] - g.padding[2] + k;
                if (d < 0 || d >= g.size[0] || h < 0 || h >= g.size[1] || w < 0 || w >= g.size[2]) continue;
                const int64_t row = ((n * g.size[0] + d) * g.size[1] + h) * g.size[2] + w;
                const Vec<A> y = as_stored<T>(relu<A>(norm(columns.load(p.x.row(row) + c))));
                const Vec<A> position = broadcast(A((i * g.window[1] + j) * g.window[2] + k));
                if (first) where = position;
                first = false;
                const auto better = (y > best) | (y != y);
                best = better ? y : best;
                where = better ? position : where;
              }
          columns.store(p.out.row(out_row) + c, best);
          if (p.index)
            for (int lane = 0; lane < lanes_at<A>(c, p.C); ++lane)
              p.index.row(out_row)[c + lane] = uint8_t(where[lane]);
        });
      }
    }
  });
}

// The gradient that reaches input pixel (n, d, h, w) from the windows that cover it, before the ReLU's mask.
template <class T, class A = Acc<T>, class Columns>
DX_INLINE Vec<A> gather_max_pool_grad(const Pooling& g, Rows<const T> grad_out, Rows<const uint8_t> index, int64_t n,
                                      int64_t d, int64_t h, int64_t w, int64_t c, int lanes, Columns columns) {
  const int64_t at[3] = {d + g.padding[0], h + g.padding[1], w + g.padding[2]};
  int64_t lo[3], hi[3];
  for (int i = 0; i < 3; ++i) {
    lo[i] = at[i] < g.window[i] ? 0 : (at[i] - g.window[i]) / g.stride[i] + 1;
    hi[i] = std::min(at[i] / g.stride[i] + 1, g.out[i]);
  }
  Vec<A> sum = {};
  for (int64_t od = lo[0]; od < hi[0]; ++od)
    for (int64_t oh = lo[1]; oh < hi[1]; ++oh)
      for (int64_t ow = lo[2]; ow < hi[2]; ++ow) {
        const int64_t row = ((n * g.out[0] + od) * g.out[1] + oh) * g.out[2] + ow;
        const int64_t position = ((at[0] - od * g.stride[0]) * g.window[1] + (at[1] - oh * g.stride[1])) * g.window[2] +
                                 (at[2] - ow * g.stride[2]);
        const auto mine = load_index<A>(index.row(row) + c, lanes) == broadcast(A(position));
        const Vec<A> zero = {};
        sum += mine ? columns.load(grad_out.row(row) + c) : zero;
      }
  return sum;
}

template <class T>
void bn_relu_max_pool_backward_reduce(const BnReluPoolBackwardReduce<T>& p, const Pool& pool) {
  using A = Acc<T>;
  const Pooling& g = p.pooling;
  Scratch scratch(Affine<A>::bytes(p.C) + TaskSums::bytes(pool.tasks, p.C));
  const Affine<A> affine(scratch, p.norm, p.C);
  const TaskSums sums(scratch, pool.tasks, p.C);
  pool.run([&](int task) {
    const Range lines = part(g.batch * g.size[0] * g.size[1], 1, pool.tasks, task);
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      const int64_t h = line % g.size[1], d = line / g.size[1] % g.size[0], n = line / (g.size[1] * g.size[0]);
      for_columns<A>(p.C, [&](int64_t c, auto columns) {
        const auto norm = affine.at(c);
        Vec<A> sum = {}, sum_xc = {};
        const int lanes = lanes_at<A>(c, p.C);
        for (int64_t w = 0; w < g.size[2]; ++w) {
          const Vec<A> xc = columns.load(p.x.row(line * g.size[2] + w) + c) - norm.mean;
          const Vec<A> grad = gather_max_pool_grad<T>(g, p.grad_out, p.index, n, d, h, w, c, lanes, columns);
          const Vec<A> dy = relu_mask<A>(norm.of_centered(xc), grad);
          sum += dy;
          sum_xc += dy * xc;
        }
        sums.add<A>(task, c, sum, sum_xc);
      });
    }
  });
  sums.finish(p.C, affine.rstd, p.grad_weight, p.grad_bias);
}

template <class T>
void bn_relu_max_pool_backward(const BnReluPoolBackward<T>& p, const Pool& pool) {
  using A = Acc<T>;
  const Pooling& g = p.pooling;
  Scratch scratch(NormBackward<A>::bytes(p.C));
  const NormBackward<A> backward(scratch, p.norm, p.grad_weight, p.grad_bias, g.in_rows(), p.C);
  pool.run([&](int task) {
    const Range lines = part(g.batch * g.size[0] * g.size[1], 1, pool.tasks, task);
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      const int64_t h = line % g.size[1], d = line / g.size[1] % g.size[0], n = line / (g.size[1] * g.size[0]);
      for (int64_t w = 0; w < g.size[2]; ++w) {
        const int64_t row = line * g.size[2] + w;
        for_columns<A>(p.C, [&](int64_t c, auto columns) {
          const Vec<A> grad =
              gather_max_pool_grad<T>(g, p.grad_out, p.index, n, d, h, w, c, lanes_at<A>(c, p.C), columns);
          columns.store(p.grad_x.row(row) + c, backward.at(c)(columns.load(p.x.row(row) + c), grad));
        });
      }
    }
  });
}
