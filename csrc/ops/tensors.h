// From tensors to the kernels' plain arguments, with the checks: every message names the argument, what was expected
// and what came. Checks read sizes, strides, dtypes and devices, never data. D is the backend's device (cpu.h, cuda.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "../params.h"
#include "regions.h"
#include "stable.h"

namespace dx::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
struct Storage;
template <>
struct Storage<float> {
  static constexpr ScalarType type = ScalarType::Float;
};
template <>
struct Storage<double> {
  static constexpr ScalarType type = ScalarType::Double;
};
template <>
struct Storage<bfloat16> {
  static constexpr ScalarType type = ScalarType::BFloat16;
};
template <>
struct Storage<float16> {
  static constexpr ScalarType type = ScalarType::Half;
};
template <>
struct Storage<uint8_t> {
  static constexpr ScalarType type = ScalarType::Byte;
};
template <>
struct Storage<int64_t> {
  static constexpr ScalarType type = ScalarType::Long;
};

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

// The schemas' tensors are all there, but torch.ops takes None for one of them.
inline const Tensor& defined(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.defined(), "densenet_ext: ", name, ": expected a tensor, got None");
  return t;
}

// Where a call runs, on the device of the tensor that the dispatcher looked at first, as all its other tensors must;
// and the memory that it was seen to use.
class Place {
 public:
  explicit Place(const Tensor& first) : device_(first.device()) {}
  const torch::stable::Device& device() const { return device_; }
  void check(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(defined(t, name).device() == device_, "densenet_ext: ", name, ": expected a tensor on ",
                    name_of(device_), " as the other arguments, got one on ", name_of(t.device()));
  }
  // Noted by the checks of each argument; check_apart comes behind all of them.
  void uses(const Region& region) const { regions_.add(region); }
  void check_apart(std::initializer_list<InPlace> in_place = {}) const { regions_.check_apart(in_place); }

 private:
  static std::string name_of(const torch::stable::Device& device) {
    if (device.type() == torch::headeronly::DeviceType::CPU) return "cpu";
    if (device.type() != torch::headeronly::DeviceType::CUDA) return "another kind of device";
    return "cuda:" + std::to_string(device.index());
  }
  torch::stable::Device device_;
  mutable Regions regions_;
};

template <class T, class D>
inline void check_dtype(const D& at, const Tensor& t, const char* name) {
  at.check(t, name);
  STD_TORCH_CHECK(t.scalar_type() == Storage<T>::type, "densenet_ext: ", name, ": expected dtype ",
                  torch::headeronly::toString(Storage<T>::type), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

// M rows of C elements in memory that exists (a storage can have been freed under its tensors), noted as used; null
// when there are none.
template <class T, class D>
inline T* check_memory(const D& at, const Tensor& t, const char* name, int64_t M, int64_t C, int64_t pitch,
                       bool written) {
  if (M == 0 || C == 0) return nullptr;
  // asking for mutable data may move it: a lazy clone gets memory of its own
  void* data = written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  STD_TORCH_CHECK(begin % sizeof(T) == 0, "densenet_ext: ", name, ": expected storage aligned to its elements of ",
                  sizeof(T), " bytes, got one ", begin % sizeof(T), " bytes beyond");
  int64_t stored = 0, used = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &stored));
  const bool fits = !__builtin_mul_overflow(M - 1, pitch, &used) &&
                    !__builtin_add_overflow(used, C + t.storage_offset(), &used) && used <= stored / int64_t(sizeof(T));
  STD_TORCH_CHECK(fits, "densenet_ext: ", name, ": expected storage for shape ", shape_of(t), ", got one of ", stored,
                  " bytes");
  const uintptr_t row = uintptr_t(C) * sizeof(T), step = uintptr_t(pitch) * sizeof(T);
  at.uses({name, begin, begin + (M - 1) * step + row, step, row, written});
  return static_cast<T*>(data);
}

