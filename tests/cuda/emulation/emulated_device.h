// The functions of csrc/cuda/device.h on the emulator, with the same names and meanings; and sync_warp, which no kernel
// needs but the emulator's own tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../../../csrc/common.h"
#include "emulated.h"
#include "half.h"

#define DX_SHARED_BYTES(name) unsigned char* name = ::dx::cuda::emulated::shared_bytes()

namespace dx::cuda {

inline int thread_x() { return int(emulated::here().thread); }
inline int block_dim() { return emulated::here().threads; }
inline unsigned block_x() { return emulated::here().block[0]; }
inline unsigned block_y() { return emulated::here().block[1]; }
inline unsigned block_z() { return emulated::here().block[2]; }
inline unsigned grid_y() { return emulated::here().grid[1]; }

inline void sync_block() { emulated::sync_block(); }
inline void sync_warp() { emulated::sync_warp(); }

namespace emulated {
template <class V>
const V& of_lane(const unsigned char* slots, int lane) {
  return *reinterpret_cast<const V*>(slots + size_t(lane) * kSlotBytes);
}
inline int lane() { return thread_x() % kWarp; }
}  // namespace emulated

template <class V>
V shuffle_xor(V v, int mask) {
  const unsigned char* slots = emulated::exchange("shuffle_xor", &v, sizeof v);
  return emulated::of_lane<V>(slots, (emulated::lane() ^ mask) % emulated::kWarp);
}
template <class V>
V shuffle_down(V v, int by) {
  const unsigned char* slots = emulated::exchange("shuffle_down", &v, sizeof v);
  const int from = emulated::lane() + by;
  return from < emulated::kWarp ? emulated::of_lane<V>(slots, from) : v;
}

// ---- memory --------------------------------------------------------------------------------------------------------
template <class T>
T load_one(const T* p) {
  emulated::check_read(p, sizeof(T), alignof(T));
  return *p;
}
template <class T>
void store_one(T* p, T v) {
  emulated::check_write(p, sizeof(T), alignof(T));
  *p = v;
}

// A reference into shared memory whose reads and writes are checked.
template <class T>
class SharedReference {
 public:
  explicit SharedReference(T* p) : p_(p) {}
  operator T() const { return load_one(const_cast<const T*>(p_)); }
  T operator=(T v) const { return store_one(p_, v), v; }
  T operator=(const SharedReference& other) const { return *this = T(other); }
  T operator+=(T v) const { return *this = T(*this) + v; }
  SharedReference(const SharedReference&) = default;

 private:
  T* p_;
};
template <class T>
class Shared {
 public:
  Shared() : p_(nullptr) {}
  explicit Shared(T* p) : p_(p) {}
  template <class I, class = std::enable_if_t<std::is_integral<I>::value>>
  SharedReference<T> operator[](I i) const {
    return SharedReference<T>(p_ + i);
  }
  template <class I, class = std::enable_if_t<std::is_integral<I>::value>>
  Shared operator+(I i) const {
    return Shared(p_ + i);
  }
  SharedReference<T> operator*() const { return SharedReference<T>(p_); }
  operator T*() const { return p_; }

