// LibTorch's stable ABI as torch 2.11 has it: a library built so loads in every later torch too. Defined here and not
// for the whole build, as the pybind11 headers of torch 2.11 refuse to be included beside it.
#pragma once

#define TORCH_TARGET_VERSION 0x020b000000000000ULL

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