// Rows of a feature map: [M, C], channels contiguous, any pitch of at least C.
template <class T, class D>
inline Rows<T> checked_rows(const D& at, const Tensor& t, const char* name, int64_t M, int64_t C, bool written) {
  check_dtype<T>(at, t, name);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == M && t.size(1) == C, "densenet_ext: ", name, ": expected shape [", M,
                  ", ", C, "], got ", shape_of(t));
  STD_TORCH_CHECK((C <= 1 || t.stride(1) == 1) && (M <= 1 || t.stride(0) >= C), "densenet_ext: ", name,
                  ": expected contiguous channels and rows that do not overlap (strides [>= ", C,
                  ", 1]), got strides [", t.stride(0), ", ", t.stride(1), "]");
  const int64_t pitch = M <= 1 ? C : t.stride(0);
  return {check_memory<T>(at, t, name, M, C, pitch, written), pitch};
}
template <class T, class D>
inline Rows<const T> rows(const D& at, const Tensor& t, const char* name, int64_t M, int64_t C) {
  const Rows<T> checked = checked_rows<T>(at, t, name, M, C, false);
  return {checked.data, checked.pitch};
}
template <class T, class D>
inline Rows<T> rows_out(const D& at, const Tensor& t, const char* name, int64_t M, int64_t C) {
  return checked_rows<T>(at, t, name, M, C, true);
}

// The distance of an image's rows in elements, where its memory can be read as rows of C channels each: as
// algorithm/layout.py's row_pitch says. Elements of dimensions of one entry lie anywhere.
inline std::optional<int64_t> row_pitch(const Tensor& t, int64_t C) {
  int64_t *size = nullptr, *stride = nullptr, pitch = 0, expected = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &size));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &stride));
  if (C > 1 && stride[1] != 1) return std::nullopt;
  for (int64_t i = 1, dims = t.dim(); i < dims; ++i) {
    const int64_t d = i + 1 < dims ? dims - i : 0;
    if (size[d] == 1) continue;
    if (pitch == 0) {
      pitch = expected = stride[d];
      if (pitch < C) return std::nullopt;
    } else if (stride[d] != expected) {
      return std::nullopt;
    }
    expected *= size[d];
  }
  return pitch ? pitch : C;
}

// A feature map: rows as above, or images [N, C, *spatial] of M pixels whose memory is that of rows.
template <class T, class D>
inline Rows<T> checked_features(const D& at, const Tensor& t, const char* name, int64_t M, int64_t C, bool written) {
  if (defined(t, name).dim() <= 2) return checked_rows<T>(at, t, name, M, C, written);
  check_dtype<T>(at, t, name);
  STD_TORCH_CHECK(t.size(1) == C && t.numel() == M * C, "densenet_ext: ", name, ": expected shape [N, ", C,
                  ", ...] of ", M, " pixels, got ", shape_of(t));
  if (M == 0 || C == 0) return {nullptr, C};
  const auto pitch = row_pitch(t, C);
  STD_TORCH_CHECK(pitch, "densenet_ext: ", name, ": expected images in channels_last memory, got others of shape ",
                  shape_of(t));
  return {check_memory<T>(at, t, name, M, C, *pitch, written), *pitch};
}
template <class T, class D>
inline Rows<const T> features(const D& at, const Tensor& t, const char* name, int64_t M, int64_t C) {
  const Rows<T> checked = checked_features<T>(at, t, name, M, C, false);
  return {checked.data, checked.pitch};
}
template <class T, class D>
inline Rows<T> features_out(const D& at, const Tensor& t, const char* name, int64_t M, int64_t C) {
  return checked_features<T>(at, t, name, M, C, true);
}

