// SIMD level "portable": see level.h. Standard headers come before the pragma, so that their inline functions stay
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

#define DX_LEVEL portable
#define DX_VECTOR_BYTES 16
#include "level.h"

namespace dx::cpu {
const Level* level_portable() {
  static const Level level = {"portable", &portable::kKernels<float>, &portable::kKernels<double>,
                              &portable::kKernels<bfloat16>, &portable::kKernels<float16>};
  return &level;
}
}  // namespace dx::cpu