 private:
  T* p_;
};
template <class T>
Shared<T> shared_as(unsigned char* bytes) {
  if (uintptr_t(bytes) % alignof(T) != 0) emulated::fail("shared_as: misaligned");
  return Shared<T>(reinterpret_cast<T*>(bytes));
}

namespace emulated {
template <class V>
V load_vector(const void* p) {
  check_read(p, sizeof(V), sizeof(V));
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
void store_vector(void* p, const V& v) {
  check_write(p, sizeof(V), sizeof(V));
  std::memcpy(p, &v, sizeof v);
}
template <class V>
void store_global(void* p, const V& v) {
  const auto* at = static_cast<const unsigned char*>(p);
  if (at >= shared_bytes() && at < shared_bytes() + kMostShared) fail("store_global: an address of shared memory");
  store_vector(p, v);
}
}  // namespace emulated
inline uint4 load16(const void* p) { return emulated::load_vector<uint4>(p); }
inline uint2 load8(const void* p) { return emulated::load_vector<uint2>(p); }
inline uint32_t load4(const void* p) { return emulated::load_vector<uint32_t>(p); }
inline uint16_t load2(const void* p) { return emulated::load_vector<uint16_t>(p); }
inline void store16(void* p, uint4 v) { emulated::store_vector(p, v); }
inline void store8(void* p, uint2 v) { emulated::store_vector(p, v); }
inline void store4(void* p, uint32_t v) { emulated::store_vector(p, v); }
inline void store2(void* p, uint16_t v) { emulated::store_vector(p, v); }
inline void store_global16(void* p, uint4 v) { emulated::store_global(p, v); }
inline void store_global8(void* p, uint2 v) { emulated::store_global(p, v); }

inline void cp_async16(void* shared, const void* global, int valid) {
  emulated::copy_async(shared, global, 16, size_t(valid));
}
inline void cp_async_commit() { emulated::commit_async(); }
template <int N>
void cp_async_wait() {
  emulated::wait_async(N);
}

// ---- numbers -------------------------------------------------------------------------------------------------------
inline float as_float(uint32_t bits) { return emulated::as<float>(bits); }
inline uint32_t as_bits(float v) { return emulated::as<uint32_t>(v); }
inline float widen(bfloat16 v) { return as_float(uint32_t(v.bits) << 16); }
inline float widen(float16 v) { return emulated::half_to_float(v.bits); }
inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
template <class T>
T narrow(Acc<T> v) {
  if constexpr (sizeof(T) == sizeof(Acc<T>))
    return v;
  else if constexpr (std::is_same<T, bfloat16>::value)
    return {emulated::float_to_bfloat16(v)};
  else
    return {emulated::float_to_half(v)};
}
template <class T>
uint32_t pack2(float first, float second) {
  return uint32_t(narrow<T>(first).bits) | uint32_t(narrow<T>(second).bits) << 16;
}
template <class T>
uint32_t pack2_relu(float first, float second) {
  return pack2<T>(first < 0 ? 0.0f : first, second < 0 ? 0.0f : second);
}
inline uint32_t to_tf32(float v) {
  return std::isfinite(v) ? (as_bits(v) + 0x1000u) & 0xffffe000u : as_bits(v) & 0xffffe000u;
}

// ---- tensor cores --------------------------------------------------------------------------------------------------
namespace emulated {
inline void ldmatrix(const char* name, uint32_t (&r)[4], const void* row, bool trans) {
  check_read(row, 16, 16);
  const unsigned char* slots = exchange(name, &row, sizeof row);
  for (int j = 0; j < 4; ++j) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int major = lane() / 4, minor = lane() % 4 * 2 + i;
      const int from_row = trans ? minor : major, column = trans ? major : minor;
      std::memcpy(&pair[i], of_lane<const unsigned char*>(slots, 8 * j + from_row) + 2 * column, 2);
    }
    r[j] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
  }
}
struct Fragments {
  uint32_t a[4], b[2];
};
// Of normal numbers.
inline int exponent_of(double v) {
  uint64_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return int(bits >> 52 & 0x7ff) - 1023;
}
inline double power_of_two(int exponent) {
  const uint64_t bits = uint64_t(exponent + 1023) << 52;
  double v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
// Tensor cores add a few products to a sum at once: each is aligned to the largest of them, what lies below its 24 bits
// is cut off, and so is what the total has below its own (Fasi, Higham, Mikaitis & Pranesh 2021, "Numerical behavior of
// NVIDIA tensor cores"). So many at a time as compute capability 8.0 takes, without the one to three bits that it and
// later ones keep besides: no GPU is less exact.
inline float add_products(float sum, const double* products, int count) {
  double exact = sum, largest = std::abs(exact);
  for (int k = 0; k < count; ++k) exact += products[k], largest = std::max(largest, std::abs(products[k]));
  if (!std::isfinite(exact) || largest == 0) return float(exact);
  const double up = power_of_two(23 - exponent_of(largest));  // what makes the last bit that is kept a one
  int64_t total = int64_t(sum * up);
  for (int k = 0; k < count; ++k) total += int64_t(products[k] * up);
  int64_t last = 1;
  while (std::abs(total) >= last << 24) last *= 2;
  return float(double(total / last * last) / up);
}
// d[i] of lane 4 g + t is the element (g + 8 (i / 2), 2 t + i % 2) of the 16x8 result. a_at(row, k) and b_at(k, column)
// give the elements out of what the lanes hold.
template <int DEPTH, class A, class B>
void multiply(float (&d)[4], const A& a_at, const B& b_at) {
  double a[2][DEPTH], b[2][DEPTH];  // this lane's rows and columns, widened once
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < DEPTH; ++k) a[i][k] = a_at(lane() / 4 + 8 * i, k), b[i][k] = b_at(k, lane() % 4 * 2 + i);
  for (int i = 0; i < 4; ++i) {
    double products[DEPTH];
    for (int k = 0; k < DEPTH; ++k) products[k] = a[i / 2][k] * b[i % 2][k];
    for (int half = 0; half < 2; ++half) d[i] = add_products(d[i], products + half * (DEPTH / 2), DEPTH / 2);
  }
}
}  // namespace emulated
inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared) { emulated::ldmatrix("ldmatrix_x4", r, shared, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  emulated::ldmatrix("ldmatrix_x4_trans", r, shared, true);
}
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using emulated::of_lane, emulated::Fragments;
  const Fragments mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const unsigned char* slots = emulated::exchange("mma_m16n8k16", &mine, sizeof mine);
  const auto element = [](uint32_t pair, int k) { return widen(T{uint16_t(pair >> (k % 2 * 16))}); };
  emulated::multiply<16>(
      d,
      [&](int row, int k) {
        return element(of_lane<Fragments>(slots, row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], k);
      },
      [&](int k, int column) { return element(of_lane<Fragments>(slots, column * 4 + k % 8 / 2).b[k / 8], k); });
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using emulated::of_lane, emulated::Fragments;
  const Fragments mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const unsigned char* slots = emulated::exchange("mma_m16n8k8_tf32", &mine, sizeof mine);
  const auto element = [](uint32_t bits) { return as_float(bits & 0xffffe000u); };
  emulated::multiply<8>(
      d, [&](int row, int k) { return element(of_lane<Fragments>(slots, row % 8 * 4 + k % 4).a[row / 8 + k / 4 * 2]); },
      [&](int k, int column) { return element(of_lane<Fragments>(slots, column * 4 + k % 4).b[k / 4]); });
}

}  // namespace dx::cuda
