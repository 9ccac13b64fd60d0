// BatchNorm, ReLU and max pooling in one read (the stem), and their backward passes. The backward pass gathers: an
// input pixel asks each window that covers it whether it was the maximum, so nothing is scattered and no order matters.
#pragma once

// The position of pixel `at` in window `o` along an axis.
inline int64_t within(const Pooling& g, int axis, int64_t at, int64_t o) {
  return at + g.padding[axis] - o * g.stride[axis];
}
// The pixels along an axis that window `o` covers.
inline Range inside(const Pooling& g, int axis, int64_t o) {
  const int64_t first = o * g.stride[axis] - g.padding[axis];
  return {std::max<int64_t>(first, 0), std::min(first + g.window[axis], g.size[axis])};
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
      const Range ds = inside(g, 0, od), hs = inside(g, 1, oh);
      for_column_stretches<A>(p.C, [&](int64_t c, auto columns, auto vectors) {
        constexpr int NV = decltype(vectors)::value, L = kLanes<A>;
        typename Affine<A>::Columns norm[NV];
        for (int j = 0; j < NV; ++j) norm[j] = affine.at(c + j * L);
        for (int64_t ow = 0; ow < g.out[2]; ++ow) {
          const Range ws = inside(g, 2, ow);
          Vec<A> best[NV];
          Positions<A> where[NV];
          for (int j = 0; j < NV; ++j) best[j] = broadcast(-A(INFINITY));
          for (int64_t d = ds.begin; d < ds.end; ++d)
            for (int64_t h = hs.begin; h < hs.end; ++h) {
              const T* x = p.x.row(((n * g.size[0] + d) * g.size[1] + h) * g.size[2] + ws.begin) + c;
              int position = int((within(g, 0, d, od) * g.window[1] + within(g, 1, h, oh)) * g.window[2] +
                                 within(g, 2, ws.begin, ow));
              for (int64_t w = ws.begin; w < ws.end; ++w, x += p.x.pitch, ++position)
#pragma GCC unroll 4
                for (int j = 0; j < NV; ++j)
                  where[j].compete(position, best[j], as_stored<T>(relu<A>(norm[j](columns.load(x + j * L)))));
            }
          const int64_t row = line * g.out[2] + ow;
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) {
            columns.store(p.out.row(row) + c + j * L, best[j]);
            if (p.index) where[j].store(p.index.row(row) + c + j * L, columns);
          }
        }
      });
    }
  });
}

// The windows that cover the pixels of a line of the input: which of them lie along the line is found once for all
// lines, which lines of the output they begin in once for a line.
class CoveringWindows {
 public:
  static size_t bytes(const Pooling& g) { return Scratch::bytes<Span>(g.size[2]); }
  CoveringWindows(Scratch& scratch, const Pooling& g) : g_(g), along_(scratch.take<Span>(g.size[2])) {
    for (int64_t w = 0; w < g.size[2]; ++w) along_[w] = covering(2, w);
  }
  int64_t lines() const { return g_.batch * g_.size[0] * g_.size[1]; }
  int64_t width() const { return g_.size[2]; }

  struct Line {
    int count = 0;
    struct {
      int64_t row;   // the first output of the line
      int position;  // of its windows' pixels in this line of the input, the first of each
    } of[256];       // a window has so many positions at most
  };
  Line of_line(int64_t line) const {
    const int64_t h = line % g_.size[1], d = line / g_.size[1] % g_.size[0], n = line / (g_.size[1] * g_.size[0]);
    const Span ds = covering(0, d), hs = covering(1, h);
    Line found;
    for (int64_t od = ds.begin; od < ds.end; ++od)
      for (int64_t oh = hs.begin; oh < hs.end; ++oh)
        found.of[found.count++] = {((n * g_.out[0] + od) * g_.out[1] + oh) * g_.out[2],
                                   int((within(g_, 0, d, od) * g_.window[1] + within(g_, 1, h, oh)) * g_.window[2])};
    return found;
  }

