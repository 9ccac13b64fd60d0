// Where 3x3 convolutions take Winograd's products: where an estimate says that they are faster, unless a user
// or a test wants otherwise.
#pragma once

#include <string>

namespace dx::cpu {

enum class WinogradUse { kFaster, kAlways, kNever };

WinogradUse winograd_use();
// "faster", "always" or "never"; false for anything else.
bool set_winograd_use(const std::string& name);

}  // namespace dx::cpu
