// Pieces of rows in registers, and the products' choice of arithmetic.
#pragma once

#include <cstring>

#include "device.h"

namespace dx::cuda {

// The inner, contiguous dimension of a product's operand: k, over which is summed, or its rows (or columns).
enum class Inner { k, rows };

// E neighbouring elements of a row. get() gives an element in the arithmetic type.
template <class T, int E>
struct Piece {
  static constexpr int kBytes = E * int(sizeof(T));
  T v[E];

  __device__ __forceinline__ Acc<T> get(int e) const { return v[e]; }
  __device__ __forceinline__ T raw(int e) const { return v[e]; }
  __device__ __forceinline__ void set_zero(int e, T value) { v[e] = value; }  // where 0 was
  static __device__ __forceinline__ Piece narrowed(const Piece<Acc<T>, E>& values) { return values; }
  __device__ __forceinline__ void keep(bool kept) {  // or zeros
#pragma unroll
    for (int e = 0; e < E; ++e) v[e] = kept ? v[e] : T(0);
  }
};

// Elements of 16 bits stay packed as they come: the compiler would give each a register of its own.
template <class T, int E>
struct HalfPiece {
  static constexpr int kBytes = 2 * E;
  uint32_t pairs[E / 2];

  __device__ __forceinline__ T raw(int e) const { return T{uint16_t(pairs[e / 2] >> (e % 2 * 16))}; }
  __device__ __forceinline__ void set_zero(int e, T value) { pairs[e / 2] |= uint32_t(value.bits) << (e % 2 * 16); }
  __device__ __forceinline__ void keep(bool kept) {
#pragma unroll
    for (int i = 0; i < E / 2; ++i) pairs[i] = kept ? pairs[i] : 0;
  }
  static __device__ __forceinline__ Piece<T, E> narrowed(const Piece<float, E>& values) {
    Piece<T, E> piece;
#pragma unroll
    for (int e = 0; e < E; e += 2) piece.pairs[e / 2] = pack2<T>(values.v[e], values.v[e + 1]);
    return piece;
  }
  static __device__ __forceinline__ Piece<T, E> narrowed_relu(const Piece<float, E>& values) {
    Piece<T, E> piece;
#pragma unroll
    for (int e = 0; e < E; e += 2) piece.pairs[e / 2] = pack2_relu<T>(values.v[e], values.v[e + 1]);
    return piece;
  }
};
template <int E>
struct Piece<bfloat16, E> : HalfPiece<bfloat16, E> {
  __device__ __forceinline__ float get(int e) const {
    return as_float(e % 2 ? this->pairs[e / 2] & 0xffff0000u : this->pairs[e / 2] << 16);
  }
};
template <int E>
struct Piece<float16, E> : HalfPiece<float16, E> {
  __device__ __forceinline__ float get(int e) const { return widen(this->raw(e)); }
};

// The address must be aligned to the piece, or to 16 bytes.
template <int E, class T>
__device__ __forceinline__ Piece<T, E> load_piece(const T* p) {
  using P = Piece<T, E>;
  P piece;
  static_assert(P::kBytes == 4 || P::kBytes == 8 || P::kBytes % 16 == 0, "vector accesses");
  if constexpr (P::kBytes == 4) {
    const uint32_t bits = load4(p);
    memcpy(&piece, &bits, 4);
  } else if constexpr (P::kBytes == 8) {
    const uint2 bits = load8(p);
    memcpy(&piece, &bits, 8);
  } else {
    uint4 bits[P::kBytes / 16];
#pragma unroll
    for (int i = 0; i < P::kBytes / 16; ++i) bits[i] = load16(p + i * (16 / int(sizeof(T))));
    memcpy(&piece, bits, sizeof piece);
  }
  return piece;
}
template <class T, int E>
__device__ __forceinline__ void store_piece(T* p, const Piece<T, E>& piece) {
  using P = Piece<T, E>;
  static_assert(P::kBytes == 4 || P::kBytes == 8 || P::kBytes % 16 == 0, "vector accesses");
  if constexpr (P::kBytes == 4) {
    uint32_t bits;
    memcpy(&bits, &piece, 4);
    store4(p, bits);
  } else if constexpr (P::kBytes == 8) {
    uint2 bits;
    memcpy(&bits, &piece, 8);
    store8(p, bits);
  } else {
    uint4 bits[P::kBytes / 16];
    memcpy(bits, &piece, sizeof piece);
#pragma unroll
    for (int i = 0; i < P::kBytes / 16; ++i) store16(p + i * (16 / int(sizeof(T))), bits[i]);
  }
}

// Rows of any pitch and offset: the largest power of two up to 16 that divides every row's address.
template <class T>
inline int alignment_of(const T* data, int64_t pitch) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(pitch) * sizeof(T) | 16u;
  return static_cast<int>(bits & (~bits + 1));
}

