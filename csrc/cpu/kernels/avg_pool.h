// BatchNorm, ReLU and average pooling in one read (transition: 2x2; head: the whole image), and their backward passes.
//
// Rows are read from end to end, and what is summed over a window lies in the first cache: to hold a few columns' sums
// in registers reads stretches of rows that the processor does not prefetch, at half the speed of memory.
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
  // Calls f(input row, count) for the pixels of the window that begins at `first`, two neighbours at a time.
  template <class F>
  DX_INLINE void pairs(int64_t first, const F& f) const {
    for (int64_t d = 0; d < g.window[0]; ++d)
      for (int64_t h = 0; h < g.window[1]; ++h) {
        const int64_t row = first + (d * g.size[1] + h) * g.size[2];
        int64_t w = 0;
        for (; w + 2 <= g.window[2]; w += 2) f(row + w, Constant<2>{});
        if (w < g.window[2]) f(row + w, Constant<1>{});
      }
  }
  double pixels() const { return double(g.window[0] * g.window[1] * g.window[2]); }
};

template <class T>
void bn_relu_avg_pool(const BnReluPool<T>& p, const Pool& pool) {
  using A = Acc<T>;
  const int64_t Cp = padded<A>(p.C);
  TaskScratch scratch(pool.tasks, Affine<A>::bytes(p.C) + Scratch::bytes<A>(Cp));
  const Each<A> norms = scratch.take<A>(Affine<A>::size(p.C)), sums = scratch.take<A>(Cp);
  const LinesOfWindows windows{p.pooling};
  const A share = A(1 / windows.pixels());
  pool.run([&](int task) {
    const Affine<A> own(norms[task], p.norm, p.C);
    const int64_t C = p.C, ahead = kRowsAhead / 2 * p.x.pitch;
    A* const sum = sums[task];
    const Range lines = part(windows.lines(), 1, pool.tasks, task);
    for (int64_t line = lines.begin; line < lines.end; ++line)
      windows(line, [&](int64_t out_row, int64_t first) {
        std::fill_n(sum, Cp, A(0));
        windows.pairs(first, [&](int64_t row, auto count) {
          constexpr int N = decltype(count)::value;
          const T* x = p.x.row(row);
          const int64_t pitch = p.x.pitch;
          for_columns<A>(C, [=](int64_t c, auto columns) {
            const auto norm = own.at(c);
            Vec<A> all = load_vec(sum + c);
#pragma GCC unroll 2
            for (int i = 0; i < N; ++i) {
              prefetch<2>(x + i * pitch + c, ahead);
              all += relu<A>(norm(columns.load(x + i * pitch + c)));
            }
            store_vec(sum + c, all);
          });
        });
        T* out = p.out.row(out_row);
        for_columns<A>(C, [&](int64_t c, auto columns) { columns.store(out + c, load_vec(sum + c) * share); });
      });
  });
}

template <class T>
void bn_relu_avg_pool_backward_reduce(const BnReluPoolBackwardReduce<T>& p, const Pool& pool) {
  using A = Acc<T>;
  const int64_t Cp = padded<A>(p.C);
  Scratch scratch(Affine<A>::bytes(p.C) + RowSums<A>::bytes(pool.tasks, p.C) + TaskSums::bytes(pool.tasks, p.C) +
                  2 * Scratch::bytes<A>(pool.tasks * Cp));
  const Affine<A> affine(scratch, p.norm, p.C);
  const RowSums<A> row_sums(scratch, pool.tasks, p.C);
  const TaskSums sums(scratch, pool.tasks, p.C);
  A *grads = scratch.take<A>(pool.tasks * Cp), *pools = scratch.take<A>(pool.tasks * Cp);
  const LinesOfWindows windows{p.pooling};
  const A share = A(1 / windows.pixels());
  pool.run([&](int task) {
    const Affine<A> own = affine;
    const int64_t C = p.C, ahead = kRowsAhead / 2 * p.x.pitch;
    const RowSums<A> sum = row_sums.of_task(task);
    A *const grad = grads + task * Cp, *const pooled = p.pooled ? pools + task * Cp : nullptr;
    const Range lines = part(windows.lines(), 1, pool.tasks, task);
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      sum.clear();
      windows(line, [&](int64_t out_row, int64_t first) {
        const T* grad_out = p.grad_out.row(out_row);
        for_columns<A>(C, [=](int64_t c, auto columns) { store_vec(grad + c, columns.load(grad_out + c) * share); });
        if (pooled) std::fill_n(pooled, Cp, A(0));
        windows.pairs(first, [&](int64_t row, auto count) {
          constexpr int N = decltype(count)::value;
          const T* x = p.x.row(row);
          const int64_t pitch = p.x.pitch;
          for_columns<A>(C, [=](int64_t c, auto columns) {
            const auto norm = own.at(c);
            const Vec<A> dy = load_vec(grad + c);
            Vec<A> dys[N], xc[N];
#pragma GCC unroll 2
            for (int i = 0; i < N; ++i) {
              prefetch<2>(x + i * pitch + c, ahead);
              xc[i] = columns.load(x + i * pitch + c) - norm.mean;
              const Vec<A> u = norm.of_centered(xc[i]);
              dys[i] = relu_mask<A>(u, dy);
              if (pooled) store_vec(pooled + c, load_vec(pooled + c) + relu<A>(u));
            }
            sum.add(c, dys, xc);
          });
        });
        if (!pooled) return;
        T* out = p.pooled.row(out_row);
        for_columns<A>(C, [=](int64_t c, auto columns) { columns.store(out + c, load_vec(pooled + c) * share); });
      });
      sum.flush(sums, task);
    }
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
