// A block's product whose left operand's rows lie anywhere in shared memory: a convolution's, where a row is a pixel
// under one tap of the window. Otherwise as gemm_mma.h and gemm_fma.h have it: sum[m, n] += sum over k of
// a(m, k) b(n, k), k being the inner dimension of both.
//
// A thread gives the addresses of kLeft rows, those numbered left(0), left(1), ... of the tile.
#pragma once

#include "gemm_fma.h"
#include "gemm_mma.h"

namespace dx::cuda {

// T: bfloat16 or float16. An ldmatrix takes 16 rows, whose addresses come from lanes 0 to 15, and again, 8 elements
// further, from lanes 16 to 31.
template <class T, int M, int N, int THREADS, int WARPS_DOWN>
struct MmaRowsTile : WarpGrid<M, N, THREADS, WARPS_DOWN> {
  using Grid = WarpGrid<M, N, THREADS, WARPS_DOWN>;
  static constexpr int kStep = 16, kLeft = Grid::kDownTiles;
  static_assert(Grid::kAcrossTiles % 2 == 0, "one ldmatrix loads the right operand of two products");
  static __device__ __forceinline__ int left(int i) { return Grid::first_row() + i * 16 + Grid::lane() % 16; }

  template <int K>
  __device__ __forceinline__ void multiply(const T* const (&rows)[kLeft], const T* b, int b_pitch) {
    static_assert(K % kStep == 0, "whole steps");
    const int quarter = Grid::lane() / 16 * 8;
    b += (Grid::first_column() + Grid::lane() % 8 + quarter) * b_pitch + Grid::lane() / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < K; k += kStep) {
      uint32_t right[Grid::kAcrossTiles / 2][4];
#pragma unroll
      for (int j = 0; j < Grid::kAcrossTiles / 2; ++j) ldmatrix_x4(right[j], b + 16 * j * b_pitch + k);
#pragma unroll
      for (int i = 0; i < Grid::kDownTiles; ++i) {
        uint32_t left[4];
        ldmatrix_x4(left, rows[i] + quarter + k);
#pragma unroll
        for (int j = 0; j < Grid::kAcrossTiles / 2; ++j) {
          mma_m16n8k16<T>(this->sum[i][2 * j], left, {right[j][0], right[j][1]});
          mma_m16n8k16<T>(this->sum[i][2 * j + 1], left, {right[j][2], right[j][3]});
        }
      }
    }
  }
};

template <int M, int N, int THREADS, int WARPS_DOWN>
struct Tf32RowsTile : WarpGrid<M, N, THREADS, WARPS_DOWN> {
  using Grid = WarpGrid<M, N, THREADS, WARPS_DOWN>;
  static constexpr int kStep = 8, kLeft = 2 * Grid::kDownTiles;
  static __device__ __forceinline__ int left(int i) { return Grid::first_row() + i * 8 + Grid::lane() / 4; }

  template <int K>
  __device__ __forceinline__ void multiply(const float* const (&rows)[kLeft], const float* b, int b_pitch) {
    static_assert(K % kStep == 0, "whole steps");
    const int four = Grid::lane() % 4;
    b += (Grid::first_column() + Grid::lane() / 4) * b_pitch + four;
#pragma unroll
    for (int k = 0; k < K; k += kStep) {
      uint32_t left[Grid::kDownTiles][4];
#pragma unroll
      for (int i = 0; i < Grid::kDownTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) left[i][e] = as_bits(load_one(rows[2 * i + e % 2] + four + k + e / 2 * 4));
#pragma unroll
      for (int j = 0; j < Grid::kAcrossTiles; ++j) {
        const uint32_t right[2] = {as_bits(load_one(b + 8 * j * b_pitch + k)),
                                   as_bits(load_one(b + 8 * j * b_pitch + k + 4))};
#pragma unroll
        for (int i = 0; i < Grid::kDownTiles; ++i) mma_m16n8k8_tf32(this->sum[i][j], left[i], right);
      }
    }
  }
};

template <class A, int M, int N, int THREADS>
struct FmaRowsTile : FmaTile<A, M, N, THREADS> {
  using Fma = FmaTile<A, M, N, THREADS>;
  static constexpr int kStep = Fma::kStep, kLeft = Fma::kRows;
  static __device__ __forceinline__ int left(int i) { return Fma::row(i); }

  template <int K>
  __device__ __forceinline__ void multiply(const A* const (&rows)[kLeft], const A* b, int b_pitch) {
    static_assert(K % kStep == 0, "whole steps");
#pragma unroll 1
    for (int k = 0; k < K; k += kStep) {
      Piece<A, kStep> right[Fma::kColumns];
#pragma unroll
      for (int j = 0; j < Fma::kColumns; ++j) right[j] = load_piece<kStep>(b + Fma::column(j) * b_pitch + k);
#pragma unroll
      for (int i = 0; i < Fma::kRows; ++i) {
        const Piece<A, kStep> left = load_piece<kStep>(rows[i] + k);
#pragma unroll
        for (int j = 0; j < Fma::kColumns; ++j)
#pragma unroll
          for (int e = 0; e < kStep; ++e) this->sum[i][j] += left.v[e] * right[j].v[e];
      }
    }
  }
};

}  // namespace dx::cuda
