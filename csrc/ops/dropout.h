// Dropout's arguments, wherever an operator takes them.
#pragma once

#include "tensors.h"

namespace dx::ops {

// The seed's place, or null without one. The layer is hashed in 32 bits.
template <class D>
const int64_t* check_dropout(const D& at, double rate, const OptionalTensor& seed, int64_t layer, int64_t drop_rows) {
  STD_TORCH_CHECK(rate >= 0 && rate <= 1, "densenet_ext: drop_rate: expected a number in [0, 1], got ", rate);
  STD_TORCH_CHECK(layer >= 0 && layer <= INT32_MAX, "densenet_ext: layer: expected a number in [0, ", INT32_MAX,
                  "], got ", layer);
  STD_TORCH_CHECK(drop_rows >= 1, "densenet_ext: drop_rows: expected a number of at least 1, got ", drop_rows);
  STD_TORCH_CHECK(rate == 0 || seed, "densenet_ext: seed: expected an int64 tensor of one element, got None");
  if (!seed) return nullptr;
  check_dtype<int64_t>(at, *seed, "seed");
  STD_TORCH_CHECK(seed->dim() <= 1 && seed->numel() == 1,
                  "densenet_ext: seed: expected an int64 tensor of one element, got shape ", shape_of(*seed));
  return check_memory<int64_t>(at, *seed, "seed", 1, 1, 1, false);
}

}  // namespace dx::ops