// Whether rows of so many columns consist of whole pieces that are aligned to their bytes, at most 16.
template <int E, class T>
bool whole_pieces(int64_t columns, int alignment) {
  return columns % E == 0 && alignment >= (Piece<T, E>::kBytes < 16 ? Piece<T, E>::kBytes : 16);
}

// The first `valid` elements of a piece, zeros behind them, for rows in global memory: by the widest accesses that the
// alignment allows. WHOLE: it is known of all rows of a launch that they consist of whole pieces.
template <int E, bool WHOLE, class T>
__device__ __forceinline__ Piece<T, E> load_piece(const T* p, int valid, int alignment) {
  using P = Piece<T, E>;
  P piece = {};
  if (valid >= E && (WHOLE || alignment >= (P::kBytes < 16 ? P::kBytes : 16))) {
    piece = load_piece<E>(p);
  } else if constexpr (!WHOLE) {
    if (valid >= E && alignment == 8) {
      uint2 bits[(P::kBytes + 7) / 8];
#pragma unroll
      for (int i = 0; i < P::kBytes / 8; ++i) bits[i] = load8(p + i * (8 / int(sizeof(T))));
      memcpy(&piece, bits, sizeof piece);
    } else if (sizeof(T) < 4 && valid >= E && alignment == 4) {
      uint32_t bits[(P::kBytes + 3) / 4];
#pragma unroll
      for (int i = 0; i < P::kBytes / 4; ++i) bits[i] = load4(p + i * (4 / int(sizeof(T))));
      memcpy(&piece, bits, sizeof piece);
    } else {
#pragma unroll
      for (int e = 0; e < E; ++e)
        if (e < valid) piece.set_zero(e, load_one(p + e));
    }
  }
  return piece;
}
template <bool WHOLE, class T, int E>
__device__ __forceinline__ void store_piece(T* p, const Piece<T, E>& piece, int valid, int alignment) {
  using P = Piece<T, E>;
  static_assert(P::kBytes % 8 == 0, "vector accesses");
  if (P::kBytes % 16 == 0 && valid >= E && (WHOLE || alignment == 16)) {
    uint4 bits[(P::kBytes + 15) / 16];
    memcpy(bits, &piece, sizeof piece);
#pragma unroll
    for (int i = 0; i < P::kBytes / 16; ++i) store_global16(p + i * (16 / int(sizeof(T))), bits[i]);
  } else if (valid >= E && (WHOLE ? P::kBytes % 16 != 0 : alignment >= 8)) {
    uint2 bits[P::kBytes / 8];
    memcpy(bits, &piece, sizeof piece);
#pragma unroll
    for (int i = 0; i < P::kBytes / 8; ++i) store_global8(p + i * (8 / int(sizeof(T))), bits[i]);
  } else if constexpr (!WHOLE) {
    if (sizeof(T) < 4 && valid >= E && alignment == 4) {
      uint32_t bits[(P::kBytes + 3) / 4];
      memcpy(bits, &piece, sizeof piece);
#pragma unroll
      for (int i = 0; i < P::kBytes / 4; ++i) store4(p + i * (4 / int(sizeof(T))), bits[i]);
    } else {
#pragma unroll
      for (int e = 0; e < E; ++e)
        if (e < valid) store_one(p + e, piece.raw(e));
    }
  }
}

}  // namespace dx::cuda
