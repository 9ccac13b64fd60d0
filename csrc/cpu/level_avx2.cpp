// SIMD level "avx2": see level.h. Standard headers come before the pragma, so that their inline functions stay
// baseline.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "kernels.h"
#include "task_memory.h"
#include "winograd_use.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
#define DX_F16C_256
#define DX_LEVEL avx2
#define DX_VECTOR_BYTES 32
#include "level.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace dx::cpu {
const Level* level_avx2() {
  static const Level level = {"avx2", &avx2::kKernels<float>, &avx2::kKernels<double>, &avx2::kKernels<bfloat16>,
                              &avx2::kKernels<float16>};
  return &level;
}
}  // namespace dx::cpu

#else
namespace dx::cpu {
const Level* level_avx2() { return nullptr; }
}  // namespace dx::cpu
#endif
