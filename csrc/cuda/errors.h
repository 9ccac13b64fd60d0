// What the operators throw besides plain errors.
#pragma once

#include <pybind11/pybind11.h>

namespace dx::cuda {

// No memory for an operator's workspace. Python sees torch.OutOfMemoryError, as from torch's own tensors: pybind11
// calls `set_error` of what derives from its class, where one of another version, as torch may have it, knows nothing
// of the translators that are registered here.
class OutOfMemory : public pybind11::builtin_exception {
 public:
  using pybind11::builtin_exception::builtin_exception;
  void set_error() const override {
    PyErr_SetString(pybind11::module_::import("torch").attr("OutOfMemoryError").ptr(), what());
  }
};

}  // namespace dx::cuda
