// Sizes of images as lists of numbers.
#pragma once

#include "tensors.h"

namespace dx::ops {
using Ints = std::vector<int64_t>;

// Beyond all memory, with room below 64 bits for the doubled sizes of padded images.
constexpr int64_t kMostPixels = int64_t(1) << 48;

inline void check_entries(const Ints& values, size_t count, int64_t least, const char* name) {
  STD_TORCH_CHECK(values.size() == count, "densenet_ext: ", name, ": expected ", count, " numbers, got ",
                  values.size());
  for (int64_t value : values)
    STD_TORCH_CHECK(value >= least, "densenet_ext: ", name, ": expected numbers of at least ", least, ", got ", value);
}

inline std::string text_of(const Ints& values) {
  std::string s = "[";
  for (size_t i = 0; i < values.size(); ++i) s += (i ? ", " : "") + std::to_string(values[i]);
  return s + "]";
}

// The product of the last three, far from 64 bits: sizes that no memory stands behind may be any.
inline int64_t pixels(const Ints& values, const char* name, int64_t images = 1) {
  int64_t product = images;
  bool fits = true;
  for (size_t i = values.size() - 3; i < values.size(); ++i)
    fits &= !__builtin_mul_overflow(product, values[i], &product) && product <= kMostPixels;
  STD_TORCH_CHECK(fits, "densenet_ext: ", name, ": expected at most ", kMostPixels, " pixels, got ", text_of(values));
  return product;
}

// size [N, D, H, W]
inline void check_image_size(const Ints& size) {
  check_entries(size, 4, 0, "size");
  STD_TORCH_CHECK(pixels(size, "size") > 0, "densenet_ext: size: expected images of at least one pixel, got ",
                  text_of(size));
  pixels(size, "size", size[0]);
}

}  // namespace dx::ops
