// The backward pass of z = relu(x * s + t) @ W^T in one pass over x and G: for each panel of rows
//   dz    (through norm2 and its ReLU, when grad_out is the gradient behind them)
//   y   = relu(x * s + t)                       recomputed
//   dW += dz^T @ y                              one sum per task
//   dy  = (dz @ W) masked by y > 0              never stored
//   G   = s * dy + (G | grad_in | 0),  sum(dy),  sum(dy (x - m))
#pragma once

template <class A>
struct DenseBackwardShape {
  int64_t y_pitch, dz_pitch, panel, wgrad_rows;
  DenseBackwardShape(int64_t C, int64_t N)
      : y_pitch(panel_pitch<A>(C)),
        dz_pitch(std::max(panel_pitch<A>(N), whole_tiles(N))),
        panel(panel_rows<A>(std::max(y_pitch, dz_pitch))),
        wgrad_rows(whole_tiles(N)) {}
  static int64_t whole_tiles(int64_t n) { return (n + kTileRows - 1) / kTileRows * kTileRows; }
};

// dz for the rows of a panel, zero up to the next whole tile in both directions.
template <class T, class A = Acc<T>>
DX_INLINE void fill_dz(const BnReluConv1x1Backward<T>& p, const NormBackward<A>* norm2, int64_t m0, int64_t rows, A* dz,
                       int64_t pitch) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* grad = p.grad_out.row(m0 + r);
    const T* z = norm2 ? p.z.row(m0 + r) : nullptr;
    A* out = dz + r * pitch;
    for_columns<A>(p.N, [&](int64_t c, auto columns) {
      Vec<A> g = columns.load(grad + c);
      if (norm2) g = (*norm2)(columns.load(z + c), g, c);
      store_vec(out + c, g);
    });
    for (int64_t c = p.N; c < pitch; ++c) out[c] = A(0);
  }
  const int64_t whole = DenseBackwardShape<A>::whole_tiles(rows);
  for (int64_t r = rows; r < whole; ++r) std::fill_n(dz + r * pitch, pitch, A(0));
}

