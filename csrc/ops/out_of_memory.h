// What a GPU backend throws besides plain errors. It includes neither torch nor Python: the thrower may have the first
// only, the definition the second (stable.h).
#pragma once

#include <string>

namespace dx::ops {

// No memory for an operator's workspace: Python sees torch.OutOfMemoryError, as from torch's own tensors.
[[noreturn]] void throw_out_of_memory(const std::string& message);

}  // namespace dx::ops
