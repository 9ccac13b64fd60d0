// What the operators throw besides plain errors; no torch and no Python, which both ends of it include.
#pragma once

#include <stdexcept>

namespace dx::cuda {

// No memory for an operator's workspace. Python sees torch.OutOfMemoryError (module.cpp), as from torch's own tensors.
class OutOfMemory : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace dx::cuda