// Per-channel vectors: [C], contiguous, in the acc dtype.
template <class A, class D>
inline A* checked_vector(const D& at, const Tensor& t, const char* name, int64_t count, bool written) {
  check_dtype<A>(at, t, name);
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == count && (count <= 1 || t.stride(0) == 1), "densenet_ext: ", name,
                  ": expected ", count, " contiguous elements, got shape ", shape_of(t),
                  t.is_contiguous() ? "" : ", not contiguous");
  return check_memory<A>(at, t, name, 1, count, count, written);
}
template <class A, class D>
inline const A* dense(const D& at, const Tensor& t, const char* name, int64_t count) {
  return checked_vector<A>(at, t, name, count, false);
}
template <class A, class D>
inline const A* dense(const D& at, const OptionalTensor& t, const char* name, int64_t count) {
  return t ? dense<A>(at, *t, name, count) : nullptr;
}
template <class A, class D>
inline A* dense_out(const D& at, const Tensor& t, const char* name, int64_t count) {
  return checked_vector<A>(at, t, name, count, true);
}
template <class A, class D>
inline A* dense_out(const D& at, const OptionalTensor& t, const char* name, int64_t count) {
  return t ? dense_out<A>(at, *t, name, count) : nullptr;
}

// A 1x1 convolution's weight or its gradient: [N, C] or, as the convolution has it, [N, C, 1, ...]; contiguous, in the
// acc dtype.
template <class A, class D>
inline A* checked_matrix(const D& at, const Tensor& t, const char* name, int64_t N, int64_t C, bool written) {
  check_dtype<A>(at, t, name);
  bool fits = t.dim() >= 2 && t.size(0) == N && t.size(1) == C && t.is_contiguous();
  for (int64_t i = 2; fits && i < t.dim(); ++i) fits = t.size(i) == 1;
  STD_TORCH_CHECK(fits, "densenet_ext: ", name, ": expected contiguous shape [", N, ", ", C, "] or [", N, ", ", C,
                  ", 1, ...], got shape ", shape_of(t), t.is_contiguous() ? "" : ", not contiguous");
  return check_memory<A>(at, t, name, 1, N * C, N * C, written);
}
template <class A, class D>
inline const A* matrix(const D& at, const Tensor& t, const char* name, int64_t N, int64_t C) {
  return checked_matrix<A>(at, t, name, N, C, false);
}
template <class A, class D>
inline A* matrix_out(const D& at, const OptionalTensor& t, const char* name, int64_t N, int64_t C) {
  return t ? checked_matrix<A>(at, *t, name, N, C, true) : nullptr;
}

inline void check_together(const OptionalTensor& a, const OptionalTensor& b, const char* names) {
  STD_TORCH_CHECK(a.has_value() == b.has_value(), "densenet_ext: ", names, ": expected both or neither, got ",
                  a ? "the first" : "the second", " alone");
}

inline void check_eps(double eps, const char* name) {
  STD_TORCH_CHECK(eps >= 0 && std::isfinite(eps), "densenet_ext: ", name,
                  ": expected a finite number of at least 0, got ", eps);
}

// The five arguments of a BatchNorm.
template <class A, class D>
inline Norm<A> norm(const D& at, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                    const OptionalTensor& bias, double eps, int64_t C) {
  check_eps(eps, "eps");
  return {dense<A>(at, mean, "mean", C), dense<A>(at, var, "var", C), dense<A>(at, weight, "weight", C),
          dense<A>(at, bias, "bias", C), eps};
}

inline void check_two_dims(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(defined(x, name).dim() == 2, "densenet_ext: ", name, ": expected rows [M, C], got shape ",
                  shape_of(x));
}

inline void check_is_features(const Tensor& x, const char* name) {
  const int64_t dims = defined(x, name).dim();
  STD_TORCH_CHECK(dims >= 2 && dims <= 5, "densenet_ext: ", name,
                  ": expected rows [M, C] or images [N, C, *spatial], got shape ", shape_of(x));
}

// Runs f(T{}) for the storage type of x.
template <class F>
inline void for_type_of(const Tensor& x, const char* name, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(bfloat16{});
    case ScalarType::Half:
      return f(float16{});
    default:
      STD_TORCH_CHECK(false, "densenet_ext: ", name, ": expected float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

// Of rows, and of feature maps.
template <class F>
inline void for_storage_type(const Tensor& x, const char* name, const F& f) {
  check_two_dims(x, name);
  for_type_of(x, name, f);
}
template <class F>
inline void for_features_type(const Tensor& x, const char* name, const F& f) {
  check_is_features(x, name);
  for_type_of(x, name, f);
}

}  // namespace dx::ops
