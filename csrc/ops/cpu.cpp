// The operators for CPU tensors.
#include "cpu.h"

#include "conv1x1.h"
#include "conv3x3.h"
#include "elementwise.h"
#include "pool.h"

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  dx::ops::implement_elementwise<dx::ops::Cpu>(m);
  dx::ops::implement_conv1x1<dx::ops::Cpu>(m);
  dx::ops::implement_conv3x3<dx::ops::Cpu>(m);
  dx::ops::implement_pool<dx::ops::Cpu>(m);
}
