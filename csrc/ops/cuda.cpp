// The operators for CUDA tensors.
#include "cuda.h"

#include "around.h"
#include "basic_layers.h"
#include "conv1x1.h"
#include "conv3x3.h"
#include "dense_layers.h"
#include "elementwise.h"
#include "pool.h"

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CUDA, m) {
  dx::ops::implement_elementwise<dx::ops::Cuda>(m);
  dx::ops::implement_conv1x1<dx::ops::Cuda>(m);
  dx::ops::implement_conv3x3<dx::ops::Cuda>(m);
  dx::ops::implement_pool<dx::ops::Cuda>(m);
  dx::ops::implement_dense_layers<dx::ops::Cuda>(m);
  dx::ops::implement_basic_layers<dx::ops::Cuda>(m);
  dx::ops::implement_around<dx::ops::Cuda>(m);
}
