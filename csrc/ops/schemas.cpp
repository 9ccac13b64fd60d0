#include "schemas.h"

STABLE_TORCH_LIBRARY(densenet_ext, m) { dx::ops::define_operators(m); }
