// Vectors of the level's width, on the compiler's vector extensions, and loads and stores that convert the storage type
// to the arithmetic type. Included inside the level's namespace (see level.h).
#pragma once

#define DX_INLINE inline __attribute__((always_inline))

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float V __attribute__((vector_size(DX_VECTOR_BYTES)));
  typedef int32_t Mask __attribute__((vector_size(DX_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double V __attribute__((vector_size(DX_VECTOR_BYTES)));
  typedef int64_t Mask __attribute__((vector_size(DX_VECTOR_BYTES)));
};
template <class A>
using Vec = typename VectorOf<A>::V;

template <class A>
constexpr int kLanes = DX_VECTOR_BYTES / int(sizeof(A));

typedef uint32_t U32 __attribute__((vector_size(DX_VECTOR_BYTES)));
typedef uint16_t U16Half __attribute__((vector_size(DX_VECTOR_BYTES / 2)));

// ---- arithmetic type in memory -------------------------------------------------------------------------------------
template <class A>
DX_INLINE Vec<A> load_vec(const A* p) {
  Vec<A> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class A>
DX_INLINE void store_vec(A* p, Vec<A> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// ---- ReLU: max(x, 0) that propagates NaN; its gradient passes where not (x <= 0), as PyTorch's threshold_backward ---
template <class A>
DX_INLINE Vec<A> relu(Vec<A> u) {
  const Vec<A> zero = {};
#if DX_VECTOR_BYTES == 64
  // The instruction is this comparison and selection, which compilers do not see in the vectors' form.
  if constexpr (std::is_same<A, float>::value) return (Vec<A>)_mm512_max_ps((__m512)zero, (__m512)u);
#endif
  return zero > u ? zero : u;
}
template <class A>
DX_INLINE Vec<A> relu_mask(Vec<A> u, Vec<A> grad) {
  const Vec<A> zero = {};
  return u <= zero ? zero : grad;
}

// ---- square roots, rounded as a single one is
// ------------------------------------------------------------------------
template <class A>
DX_INLINE Vec<A> square_root(Vec<A> v) {
#if DX_VECTOR_BYTES == 64
  if constexpr (std::is_same<A, float>::value)
    return (Vec<A>)_mm512_sqrt_ps((__m512)v);
  else
    return (Vec<A>)_mm512_sqrt_pd((__m512d)v);
#elif DX_VECTOR_BYTES == 32
  if constexpr (std::is_same<A, float>::value)
    return (Vec<A>)_mm256_sqrt_ps((__m256)v);
  else
    return (Vec<A>)_mm256_sqrt_pd((__m256d)v);
#else
  for (int i = 0; i < kLanes<A>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// ---- bf16: the upper half of a float, rounded to nearest even -------------------------------------------------------
// Between 16 and 32 bits by the instruction itself: GCC 12 converts whole AVX-512 vectors in halves.
#if DX_VECTOR_BYTES == 64
DX_INLINE U32 from_16_bits(const U16Half& h) { return (U32)_mm512_cvtepu16_epi32((__m256i)h); }
DX_INLINE U16Half to_16_bits(U32 v) { return (U16Half)_mm512_cvtepi32_epi16((__m512i)v); }
#else
DX_INLINE U32 from_16_bits(const U16Half& h) { return __builtin_convertvector(h, U32); }
DX_INLINE U16Half to_16_bits(U32 v) { return __builtin_convertvector(v, U16Half); }
#endif
DX_INLINE Vec<float> widen(const U16Half& h) { return (Vec<float>)(from_16_bits(h) << 16); }
#if defined(DX_BF16_DOT)
// The instruction's numbers below 2^-126 are zero.
DX_INLINE U16Half narrow_bf16(Vec<float> v) { return (U16Half)_mm512_cvtneps_pbh((__m512)v); }
#else
DX_INLINE U16Half narrow_bf16(Vec<float> v) {
  const U32 bits = (U32)v;
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 quiet_nan = (bits >> 16) | 0x40u;
  return to_16_bits(v == v ? rounded : quiet_nan);
}
#endif

// ---- fp16 -----------------------------------------------------------------------------------------------------------
#if defined(DX_F16C_512)
DX_INLINE Vec<float> widen_f16(const U16Half& h) { return (Vec<float>)_mm512_cvtph_ps((__m256i)h); }
DX_INLINE U16Half narrow_f16(Vec<float> v) { return (U16Half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(DX_F16C_256)
DX_INLINE Vec<float> widen_f16(const U16Half& h) { return (Vec<float>)_mm256_cvtph_ps((__m128i)h); }
DX_INLINE U16Half narrow_f16(Vec<float> v) { return (U16Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 0x3ffu;
  float value;
  if (exponent == 0) {
    value = std::ldexp(float(fraction), -24);  // subnormal
  } else if (exponent == 31) {
    const uint32_t bits = 0x7f800000u | (fraction << 13);
    __builtin_memcpy(&value, &bits, 4);
  } else {
    const uint32_t bits = ((exponent + 112u) << 23) | (fraction << 13);
    __builtin_memcpy(&value, &bits, 4);
  }
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  bits |= sign;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint16_t float_to_half(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (magnitude < 0x38800000u) {                        // subnormal or zero: units of 2^-24, nearest even
    float absolute;
    __builtin_memcpy(&absolute, &magnitude, 4);
    return sign | uint16_t(std::nearbyint(absolute * 16777216.0f));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | uint16_t((rounded - 0x38000000u) >> 13);
}
DX_INLINE Vec<float> widen_f16(const U16Half& h) {
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = half_to_float(h[i]);
  return v;
}
DX_INLINE U16Half narrow_f16(Vec<float> v) {
  U16Half h;
  for (int i = 0; i < kLanes<float>; ++i) h[i] = float_to_half(v[i]);
  return h;
}
#endif

// ---- 16 bits to float and back --------------------------------------------------------------------------------------
template <class T>
DX_INLINE Vec<float> widen_half(const U16Half& h) {
  if constexpr (std::is_same<T, bfloat16>::value)
    return widen(h);
  else
    return widen_f16(h);
}
template <class T>
DX_INLINE U16Half narrow_half(Vec<float> v) {
  if constexpr (std::is_same<T, bfloat16>::value)
    return narrow_bf16(v);
  else
    return narrow_f16(v);
}

// ---- whole vectors of the storage type ------------------------------------------------------------------------------
template <class T>
DX_INLINE Vec<Acc<T>> load(const T* p) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    return load_vec(reinterpret_cast<const Acc<T>*>(p));
  } else {
    U16Half h;
    __builtin_memcpy(&h, p, sizeof h);
    return widen_half<T>(h);
  }
}
template <class T>
DX_INLINE void store(T* p, Vec<Acc<T>> v) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    store_vec(reinterpret_cast<Acc<T>*>(p), v);
  } else {
    const U16Half h = narrow_half<T>(v);
    __builtin_memcpy(p, &h, sizeof h);
  }
}

// ---- the first n < lanes elements; the others read as zero and are not written --------------------------------------
// Masked where the level can, in 16 bits too: the new features of a layer, of k = 12 say, are such a part altogether.
template <class T>
DX_INLINE Vec<Acc<T>> load_part(const T* p, int n) {
#if defined(DX_MASKED)
  const unsigned mask = (1u << n) - 1;
  if constexpr (std::is_same<T, float>::value)
    return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16(mask), p);
  else if constexpr (std::is_same<T, double>::value)
    return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8(mask), p);
  else
    return widen_half<T>((U16Half)_mm256_maskz_loadu_epi16(__mmask16(mask), p));
#else
  T whole[kLanes<Acc<T>>] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
#endif
}
template <class T>
DX_INLINE void store_part(T* p, Vec<Acc<T>> v, int n) {
#if defined(DX_MASKED)
  const unsigned mask = (1u << n) - 1;
  if constexpr (std::is_same<T, float>::value)
    _mm512_mask_storeu_ps(p, __mmask16(mask), (__m512)v);
  else if constexpr (std::is_same<T, double>::value)
    _mm512_mask_storeu_pd(p, __mmask8(mask), (__m512d)v);
  else
    _mm256_mask_storeu_epi16(p, __mmask16(mask), (__m256i)narrow_half<T>(v));
#else
  T whole[kLanes<Acc<T>>];
  store(whole, v);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
#endif
}

// Copies without a conversion, which may round what is below the normal numbers.
template <class T>
DX_INLINE void copy_part(const T* from, T* to, int n) {
#if defined(DX_MASKED)
  if constexpr (sizeof(T) == 2) {
    const __mmask16 mask = __mmask16((1u << n) - 1);
    _mm256_mask_storeu_epi16(to, mask, _mm256_maskz_loadu_epi16(mask, from));
  } else {
    store_part(to, load_part(from, n), n);
  }
#else
  for (int i = 0; i < n; ++i) to[i] = from[i];
#endif
}

// A vector's worth of columns: all lanes, or the first n at the right edge.
struct Whole {
  template <class T>
  DX_INLINE Vec<Acc<T>> load(const T* p) const {
    return DX_LEVEL::load(p);
  }
  template <class T>
  DX_INLINE void store(T* p, Vec<Acc<T>> v) const {
    DX_LEVEL::store(p, v);
  }
  template <class T>
  DX_INLINE void copy(const T* from, T* to) const {
    __builtin_memmove(to, from, kLanes<Acc<T>> * sizeof(T));
  }
};
struct Part {
  int n;
  template <class T>
  DX_INLINE Vec<Acc<T>> load(const T* p) const {
    return load_part(p, n);
  }
  template <class T>
  DX_INLINE void store(T* p, Vec<Acc<T>> v) const {
    store_part(p, v, n);
  }
  template <class T>
  DX_INLINE void copy(const T* from, T* to) const {
    copy_part(from, to, n);
  }
};
// Calls f(c, columns) for every vector of columns in [0, C).
template <class A, class F>
DX_INLINE void for_columns(int64_t C, const F& f) {
  int64_t c = 0;
  for (; c + kLanes<A> <= C; c += kLanes<A>) f(c, Whole{});
  if (c < C) f(c, Part{int(C - c)});
}

// Calls f(c, columns, NV) for blocks of NV = Most whole vectors, 4 or 8, then for what remains: neighbours are a
// stretch of memory that the processor prefetches, one vector of each row is not.
template <int N>
struct Constant {
  static constexpr int value = N;
};
template <class A, int Most = 4, class F>
DX_INLINE void for_column_stretches(int64_t C, const F& f) {
  int64_t c = 0;
  if constexpr (Most == 8)
    for (; c + 8 * kLanes<A> <= C; c += 8 * kLanes<A>) f(c, Whole{}, Constant<8>{});
  for (; c + 4 * kLanes<A> <= C; c += 4 * kLanes<A>) f(c, Whole{}, Constant<4>{});
  if (c + 3 * kLanes<A> <= C) f(c, Whole{}, Constant<3>{}), c += 3 * kLanes<A>;
  if (c + 2 * kLanes<A> <= C) f(c, Whole{}, Constant<2>{}), c += 2 * kLanes<A>;
  if (c + kLanes<A> <= C) f(c, Whole{}, Constant<1>{}), c += kLanes<A>;
  if (c < C) f(c, Part{int(C - c)}, Constant<1>{});
}

// What reading back a value from storage gives.
template <class T>
DX_INLINE Vec<Acc<T>> as_stored(Vec<Acc<T>> v) {
  if constexpr (sizeof(T) == sizeof(Acc<T>))
    return v;
  else
    return widen_half<T>(narrow_half<T>(v));
}

// Asks for what lies `distance` elements further on, which may be beyond the end, to lie in the first or second cache.
template <int Cache, class T>
DX_INLINE void prefetch(const T* p, int64_t distance) {
  const intptr_t address = reinterpret_cast<intptr_t>(p) + distance * int64_t(sizeof(T));
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 4 - Cache);
}

// The same of a row of C numbers, which may begin anywhere in a line of the cache. Rows that touch are a stretch of
// memory that the processor prefetches.
template <int Cache, class T>
DX_INLINE void prefetch_row(const T* row, int64_t C, int64_t pitch, int64_t rows) {
  if (pitch == C) return;
  for (int64_t c = 0; c < C; c += 64 / int64_t(sizeof(T))) prefetch<Cache>(row + c, rows * pitch);
  prefetch<Cache>(row + C - 1, rows * pitch);
}

template <class A>
DX_INLINE Vec<A> broadcast(A a) {
  return a - Vec<A>{};
}
