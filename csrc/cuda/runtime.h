// The few types of the CUDA runtime that launchers speak, without its headers when the kernels are emulated.
#pragma once

#if defined(DX_EMULATE)
#include "emulated.h"  // tests/cuda/emulation
#else
#include <cuda_runtime_api.h>
#endif

namespace dx::cuda {

using Stream = cudaStream_t;

}  // namespace dx::cuda
