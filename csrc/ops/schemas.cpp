#include "schemas.h"

#include "kept_layers.h"
#include "kept_packed.h"
#include "running_stats.h"

STABLE_TORCH_LIBRARY(densenet_ext, m) { dx::ops::define_operators(m); }
STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CompositeExplicitAutograd, m) {
  m.impl("keep_tensors", TORCH_BOX(&dx::ops::keep_tensors));
  m.impl("kept_hold", TORCH_BOX(&dx::ops::kept_hold));
  m.impl("drop_kept", TORCH_BOX(&dx::ops::drop_kept));
  m.impl("keep_packed", TORCH_BOX(&dx::ops::keep_packed));
  m.impl("keep_norms", TORCH_BOX(&dx::ops::keep_norms));
  m.impl("keep_layers", TORCH_BOX(&dx::ops::keep_layers));
}
