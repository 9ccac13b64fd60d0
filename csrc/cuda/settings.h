// What the environment asks of the CUDA operators. Each call of an operator, a whole block's too, reads it once, in the
// thread that launches its kernels, and not at each launch: to look four variables up takes longer than to plan one.
//   DENSENET_EXT_SYNC=1                   operators wait for their kernels and name themselves in their errors
//   DENSENET_EXT_CONV3X3=ours|cudnn       our 3x3 convolution wherever it fits, or nowhere (conv3x3_choice.cu)
// and for tests, a small GPU, so that small shapes reach every loop, on a GPU as in emulation:
//   DENSENET_EXT_TEST_MULTIPROCESSORS=2   blocks at most, so that each works through several tiles
//   DENSENET_EXT_TEST_SHARED=67584        bytes of shared memory that a block can ask for
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace dx::cuda {

struct Settings {
  bool waits = false, asks_for_conv3x3 = false, refuses_conv3x3 = false;
  int64_t multiprocessors = 0, shared = 0;  // 0: what the GPU has

  void read() {
    const auto is = [](const char* value, const char* wanted) { return value && std::strcmp(value, wanted) == 0; };
    const auto number = [](const char* value) -> int64_t { return value ? std::atoll(value) : 0; };
    const char* const conv3x3 = std::getenv("DENSENET_EXT_CONV3X3");
    waits = is(std::getenv("DENSENET_EXT_SYNC"), "1");
    asks_for_conv3x3 = is(conv3x3, "ours"), refuses_conv3x3 = is(conv3x3, "cudnn");
    multiprocessors = number(std::getenv("DENSENET_EXT_TEST_MULTIPROCESSORS"));
    shared = number(std::getenv("DENSENET_EXT_TEST_SHARED"));
  }
};

// Of the operator that this thread runs.
inline Settings& settings() {
  static thread_local Settings own;
  return own;
}

}  // namespace dx::cuda
