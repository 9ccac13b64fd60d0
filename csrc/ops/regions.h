// The memory that the arguments of one call occupy, and whether what is written lies apart from all the rest: other
// threads read while one writes, so that an overlap would give other numbers from run to run.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "stable.h"

namespace dx::ops {

// All in bytes: `width` of every `pitch`, from `begin` up to `end`.
struct Region {
  const char* name;
  uintptr_t begin, end;
  uintptr_t pitch, width;
  bool written;

  bool one_row() const { return end - begin == width; }
  bool same_as(const Region& other) const {
    return begin == other.begin && end == other.end && pitch == other.pitch && width == other.width;
  }
};

// In other memory, or in other columns of one buffer.
inline bool apart(const Region& a, const Region& b) {
  if (a.end <= b.begin || b.end <= a.begin) return true;
  if (a.one_row() && b.one_row()) return false;
  if (!a.one_row() && !b.one_row() && a.pitch != b.pitch) return false;
  const uintptr_t pitch = a.one_row() ? b.pitch : a.pitch;
  // Columns of b, counted from the first of a, around one row.
  const uintptr_t first = (b.begin % pitch + pitch - a.begin % pitch) % pitch;
  return first >= a.width && first + b.width <= pitch;
}

// An argument that may be written where another one is read: the same rows exactly, never a part of them.
struct InPlace {
  const char *written, *read;
};

class Regions {
 public:
  Regions() { regions_.reserve(kTypical); }

  void add(const Region& region) {
    if (region.begin != region.end) regions_.push_back(region);
  }

  void check_apart(std::initializer_list<InPlace> in_place = {}) const {
    for (const Region& out : regions_) {
      if (!out.written) continue;
      for (const Region& other : regions_)
        if (&other != &out && !apart(out, other) && !(out.same_as(other) && listed(in_place, out, other)))
          STD_TORCH_CHECK(false, "densenet_ext: ", out.name, ": expected storage apart from that of ", other.name,
                          ", got an overlap");
    }
  }

 private:
  static constexpr size_t kTypical = 24;  // no operator has more tensors, a list's aside
  static bool listed(std::initializer_list<InPlace> in_place, const Region& out, const Region& other) {
    for (const InPlace& pair : in_place)
      if (!other.written && !std::strcmp(pair.written, out.name) && !std::strcmp(pair.read, other.name)) return true;
    return false;
  }
  std::vector<Region> regions_;
};

}  // namespace dx::ops
