// The transforms of Winograd's F(OxO, 3x3) along one dimension: B^T, A^T and G of Lavin and Gray, and the transposes A
// and G^T, which the gradients take. I = O + 2 points are interpolated.
#pragma once

template <int O>
struct Winograd;

// From the points 0, 1, -1 and infinity: additions, and halves of the weights.
template <>
struct Winograd<2> {
  using V = Vec<float>;
  static constexpr int kPoints = 16;
  // Cycles, about, for a vector of columns of a tile.
  static constexpr double kInputCycles = 200, kOutputCycles = 100, kWeightCycles = 40;

  static DX_INLINE void inputs(const V (&d)[4], V (&u)[4]) {
    u[0] = d[0] - d[2];
    u[1] = d[1] + d[2];
    u[2] = d[2] - d[1];
    u[3] = d[1] - d[3];
  }
  static DX_INLINE void outputs(const V (&m)[4], V (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
  static DX_INLINE void weights(const V (&w)[3], V (&to)[4]) {
    const V half = broadcast(0.5f), ends = (w[0] + w[2]) * half, middle = w[1] * half;
    to[0] = w[0];
    to[1] = ends + middle;
    to[2] = ends - middle;
    to[3] = w[2];
  }
  static DX_INLINE void gradients(const V (&g)[2], V (&v)[4]) {
    v[0] = g[0];
    v[1] = g[0] + g[1];
    v[2] = g[0] - g[1];
    v[3] = -g[1];
  }
  static DX_INLINE void taps(const V (&m)[4], V (&to)[3]) {
    const V half = broadcast(0.5f), sum = (m[1] + m[2]) * half;
    to[0] = m[0] + sum;
    to[1] = (m[1] - m[2]) * half;
    to[2] = sum + m[3];
  }
};

// From the points 0, 1, -1, 2, -2 and infinity. Their powers up to 8 cost some three bits of a float's sum, which a
// number stored in 16 bits never shows.
template <>
struct Winograd<4> {
  using V = Vec<float>;
  static constexpr int kPoints = 36;
  static constexpr double kInputCycles = 300, kOutputCycles = 250, kWeightCycles = 100;

  static DX_INLINE void inputs(const V (&d)[6], V (&u)[6]) {
    const V two = broadcast(2.f), four = broadcast(4.f), five = broadcast(5.f);
    const V even = d[4] - four * d[2], odd = d[3] - four * d[1];
    const V next_even = d[4] - d[2], next_odd = d[3] - d[1];
    u[0] = four * d[0] + (d[4] - five * d[2]);
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = next_even + two * next_odd;
    u[4] = next_even - two * next_odd;
    u[5] = four * d[1] + (d[5] - five * d[3]);
  }
  static DX_INLINE void outputs(const V (&m)[6], V (&y)[4]) {
    const V two = broadcast(2.f), four = broadcast(4.f), eight = broadcast(8.f);
    const V even = m[1] + m[2], odd = m[1] - m[2], next_even = m[3] + m[4], next_odd = m[3] - m[4];
    y[0] = m[0] + even + next_even;
    y[1] = odd + two * next_odd;
    y[2] = even + four * next_even;
    y[3] = odd + eight * next_odd + m[5];
  }
  static DX_INLINE void weights(const V (&w)[3], V (&to)[6]) {
    const V ends = (w[0] + w[2]) * broadcast(-1.f / 6), middle = w[1] * broadcast(-1.f / 6);
    const V next_ends = w[0] * broadcast(1.f / 24) + w[2] * broadcast(1.f / 6),
            next_middle = w[1] * broadcast(1.f / 12);
    to[0] = w[0] * broadcast(0.25f);
    to[1] = ends + middle;
    to[2] = ends - middle;
    to[3] = next_ends + next_middle;
    to[4] = next_ends - next_middle;
    to[5] = w[2];
  }
  static DX_INLINE void gradients(const V (&g)[4], V (&v)[6]) {
    const V two = broadcast(2.f), four = broadcast(4.f);
    const V even = g[0] + g[2], odd = g[1] + g[3];
    const V next_even = g[0] + four * g[2], next_odd = two * (g[1] + four * g[3]);
    v[0] = g[0];
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = next_even + next_odd;
    v[4] = next_even - next_odd;
    v[5] = g[3];
  }
  static DX_INLINE void taps(const V (&m)[6], V (&to)[3]) {
    const V sixth = broadcast(1.f / 6);
    const V even = (m[1] + m[2]) * sixth, odd = (m[2] - m[1]) * sixth;
    const V next_even = (m[3] + m[4]) * sixth, next_odd = (m[3] - m[4]) * sixth;
    to[0] = broadcast(0.25f) * (m[0] + next_even) - even;
    to[1] = odd + broadcast(0.5f) * next_odd;
    to[2] = (next_even - even) + m[5];
  }
};
