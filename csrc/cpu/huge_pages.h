// Large pages for memory that is about to be written. A block's buffer is new in every step, and Linux gives new memory
// page by page, at a fault each: 60,000 of 4 KiB in a training step of DenseNet-121 (224, batch 16). Where the system
// gives pages of 2 MiB on request, as most do, a fault gives 512 times as much.
#pragma once

#include <cstdint>

namespace dx::cpu {

// Asks for large pages in [begin, end), addresses; whole ones only, so that no memory beyond is taken. It is a wish:
// where it is not granted, or no such system, nothing changes.
void ask_for_huge_pages(uintptr_t begin, uintptr_t end);

}  // namespace dx::cpu
