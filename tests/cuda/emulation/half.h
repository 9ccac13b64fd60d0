// fp16 and bf16 by hand, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace dx::cuda::emulated {

template <class To, class From>
To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline uint16_t float_to_bfloat16(float v) {
  const uint32_t bits = as<uint32_t>(v);
  if (v != v) return 0x7fff;  // the GPU's NaN
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff;
  if (exponent == 31) return fraction ? NAN : as<float>(sign | 0x7f800000u);
  if (exponent == 0) return as<float>(sign | as<uint32_t>(float(fraction) * 5.9604644775390625e-08f));  // by 2^-24
  return as<float>(sign | (exponent + 112) << 23 | fraction << 13);
}
inline uint16_t float_to_half(float v) {
  if (v != v) return 0x7fff;
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  const float magnitude = std::fabs(v);
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // rounds to infinity
  if (magnitude < 6.103515625e-05f) return sign | uint16_t(std::nearbyint(magnitude * 16777216.0f));
  const uint32_t bits = as<uint32_t>(magnitude);
  return sign | uint16_t((bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u) >> 13);
}

}  // namespace dx::cuda::emulated
