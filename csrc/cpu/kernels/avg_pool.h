// BatchNorm, ReLU and average pooling in one read (transition: 2x2; head: the whole image), and their backward passes.
#pragma once

// Pixels of one line of the pooled image: calls f(output row, first input row of its window) for each of them.
// Windows do not overlap (stride = window), so an input pixel belongs to one window or to none.
struct LinesOfWindows {
  const Pooling& g;
  int64_t lines() const { return g.batch * g.out[0] * g.out[1]; }
  template <class F>
  DX_INLINE void operator()(int64_t line, const F& f) const {
    const int64_t oh = line % g.out[1], od = line / g.out[1] % g.out[0], n = line / (g.out[1] * g.out[0]);
    for (int64_t ow = 0; ow < g.out[2]; ++ow)
      f(line * g.out[2] + ow,
        ((n * g.size[0] + od * g.window[0]) * g.size[1] + oh * g.window[1]) * g.size[2] + ow * g.window[2]);
  }
  // Calls f(input row) for each pixel of the window that begins at `first`.
  template <class F>
  DX_INLINE void window(int64_t first, const F& f) const {
    for (int64_t d = 0; d < g.window[0]; ++d)
      for (int64_t h = 0; h < g.window[1]; ++h)
        for (int64_t w = 0; w < g.window[2]; ++w) f(first + (d * g.size[1] + h) * g.size[2] + w);
  }
  double pixels() const { return double(g.window[0] * g.window[1] * g.window[2]); }
};

template <class T>
void bn_relu_avg_pool(const BnReluPool<T>& p, const Pool& pool) {
  using A = Acc<T>;
  Scratch scratch(Affine<A>::bytes(p.C));
  const Affine<A> affine(scratch, p.norm, p.C);
  const LinesOfWindows windows{p.pooling};
  const A share = A(1 / windows.pixels());
  pool.run([&](int task) {
    const Range lines = part(windows.lines(), 1, pool.tasks, task);
    for (int64_t line = lines.begin; line < lines.end; ++line)
      windows(line, [&](int64_t out_row, int64_t first) {
        for_columns<A>(p.C, [&](int64_t c, auto columns) {
          const auto norm = affine.at(c);
          Vec<A> sum = {};
          windows.window(first, [&](int64_t row) { sum += relu<A>(norm(columns.load(p.x.row(row) + c))); });
          columns.store(p.out.row(out_row) + c, sum * share);
        });
      });
  });
}

template <class T>
void bn_relu_avg_pool_backward_reduce(const BnReluPoolBackwardReduce<T>& p, const Pool& pool) {
  using A = Acc<T>;
  Scratch scratch(Affine<A>::bytes(p.C) + TaskSums::bytes(pool.tasks, p.C));
  const Affine<A> affine(scratch, p.norm, p.C);
  const TaskSums sums(scratch, pool.tasks, p.C);
  const LinesOfWindows windows{p.pooling};
  const A share = A(1 / windows.pixels());
  pool.run([&](int task) {
    const Range lines = part(windows.lines(), 1, pool.tasks, task);
    for (int64_t line = lines.begin; line < lines.end; ++line)
      for_columns<A>(p.C, [&](int64_t c, auto columns) {
        const auto norm = affine.at(c);
        Vec<A> sum = {}, sum_xc = {};
        windows(line, [&](int64_t out_row, int64_t first) {
          const Vec<A> grad = columns.load(p.grad_out.row(out_row) + c) * share;
          Vec<A> pooled = {};
          windows.window(first, [&](int64_t row) {
            const Vec<A> xc = columns.load(p.x.row(row) + c) - norm.mean, u = norm.of_centered(xc);
            const Vec<A> dy = relu_mask<A>(u, grad);
            sum += dy;
            sum_xc += dy * xc;
            pooled += relu<A>(u);
          });
          if (p.pooled) columns.store(p.pooled.row(out_row) + c, pooled * share);
        });
        sums.add<A>(task, c, sum, sum_xc);
      });
  });
  sums.finish(p.C, affine.rstd, p.grad_weight, p.grad_bias);
}

template <class T>
void bn_relu_avg_pool_backward(const BnReluPoolBackward<T>& p, const Pool& pool) {
  using A = Acc<T>;
  const Pooling& g = p.pooling;
  Scratch scratch(NormBackward<A>::bytes(p.C));
  const NormBackward<A> backward(scratch, p.norm, p.grad_weight, p.grad_bias, g.in_rows(), p.C);
  const A share = A(1 / LinesOfWindows{g}.pixels());
  pool.run([&](int task) {
    const Range lines = part(g.batch * g.size[0] * g.size[1], 1, pool.tasks, task);
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      const int64_t h = line % g.size[1], d = line / g.size[1] % g.size[0], n = line / (g.size[1] * g.size[0]);
      const int64_t oh = h / g.window[1], od = d / g.window[0];
      for (int64_t w = 0; w < g.size[2]; ++w) {
        const int64_t row = line * g.size[2] + w, ow = w / g.window[2];
        // Floor mode: what no window covers gets the statistics' share only.
        const bool covered = od < g.out[0] && oh < g.out[1] && ow < g.out[2];
        const T* grad = covered ? p.grad_out.row(((n * g.out[0] + od) * g.out[1] + oh) * g.out[2] + ow) : nullptr;
        for_columns<A>(p.C, [&](int64_t c, auto columns) {
          const Vec<A> dy = grad ? Vec<A>(columns.load(grad + c) * share) : Vec<A>{};
          columns.store(p.grad_x.row(row) + c, backward.at(c)(columns.load(p.x.row(row) + c), dy));
        });
      }
    }
  });
}
