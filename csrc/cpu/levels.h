// The SIMD level in use: the processor's fastest, unless somebody asks for another.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace dx::cpu {

// Levels that this build and this processor have, narrowest first.
const std::vector<const Level*>& levels();
const Level& level();
// False when there is no level of that name here.
bool set_level(const std::string& name);

template <class T>
const Kernels<T>& kernels();
template <>
inline const Kernels<float>& kernels<float>() {
  return *level().f32;
}
template <>
inline const Kernels<double>& kernels<double>() {
  return *level().f64;
}
template <>
inline const Kernels<bfloat16>& kernels<bfloat16>() {
  return *level().bf16;
}
template <>
inline const Kernels<float16>& kernels<float16>() {
  return *level().f16;
}

}  // namespace dx::cpu
