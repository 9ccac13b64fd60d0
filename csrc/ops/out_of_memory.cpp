#include "out_of_memory.h"

#include <pybind11/pybind11.h>

namespace dx::ops {
namespace {

// The pybind11 in torch, which hands an operator's exception to Python, calls `set_error` of whatever derives from its
// builtin_exception. A translator registered here would reach only a torch whose pybind11 is of the version that this
// was built with: that of torch 2.15 is another than that of 2.13.
class OutOfMemory : public pybind11::builtin_exception {
 public:
  using pybind11::builtin_exception::builtin_exception;
  void set_error() const override {
    PyErr_SetString(pybind11::module_::import("torch").attr("OutOfMemoryError").ptr(), what());
  }
};

}  // namespace

void throw_out_of_memory(const std::string& message) { throw OutOfMemory(message); }

}  // namespace dx::ops