  // The gradient that reaches pixel w of the line from the windows whose maximum it is, before the ReLU's mask.
  template <int NV, class T, class Columns, class A = Acc<T>>
  DX_INLINE void gather(const Line& line, int64_t w, int64_t c, Rows<const T> grad_out, Rows<const uint8_t> index,
                        Columns columns, Vec<Acc<T>> (&grad)[NV]) const {
    constexpr int L = kLanes<A>;
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) grad[j] = Vec<A>{};
    const Span windows = along_[w];
    for (int i = 0; i < line.count; ++i) {
      int position = line.of[i].position + windows.position;
      for (int32_t ow = windows.begin; ow < windows.end; ++ow, position -= stride_) {
        const T* from = grad_out.row(line.of[i].row + ow) + c;
        const uint8_t* maximum = index.row(line.of[i].row + ow) + c;
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j)
          grad[j] =
              Positions<A>::load(maximum + j * L, columns).add_where(position, grad[j], columns.load(from + j * L));
      }
    }
  }

 private:
  struct Span {
    int32_t begin, end;
    int32_t position;  // the pixel's in the first of them
  };
  Span covering(int axis, int64_t at) const {
    const int64_t padded = at + g_.padding[axis], window = g_.window[axis], stride = g_.stride[axis];
    const int64_t begin = padded < window ? 0 : (padded - window) / stride + 1;
    return {int32_t(begin), int32_t(std::min(padded / stride + 1, g_.out[axis])), int32_t(within(g_, axis, at, begin))};
  }

  const Pooling& g_;
  Span* along_;
  int stride_ = int(g_.stride[2]);
};

template <class T>
void bn_relu_max_pool_backward_reduce(const BnReluPoolBackwardReduce<T>& p, const Pool& pool) {
  using A = Acc<T>;
  Scratch scratch(Affine<A>::bytes(p.C) + CoveringWindows::bytes(p.pooling) + TaskSums::bytes(pool.tasks, p.C));
  const Affine<A> affine(scratch, p.norm, p.C);
  const CoveringWindows windows(scratch, p.pooling);
  const TaskSums sums(scratch, pool.tasks, p.C);
  pool.run([&](int task) {
    const Range lines = part(windows.lines(), 1, pool.tasks, task);
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      const CoveringWindows::Line covering = windows.of_line(line);
      for_column_stretches<A>(p.C, [&](int64_t c, auto columns, auto vectors) {
        constexpr int NV = decltype(vectors)::value, L = kLanes<A>;
        Vec<A> sum[NV] = {}, sum_xc[NV] = {};
        typename Affine<A>::Columns norm[NV];
        for (int j = 0; j < NV; ++j) norm[j] = affine.at(c + j * L);
        for (int64_t w = 0; w < windows.width(); ++w) {
          const T* x = p.x.row(line * windows.width() + w) + c;
          Vec<A> grad[NV];
          windows.gather<NV>(covering, w, c, p.grad_out, p.index, columns, grad);
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) {
            prefetch<1>(x + j * L, kRowsAhead * p.x.pitch);
            const Vec<A> xc = columns.load(x + j * L) - norm[j].mean;
            const Vec<A> dy = relu_mask<A>(norm[j].of_centered(xc), grad[j]);
            sum[j] += dy;
            sum_xc[j] += dy * xc;
          }
        }
        for (int j = 0; j < NV; ++j) sums.add<A>(task, c + j * L, sum[j], sum_xc[j]);
      });
    }
  });
  sums.finish(p.C, affine.rstd, p.grad_weight, p.grad_bias);
}

template <class T>
void bn_relu_max_pool_backward(const BnReluPoolBackward<T>& p, const Pool& pool) {
  using A = Acc<T>;
  Scratch scratch(NormBackward<A>::bytes(p.C) + CoveringWindows::bytes(p.pooling));
  const NormBackward<A> backward(scratch, p.norm, p.grad_weight, p.grad_bias, p.pooling.in_rows(), p.C);
  const CoveringWindows windows(scratch, p.pooling);
  pool.run([&](int task) {
    const Range lines = part(windows.lines(), 1, pool.tasks, task);
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      const CoveringWindows::Line covering = windows.of_line(line);
      for_column_stretches<A>(p.C, [&](int64_t c, auto columns, auto vectors) {
        constexpr int NV = decltype(vectors)::value, L = kLanes<A>;
        typename NormBackward<A>::Columns of[NV];
        for (int j = 0; j < NV; ++j) of[j] = backward.at(c + j * L);
        for (int64_t w = 0; w < windows.width(); ++w) {
          const int64_t row = line * windows.width() + w;
          Vec<A> grad[NV];
          windows.gather<NV>(covering, w, c, p.grad_out, p.index, columns, grad);
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j)
            columns.store(p.grad_x.row(row) + c + j * L, of[j](columns.load(p.x.row(row) + c + j * L), grad[j]));
        }
      });
    }
  });
}
