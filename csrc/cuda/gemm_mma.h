// A block's product on the tensor cores: bf16 and fp16 by m16n8k16, float as TF32 by m16n8k8, sums in float.
//
// The interface is FmaTile's. The warps lie on the tile as a grid; a warp's part is cut into products of 16 rows x 8
// columns. Fragments as the PTX ISA gives them ("Matrix fragments for mma.m16n8k16" and "...m16n8k8"): with group =
// lane / 4, four = lane % 4, a lane holds rows group and group + 8, columns 2 four and 2 four + 1 of the sums.
#pragma once

#include "pieces.h"

namespace dx::cuda {

template <int M, int N, int THREADS, int WARPS_DOWN>
struct WarpGrid {
  static constexpr int kAcross = THREADS / 32 / WARPS_DOWN;  // warps
  static constexpr int kDownTiles = M / WARPS_DOWN / 16, kAcrossTiles = N / kAcross / 8;
  static_assert(kDownTiles * 16 * WARPS_DOWN == M, "whole products cover the rows");
  static_assert(kAcrossTiles * 8 * kAcross == N, "whole products cover the columns");

  float sum[kDownTiles][kAcrossTiles][4];

  static __device__ __forceinline__ int lane() { return thread_x() % 32; }
  static __device__ __forceinline__ int first_row() { return thread_x() / 32 / kAcross * (kDownTiles * 16); }
  static __device__ __forceinline__ int first_column() { return thread_x() / 32 % kAcross * (kAcrossTiles * 8); }

  // The thread's share, as FmaTile has it.
  static constexpr int kOwnRows = 2 * kDownTiles, kOwnColumns = 2 * kAcrossTiles, kRun = 2, kSharers = 8 * WARPS_DOWN;
  static __device__ __forceinline__ int row(int i) { return first_row() + lane() / 4 + i * 8; }
  static __device__ __forceinline__ int column(int j) { return first_column() + lane() % 4 * 2 + j / 2 * 8 + j % 2; }
  static __device__ __forceinline__ int sharer() { return thread_x() / 32 / kAcross * 8 + lane() / 4; }
  __device__ __forceinline__ float own(int i, int j) const { return sum[i / 2][j / 2][i % 2 * 2 + j % 2]; }

  // Each sum begins as start(its column).
  template <class F>
  __device__ __forceinline__ void begin(const F& start) {
    const int column = first_column() + lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kAcrossTiles; ++j) {
      const float first = start(column + j * 8), second = start(column + j * 8 + 1);
#pragma unroll
      for (int i = 0; i < kDownTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][j][e] = e % 2 ? second : first;
    }
  }

  // out[row * pitch + column] = f(sum), for the thread's share of the tile
  template <class T, class F>
  __device__ __forceinline__ void store(T* out, int64_t pitch, const F& f) const {
    out += (first_row() + lane() / 4) * pitch + first_column() + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kDownTiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; e += 2)
#pragma unroll
        for (int j = 0; j < kAcrossTiles; ++j) {
          const Piece<float, 2> pair = {f(sum[i][j][e]), f(sum[i][j][e + 1])};
          store_piece(out + (i * 16 + e * 4) * pitch + j * 8, Piece<T, 2>::narrowed(pair));
        }
  }
};

// T: bfloat16 or float16
template <class T, int M, int N, int THREADS, int WARPS_DOWN>
struct MmaTile : WarpGrid<M, N, THREADS, WARPS_DOWN> {
  using Grid = WarpGrid<M, N, THREADS, WARPS_DOWN>;
  using Sum = float;
  static constexpr int kStep = 16;  // k of one product
  static_assert(Grid::kAcrossTiles % 2 == 0, "one ldmatrix loads the right operand of two products");

