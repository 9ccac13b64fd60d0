// The operators for CPU tensors.
#include "cpu.h"

#include "around.h"
#include "basic_layers.h"
#include "conv1x1.h"
#include "conv3x3.h"
#include "dense_layers.h"
#include "elementwise.h"
#include "first_conv.h"
#include "pool.h"
#include "running_stats.h"

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  dx::ops::implement_elementwise<dx::ops::Cpu>(m);
  dx::ops::implement_conv1x1<dx::ops::Cpu>(m);
  dx::ops::implement_conv3x3<dx::ops::Cpu>(m);
  dx::ops::implement_pool<dx::ops::Cpu>(m);
  dx::ops::implement_dense_layers<dx::ops::Cpu>(m);
  dx::ops::implement_basic_layers<dx::ops::Cpu>(m);
  dx::ops::implement_around<dx::ops::Cpu>(m);
  dx::ops::implement_first_conv<dx::ops::Cpu>(m);
  m.impl("move_running_stats", TORCH_BOX(&dx::ops::move_running_stats));
}
