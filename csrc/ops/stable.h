// LibTorch's stable ABI as torch 2.11 has it: a library built so loads in 2.11 and in every later torch, whichever of
// them it was built with. Defined here and not for the whole build, as the pybind11 headers of torch 2.11 refuse to be
// included beside it. Nothing else in csrc includes a header of torch, but for the module.
#pragma once

#define TORCH_TARGET_VERSION 0x020b000000000000ULL

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

// A header of torch that came first would have chosen the ABI of the torch that is built with.
static_assert(TORCH_FEATURE_VERSION == TORCH_TARGET_VERSION, "stable.h comes before every other header of torch");