  // Matrices of 8 x 8 in the order in which the fragments want them: left (rows, k), (rows + 8, k), (rows, k + 8),
  // (rows + 8, k + 8); right (n, k), (n, k + 8), (n + 8, k), (n + 8, k + 8). Where k lies outside they are transposed
  // on their way into the registers.
  template <int K, Inner LEFT, Inner RIGHT>
  __device__ __forceinline__ void multiply(const T* a, int a_pitch, const T* b, int b_pitch) {
    static_assert(K % kStep == 0, "whole steps");
    constexpr bool A_K = LEFT == Inner::k, B_K = RIGHT == Inner::k;
    const int low = Grid::lane() % 8, half = Grid::lane() / 8 % 2 * 8, quarter = Grid::lane() / 16 * 8;
    a += A_K ? (Grid::first_row() + low + half) * a_pitch + quarter
             : (low + quarter) * a_pitch + Grid::first_row() + half;
    b += B_K ? (Grid::first_column() + low + quarter) * b_pitch + half
             : (low + half) * b_pitch + Grid::first_column() + quarter;
    const int a_tile = A_K ? 16 * a_pitch : 16, a_step = A_K ? kStep : kStep * a_pitch;
    const int b_tile = B_K ? 8 * b_pitch : 8, b_step = B_K ? kStep : kStep * b_pitch;
#pragma unroll 2
    for (int k = 0; k < K / kStep; ++k) {
      // The operand with fewer registers is kept for the step, the other one streams through.
      uint32_t right[Grid::kAcrossTiles / 2][4];
#pragma unroll
      for (int j = 0; j < Grid::kAcrossTiles / 2; ++j) load<B_K>(right[j], b + k * b_step + 2 * j * b_tile);
#pragma unroll
      for (int i = 0; i < Grid::kDownTiles; ++i) {
        uint32_t left[4];
        load<A_K>(left, a + k * a_step + i * a_tile);
#pragma unroll
        for (int j = 0; j < Grid::kAcrossTiles / 2; ++j) {
          mma_m16n8k16<T>(this->sum[i][2 * j], left, {right[j][0], right[j][1]});
          mma_m16n8k16<T>(this->sum[i][2 * j + 1], left, {right[j][2], right[j][3]});
        }
      }
    }
  }

 private:
  template <bool K_INNER>
  static __device__ __forceinline__ void load(uint32_t (&matrices)[4], const T* row) {
    if constexpr (K_INNER)
      ldmatrix_x4(matrices, row);
    else
      ldmatrix_x4_trans(matrices, row);
  }
};

template <int M, int N, int THREADS, int WARPS_DOWN>
struct Tf32Tile : WarpGrid<M, N, THREADS, WARPS_DOWN> {
  using Grid = WarpGrid<M, N, THREADS, WARPS_DOWN>;
  using Sum = float;
  static constexpr int kStep = 8;

  // Left: (group, four), (group + 8, four), (group, four + 4), (group + 8, four + 4); right: (group, four), (group,
  // four + 4), as (row or column, k).
  template <int K, Inner LEFT, Inner RIGHT>
  __device__ __forceinline__ void multiply(const float* a, int a_pitch, const float* b, int b_pitch) {
    static_assert(K % kStep == 0, "whole steps");
    const int a_row = LEFT == Inner::k ? a_pitch : 1, a_k = LEFT == Inner::k ? 1 : a_pitch;
    const int b_row = RIGHT == Inner::k ? b_pitch : 1, b_k = RIGHT == Inner::k ? 1 : b_pitch;
    a += (Grid::first_row() + Grid::lane() / 4) * a_row + Grid::lane() % 4 * a_k;
    b += (Grid::first_column() + Grid::lane() / 4) * b_row + Grid::lane() % 4 * b_k;
#pragma unroll 2
    for (int k = 0; k < K; k += kStep) {
      uint32_t left[Grid::kDownTiles][4];
#pragma unroll
      for (int i = 0; i < Grid::kDownTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          left[i][e] = as_bits(load_one(a + (i * 16 + e % 2 * 8) * a_row + (k + e / 2 * 4) * a_k));
#pragma unroll
      for (int j = 0; j < Grid::kAcrossTiles; ++j) {
        const uint32_t right[2] = {as_bits(load_one(b + j * 8 * b_row + k * b_k)),
                                   as_bits(load_one(b + j * 8 * b_row + (k + 4) * b_k))};
#pragma unroll
        for (int i = 0; i < Grid::kDownTiles; ++i) mma_m16n8k8_tf32(this->sum[i][j], left[i], right);
      }
    }
  }
};

}  // namespace dx::cuda
