// A block's product on the plain arithmetic units: float and double.
//
// 16 threads lie along the columns, the others along the rows; a thread's rows and columns are those numbers apart, so
// that neighbouring threads read neighbouring rows (or elements) of an operand. Pitches are an odd number of 16-byte
// pieces: the 8 threads that one 16-byte shared read serves at a time then touch 8 different groups of banks.
#pragma once

#include "pieces.h"

namespace dx::cuda {

template <class A, int M, int N, int THREADS>
struct FmaTile {
  using Sum = A;
  static constexpr int kAcross = 16, kDown = THREADS / kAcross;
  static constexpr int kRows = M / kDown, kColumns = N / kAcross;
  static constexpr int kStep = 16 / sizeof(A);  // k of one shared read
  static_assert(kRows * kDown == M && kColumns * kAcross == N, "threads cover the tile");

  A sum[kRows][kColumns];

  static __device__ __forceinline__ int first_row() { return thread_x() / kAcross; }
  static __device__ __forceinline__ int first_column() { return thread_x() % kAcross; }

  // The thread's share of the tile: own(i, j) is the sum of row(i), column(j). kRun columns lie side by side, and
  // kSharers threads, of all numbers below that, have the same columns.
  static constexpr int kOwnRows = kRows, kOwnColumns = kColumns, kRun = 1, kSharers = kDown;
  static __device__ __forceinline__ int row(int i) { return first_row() + i * kDown; }
  static __device__ __forceinline__ int column(int j) { return first_column() + j * kAcross; }
  static __device__ __forceinline__ int sharer() { return first_row(); }
  __device__ __forceinline__ A own(int i, int j) const { return sum[i][j]; }

  // Each sum begins as start(its column).
  template <class F>
  __device__ __forceinline__ void begin(const F& start) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const A value = start(first_column() + j * kAcross);
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum[i][j] = value;
    }
  }

  // sum[m, n] += sum over k of a(m, k) b(n, k), both in shared memory. An operand is [rows, K] where k is its inner
  // dimension, else [K, rows].
  template <int K, Inner LEFT, Inner RIGHT>
  __device__ __forceinline__ void multiply(const A* a, int a_pitch, const A* b, int b_pitch) {
    static_assert(K % kStep == 0, "whole steps");
#pragma unroll 1
    for (int k = 0; k < K; k += kStep) {
      Piece<A, kStep> right[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) right[j] = load<RIGHT>(b, b_pitch, first_column() + j * kAcross, k);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const Piece<A, kStep> left = load<LEFT>(a, a_pitch, first_row() + i * kDown, k);
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
#pragma unroll
          for (int e = 0; e < kStep; ++e) sum[i][j] += left.v[e] * right[j].v[e];
      }
    }
  }

  // out[row * pitch + column] = f(sum), for the thread's share of the tile
  template <class T, class F>
  __device__ __forceinline__ void store(T* out, int64_t pitch, const F& f) const {
    out += first_row() * pitch + first_column();
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) store_one(out + i * kDown * pitch + j * kAcross, narrow<T>(f(sum[i][j])));
  }

 private:
  template <Inner INNER>
  static __device__ __forceinline__ Piece<A, kStep> load(const A* operand, int pitch, int row, int k) {
    if constexpr (INNER == Inner::k) {
      return load_piece<kStep>(operand + row * pitch + k);
    } else {
      Piece<A, kStep> piece;
#pragma unroll
      for (int e = 0; e < kStep; ++e) piece.v[e] = load_one(operand + (k + e) * pitch + row);
      return piece;
    }
  }
};

}  // namespace dx::cuda
