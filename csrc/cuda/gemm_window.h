// A block's sums for the gradient of a window's weights: for each tap t of a plane
//   sum[t, n, c] += sum over a tile's rows r of g(r, n) y(row under tap t of r, c)
// g lies in shared memory as [rows, CHANNELS]; y's rows are where `under` says: under.inside(r) has a bit for each tap
// inside of the image, under.row(r, inside, t) is the address. A warp (16 threads on the plain units) has a few columns
// of all channels and taps, so that it reads each row of g once for all of them.
#pragma once

#include "conv1x1_common.h"

namespace dx::cuda {

constexpr int kMostTaps = 9;

// Calls f(constant) for the taps of a plane, 3 or 9: sums stay in registers only by constant indices.
template <class F>
__device__ __forceinline__ void for_taps(int taps, const F& f) {
#pragma unroll
  for (int t = 0; t < kMostTaps; ++t)
    if (t < taps) f(t);
}

template <class Math, int CHANNELS, int COLUMNS>
struct WindowTile;

// 16 columns a warp: m16n8k16 with k along the rows; both operands come transposed.
template <class T, int CHANNELS, int COLUMNS>
struct WindowTile<TensorMath<T>, CHANNELS, COLUMNS> {
  static constexpr int kTiles = CHANNELS / 16;
  static_assert(kTiles * 16 == CHANNELS && COLUMNS == 16 * 8, "16 columns for each of 8 warps");
  float sum[kMostTaps][kTiles][2][4];

  __device__ __forceinline__ void clear() {
    for_taps(kMostTaps, [&](int t) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[t][i][e / 4][e % 4] = 0;
    });
  }
  template <int ROWS, class Under>
  __device__ __forceinline__ void multiply(int taps, const T* g, int g_pitch, const Under& under) {
    const int lane = thread_x() % 32, low = lane % 8, half = lane / 8 % 2 * 8, quarter = lane / 16 * 8;
    const int column = thread_x() / 32 * 16 + quarter;
#pragma unroll 1
    for (int r = 0; r < ROWS; r += 16) {
      uint32_t left[kTiles][4];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) ldmatrix_x4_trans(left[i], g + (r + low + quarter) * g_pitch + i * 16 + half);
      const int row = r + low + half;
      const uint32_t inside = under.inside(row);
      for_taps(taps, [&](int t) {
        uint32_t right[4];
        ldmatrix_x4_trans(right, under.row(row, inside, t) + column);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          mma_m16n8k16<T>(sum[t][i][0], left[i], {right[0], right[1]});
          mma_m16n8k16<T>(sum[t][i][1], left[i], {right[2], right[3]});
        }
      });
    }
  }
  // out[t, n, c] = sum, with distances of `tap` and `channel`
  __device__ __forceinline__ void store(int taps, float* out, int64_t tap, int64_t channel) const {
    const int lane = thread_x() % 32;
    out += lane / 4 * channel + thread_x() / 32 * 16 + lane % 4 * 2;
    for_taps(taps, [&](int t) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < 4; e += 2)
            store_piece(out + t * tap + (i * 16 + e * 4) * channel + j * 8,
                        Piece<float, 2>{sum[t][i][j][e], sum[t][i][j][e + 1]});
    });
  }
};

// 8 columns a warp: m16n8k8.
template <int CHANNELS, int COLUMNS>
struct WindowTile<Tf32Math, CHANNELS, COLUMNS> {
  static constexpr int kTiles = CHANNELS / 16;
  static_assert(kTiles * 16 == CHANNELS && COLUMNS == 8 * 8, "8 columns for each of 8 warps");
  float sum[kMostTaps][kTiles][4];

  __device__ __forceinline__ void clear() {
    for_taps(kMostTaps, [&](int t) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[t][i][e] = 0;
    });
  }
  template <int ROWS, class Under>
  __device__ __forceinline__ void multiply(int taps, const float* g, int g_pitch, const Under& under) {
    const int lane = thread_x() % 32, group = lane / 4, four = lane % 4;
    const int column = thread_x() / 32 * 8 + group;
#pragma unroll 1
    for (int r = 0; r < ROWS; r += 8) {
      uint32_t left[kTiles][4];
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          left[i][e] = as_bits(load_one(g + (r + four + e / 2 * 4) * g_pitch + i * 16 + group + e % 2 * 8));
      const uint32_t inside[2] = {under.inside(r + four), under.inside(r + four + 4)};
      for_taps(taps, [&](int t) {
        const uint32_t right[2] = {as_bits(load_one(under.row(r + four, inside[0], t) + column)),
                                   as_bits(load_one(under.row(r + four + 4, inside[1], t) + column))};
#pragma unroll
        for (int i = 0; i < kTiles; ++i) mma_m16n8k8_tf32(sum[t][i], left[i], right);
      });
    }
  }
  __device__ __forceinline__ void store(int taps, float* out, int64_t tap, int64_t channel) const {
    const int lane = thread_x() % 32;
    out += lane / 4 * channel + thread_x() / 32 * 8 + lane % 4 * 2;
    for_taps(taps, [&](int t) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; e += 2)
          store_piece(out + t * tap + (i * 16 + e * 4) * channel, Piece<float, 2>{sum[t][i][e], sum[t][i][e + 1]});
    });
  }
};

// 16 threads along the columns, 16 along the channels.
template <class A, int CHANNELS, int COLUMNS>
struct WindowTile<PlainMath<A>, CHANNELS, COLUMNS> {
  static constexpr int kDown = CHANNELS / 16, kAcross = COLUMNS / 16;
  A sum[kMostTaps][kDown][kAcross];

  __device__ __forceinline__ void clear() {
    for_taps(kMostTaps, [&](int t) {
#pragma unroll
      for (int i = 0; i < kDown; ++i)
#pragma unroll
        for (int j = 0; j < kAcross; ++j) sum[t][i][j] = 0;
    });
  }
  template <int ROWS, class Under>
  __device__ __forceinline__ void multiply(int taps, const A* g, int g_pitch, const Under& under) {
    const int channel = thread_x() / 16, column = thread_x() % 16;
#pragma unroll 1
    for (int r = 0; r < ROWS; ++r) {
      A left[kDown];
#pragma unroll
      for (int i = 0; i < kDown; ++i) left[i] = load_one(g + r * g_pitch + channel + i * 16);
      const uint32_t inside = under.inside(r);
      for_taps(taps, [&](int t) {
        const A* const y = under.row(r, inside, t) + column;
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          const A right = load_one(y + j * 16);
#pragma unroll
          for (int i = 0; i < kDown; ++i) sum[t][i][j] += left[i] * right;
        }
      });
    }
  }
  __device__ __forceinline__ void store(int taps, A* out, int64_t tap, int64_t channel) const {
    out += thread_x() / 16 * channel + thread_x() % 16;
    for_taps(taps, [&](int t) {
#pragma unroll
      for (int i = 0; i < kDown; ++i)
#pragma unroll
        for (int j = 0; j < kAcross; ++j) store_one(out + t * tap + i * 16 * channel + j * 16, sum[t][i][j]);
    });
  }
};

}  // namespace dx::cuda
