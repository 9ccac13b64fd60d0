#include "huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace dx::cpu {

void ask_for_huge_pages(uintptr_t begin, uintptr_t end) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;  // of x86-64, and of arm64 with small pages of 4 KiB
  begin = (begin + kPage - 1) / kPage * kPage;
  end = end / kPage * kPage;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)end;
#endif
}

}  // namespace dx::cpu
