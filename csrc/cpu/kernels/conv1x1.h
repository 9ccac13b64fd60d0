// z = relu(x * s + t) @ W^T: BatchNorm and ReLU as the prologue of the 1x1 convolution. A panel of rows is normalised
// into cache-sized scratch and multiplied from there; the normalised tensor never exists in memory. The output's
// statistics are taken from the panel just written, as stored.
#pragma once

template <class T>
void bn_relu_conv1x1(const BnReluConv1x1<T>& p, const Pool& pool) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t pitch = panel_pitch<A>(p.C), panel = panel_rows<A>(pitch), Np = padded<A>(p.N);
  Scratch scratch(Affine<A>::bytes(p.C) + Scratch::bytes<A>(packed_size<A>(p.C, p.N)) + Scratch::bytes<A>(Np) +
                  Scratch::bytes<A>(pool.tasks * panel * pitch) + TaskMoments::bytes(pool.tasks, p.N));
  const Affine<A> affine(scratch, p.norm, p.C);
  A* packed = scratch.take<A>(packed_size<A>(p.C, p.N));
  A* bias = scratch.take<A>(Np);
  std::fill_n(bias, Np, A(0));
  if (p.out_bias) std::copy_n(p.out_bias, p.N, bias);
  A* panels = scratch.take<A>(pool.tasks * panel * pitch);
  const TaskMoments moments(scratch, pool.tasks, p.N);
  pack_right(p.weight, p.C, p.N, 1, p.C, packed, pool);

  pool.run([&](int task) {
    A* y = panels + task * panel * pitch;
    MomentsSum sum = moments[task];
    for_panels(part(p.M, kTileRows, pool.tasks, task), panel, [&](int64_t m0, int64_t rows) {
      normalise_panel<T>(affine, p.x, m0, rows, p.C, y, pitch);
      for_column_blocks<A>(p.N, [&](int64_t n, auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        const A* right = packed + n * p.C;  // block n / kTileColumns, each C * kTileColumns long
        for (int64_t r0 = 0; r0 < rows; r0 += kTileRows) {
          Vec<A> acc[kTileRows][NV];
          tile_product<NV, 0, 1>(p.C, y + r0 * pitch, pitch, 1, right, kTileColumns<A>, acc);
#pragma GCC unroll 16
          for (int r = 0; r < kTileRows; ++r) {
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
      if (p.out_mean) sum.add_panel(p.out.row(m0), p.out.pitch, rows, p.N);
    });
  });
  if (p.out_mean) moments.finish(p.N, p.out_mean, p.out_var);
}