// dW[i, c] += sum over the panel's rows of dz[row, i] * y[row, c]; a tile's rows are output channels here.
template <class A>
DX_INLINE void add_wgrad(const DenseBackwardShape<A>& shape, int64_t C, int64_t rows, const A* dz, const A* y,
                         A* wgrad) {
  for_column_blocks<A>(C, [&](int64_t c, auto vectors) {
    constexpr int NV = decltype(vectors)::value;
    for (int64_t i = 0; i < shape.wgrad_rows; i += kTileRows) {
      Vec<A> acc[kTileRows][NV];
      tile_product<NV, 1, 0>(rows, dz + i, 1, shape.dz_pitch, y + c, shape.y_pitch, acc);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
          A* w = wgrad + (i + r) * shape.y_pitch + c + j * kLanes<A>;
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
  const A* y;
  int64_t x_pitch, in_pitch, out_pitch, y_pitch;
  int width;  // columns of this vector that exist
  Vec<A> center, scale, sum, sum_xc;

  DgradColumns() = default;
  DgradColumns(const BnReluConv1x1Backward<T>& p, const Affine<A>& affine, const A* mean, int64_t m0, int64_t c,
               const A* y_panel, int64_t y_pitch_)
      : x(p.x.row(m0) + c),
        in(p.grad_in      ? p.grad_in.row(m0) + c
           : p.accumulate ? p.grad_x.row(m0) + c
                          : nullptr),
        out(p.grad_x.row(m0) + c),
        y(y_panel + c),
        x_pitch(p.x.pitch),
        in_pitch(p.grad_in ? p.grad_in.pitch : p.grad_x.pitch),
        out_pitch(p.grad_x.pitch),
        y_pitch(y_pitch_),
        width(int(std::min<int64_t>(kLanes<A>, p.C - c))),
        center(load_vec(mean + c)),
        scale(load_vec(affine.scale + c)),
        sum{},
        sum_xc{} {}

  // G comes from memory, not from the cache: asked for before the product, it is there when the product is done.
  DX_INLINE void prefetch_tile(int64_t r0, int64_t rows) const {
    if (!in) return;
    for (int64_t r = r0; r < r0 + rows; ++r) __builtin_prefetch(in + r * in_pitch);
  }
  DX_INLINE void add_tile(const A (&tile)[kTileRows][kLanes<A>], int64_t r0, int64_t rows) {
    if (width == kLanes<A>)
      add_tile(tile, r0, rows, Whole{});
    else
      add_tile(tile, r0, rows, Part{width});
  }
  template <class Columns>
  DX_INLINE void add_tile(const A (&tile)[kTileRows][kLanes<A>], int64_t r0, int64_t rows, Columns columns) {
    Vec<A> s = sum, s_xc = sum_xc;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = r0 + r;
      const Vec<A> dy = relu_mask<A>(load_vec(y + row * y_pitch), load_vec(tile[r]));
      s += dy;
      s_xc += dy * (columns.load(x + row * x_pitch) - center);
      Vec<A> g = dy * scale;
      if (in) g += columns.load(in + row * in_pitch);
      columns.store(out + row * out_pitch, g);
    }
    sum = s;
    sum_xc = s_xc;
  }
};

template <class T>
void bn_relu_conv1x1_backward(const BnReluConv1x1Backward<T>& p, const Pool& pool) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const DenseBackwardShape<A> shape(p.C, p.N);
  const bool want_wgrad = p.grad_conv_weight != nullptr;
  const int64_t wgrad_size = want_wgrad ? shape.wgrad_rows * shape.y_pitch : 0;
  const int64_t y_size = shape.panel * shape.y_pitch, dz_size = shape.panel * shape.dz_pitch;
  Scratch scratch(Affine<A>::bytes(p.C) + Scratch::bytes<A>(padded<A>(p.C)) + NormBackward<A>::bytes(p.N) +
                  Scratch::bytes<A>(packed_size<A>(p.N, p.C)) +
                  Scratch::bytes<A>(pool.tasks * (y_size + dz_size + wgrad_size)) + TaskSums::bytes(pool.tasks, p.C));
  const Affine<A> affine(scratch, p.norm, p.C);
  const A* mean = padded_copy(scratch, p.norm.mean, p.C);
  // Without z there is no norm2 to go through; an all-zero stand-in keeps one code path.
  const NormBackward<A> norm2(scratch, p.z ? p.z_norm : Norm<A>{p.norm.mean, p.norm.var, nullptr, nullptr, 1.0},
                              p.z_grad_weight, p.z_grad_bias, p.M, p.z ? p.N : 0);
  A* packed = scratch.take<A>(packed_size<A>(p.N, p.C));
  A* of_tasks = scratch.take<A>(pool.tasks * (y_size + dz_size + wgrad_size));
  const TaskSums sums(scratch, pool.tasks, p.C);
  pack_right(p.weight, p.N, p.C, p.C, 1, packed, pool);

  pool.run([&](int task) {
    A *y = of_tasks + task * (y_size + dz_size + wgrad_size), *dz = y + y_size, *wgrad = dz + dz_size;
    std::fill_n(wgrad, wgrad_size, A(0));
    for_panels(part(p.M, kTileRows, pool.tasks, task), shape.panel, [&](int64_t m0, int64_t rows) {
      fill_dz<T>(p, p.z ? &norm2 : nullptr, m0, rows, dz, shape.dz_pitch);
      normalise_panel<T>(affine, p.x, m0, rows, p.C, y, shape.y_pitch);
      if (want_wgrad) add_wgrad<A>(shape, p.C, rows, dz, y, wgrad);

      for_column_blocks<A>(p.C, [&](int64_t n, auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        DgradColumns<T> columns[NV];
        for (int j = 0; j < NV; ++j) columns[j] = DgradColumns<T>(p, affine, mean, m0, n + j * L, y, shape.y_pitch);
        for (int64_t r0 = 0; r0 < rows; r0 += kTileRows) {
          alignas(64) A tile[NV][kTileRows][L];
          const int64_t tile_rows = std::min<int64_t>(kTileRows, rows - r0);
          for (int j = 0; j < NV; ++j) columns[j].prefetch_tile(r0, tile_rows);
          {
            Vec<A> acc[kTileRows][NV];
            tile_product<NV, 0, 1>(p.N, dz + r0 * shape.dz_pitch, shape.dz_pitch, 1, packed + n * p.N, kTileColumns<A>,
                                   acc);
#pragma GCC unroll 16
            for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
              for (int j = 0; j < NV; ++j) store_vec(tile[j][r], acc[r][j]);
          }
          for (int j = 0; j < NV; ++j) columns[j].add_tile(tile[j], r0, tile_rows);
        }
        for (int j = 0; j < NV; ++j) sums.add<A>(task, n + j * L, columns[j].sum, columns[j].sum_xc);
      });
    });
  });

  sums.finish(p.C, affine.rstd, p.grad_weight, p.grad_bias);
  if (p.grad_mean)
    for (int64_t c = 0; c < p.C; ++c) {
      const auto d = bn_statistics_grad<A>(affine.scale[c], affine.rstd[c], A(sums.dy(c)), A(sums.dy_xc(c)));
      p.grad_mean[c] += d.mean;
      p.grad_var[c] += d.var;
    }
  if (want_wgrad)
    for (int64_t i = 0; i < p.N; ++i)
      for (int64_t c = 0; c < p.C; ++c) {
        A total = 0;
        for (int task = 0; task < pool.tasks; ++task)
          total += of_tasks[task * (y_size + dz_size + wgrad_size) + y_size + dz_size + i * shape.y_pitch + c];
        p.grad_conv_weight[i * p.C + c] = total;
      }
}
