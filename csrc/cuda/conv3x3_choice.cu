// Which 3x3 convolutions of a block on a GPU are computed by the kernels of this folder. All others are PyTorch's,
// which on a GPU means cuDNN's.
//
// The table has a row for each shape at which ours was measured to be faster, forward and backward together, with the
// BatchNorm, the dropout and the statistics around the convolution. `make gpu-fast` measures both and prints its rows.
// No GPU has measured anything yet: the table is empty, and cuDNN computes everything. DENSENET_EXT_CONV3X3=ours asks
// for the kernels wherever they fit, DENSENET_EXT_CONV3X3=cudnn for none of them.
#include <array>

#include "kernels.h"
#include "limits.h"

namespace dx::cuda {
namespace {

struct Shape3x3 {
  int capability;  // 90: compute capability 9.0
  int bytes;       // of an element of feature maps
  bool tf32;
  int64_t C, N;   // input and output channels
  int64_t width;  // pixels of a line
  int64_t rows;   // pixels of all images; in the table the fewest for which the row stands
};

constexpr std::array<Shape3x3, 0> kOwn = {};

bool stands_for(const Shape3x3& row, const Shape3x3& shape) {
  return row.capability == shape.capability && row.bytes == shape.bytes && row.tf32 == shape.tf32 && row.C == shape.C &&
         row.N == shape.N && row.width == shape.width && row.rows <= shape.rows;
}

// Of the current GPU, 0 where it does not say.
int capability() {
#if defined(DX_EMULATE)
  return 90;
#else
  return 10 * attribute_of_device<cudaDevAttrComputeCapabilityMajor>(0) +
         attribute_of_device<cudaDevAttrComputeCapabilityMinor>(0);
#endif
}

template <class T>
bool is_in_table(const BnReluConv3x3<T>& p) {
  if (kOwn.empty()) return false;
  const Shape3x3 shape = {capability(), int(sizeof(T)), p.tf32, p.C, p.N, p.images.size[2], p.images.rows()};
  for (const Shape3x3& row : kOwn)
    if (stands_for(row, shape)) return true;
  return false;
}

}  // namespace

template <class T>
bool chooses_own_conv3x3(const BnReluConv3x3<T>& p) {
  if (settings().refuses_conv3x3 || !(settings().asks_for_conv3x3 || is_in_table(p))) return false;
  BnReluConv3x3Backward<T> backward = {};
  backward.C = p.C, backward.N = p.N, backward.images = p.images, backward.norm = p.norm, backward.tf32 = p.tf32;
  for (int i = 0; i < 3; ++i) backward.window[i] = p.window[i];
  return has_room_for_conv3x3(p) && has_room_for_conv3x3(backward);
}

#define DX_INSTANTIATE(T) template bool chooses_own_conv3x3<T>(const BnReluConv3x3<T>&);
DX_INSTANTIATE(float)
DX_INSTANTIATE(double)
DX_INSTANTIATE(bfloat16)
DX_INSTANTIATE(float16)
#undef DX_INSTANTIATE

}  // namespace dx::cuda
