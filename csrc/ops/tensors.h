// From tensors to the kernels' plain arguments, with the checks: every message names the argument, what was expected
// and what came. Checks read sizes, strides, dtypes and devices, never data. D is the backend's device (cpu.h, cuda.h).
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../params.h"
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

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

// Where a call runs: on the device of the tensor that the dispatcher looked at first, as all its other tensors must.
class Place {
 public:
  explicit Place(const Tensor& first) : device_(first.device()) {}
  const torch::stable::Device& device() const { return device_; }
  void check(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.device() == device_, "densenet_ext: ", name, ": expected a tensor on ", name_of(device_),
                    " as the other arguments, got one on ", name_of(t.device()));
  }

 private:
  static std::string name_of(const torch::stable::Device& device) {
    if (device.type() == torch::headeronly::DeviceType::CPU) return "cpu";
    if (device.type() != torch::headeronly::DeviceType::CUDA) return "another kind of device";
    return "cuda:" + std::to_string(device.index());
  }
  torch::stable::Device device_;
};

template <class T, class D>
inline void check_dtype(const D& at, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == Storage<T>::type, "densenet_ext: ", name, ": expected dtype ",
                  torch::headeronly::toString(Storage<T>::type), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  at.check(t, name);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % sizeof(T) == 0, "densenet_ext: ", name,
                  ": expected storage aligned to its elements of ", sizeof(T), " bytes");
}

// Rows of a feature map: [M, C], channels contiguous, any pitch of at least C.
template <class T, class D>
inline int64_t check_rows(const D& at, const Tensor& t, const char* name, int64_t M, int64_t C) {
  check_dtype<std::remove_const_t<T>>(at, t, name);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == M && t.size(1) == C, "densenet_ext: ", name, ": expected shape [", M,
                  ", ", C, "], got ", shape_of(t));
  STD_TORCH_CHECK((C <= 1 || t.stride(1) == 1) && (M <= 1 || t.stride(0) >= C), "densenet_ext: ", name,
                  ": expected contiguous channels and rows that do not overlap (strides [>= ", C,
                  ", 1]), got strides [", t.stride(0), ", ", t.stride(1), "]");
  return M <= 1 ? C : t.stride(0);
}
template <class T, class D>
inline Rows<const T> rows(const D& at, const Tensor& t, const char* name, int64_t M, int64_t C) {
  const int64_t pitch = check_rows<T>(at, t, name, M, C);
  return {static_cast<const T*>(t.const_data_ptr()), pitch};
}
template <class T, class D>
inline Rows<T> rows_out(const D& at, const Tensor& t, const char* name, int64_t M, int64_t C) {
  const int64_t pitch = check_rows<T>(at, t, name, M, C);
  return {static_cast<T*>(t.mutable_data_ptr()), pitch};
}

// Whether two arguments are the same rows: where a kernel works in place.
template <class T, class U>
inline bool same_rows(Rows<T> a, Rows<U> b) {
  return a.data == b.data && a.pitch == b.pitch;
}

// Rows that are written must lie apart from rows that other threads still read: in other memory, or in other columns
// of one buffer.
template <class T, class U>
inline void check_apart(Rows<T> out, int64_t out_rows, int64_t out_columns, const char* out_name, Rows<U> in,
                        int64_t in_rows, int64_t in_columns, const char* in_name) {
  const auto begin = [](const auto& r) { return reinterpret_cast<uintptr_t>(r.data); };
  const auto end = [&](const auto& r, int64_t M, int64_t C) {
    return begin(r) + ((M - 1) * r.pitch + C) * sizeof(*r.data);
  };
  if (out_rows == 0 || in_rows == 0 || !out.data || !in.data) return;
  if (end(out, out_rows, out_columns) <= begin(in) || end(in, in_rows, in_columns) <= begin(out)) return;
  const uintptr_t pitch = uintptr_t(out.pitch) * sizeof(T);
  bool apart = pitch == uintptr_t(in.pitch) * sizeof(U);
  if (apart) {
    // Columns of `in`, counted from the first of `out`, around one row.
    const uintptr_t first = (begin(in) + pitch - begin(out) % pitch) % pitch;
    apart = first >= out_columns * sizeof(T) && first + in_columns * sizeof(U) <= pitch;
  }
  STD_TORCH_CHECK(apart, "densenet_ext: ", out_name, ": expected storage apart from that of ", in_name,
                  ", got an overlap");
}

// Per-channel vectors and small matrices: contiguous, in the acc dtype.
template <class A, class D>
inline void check_dense(const D& at, const Tensor& t, const char* name, int64_t count) {
  check_dtype<A>(at, t, name);
  STD_TORCH_CHECK(t.numel() == count && t.is_contiguous(), "densenet_ext: ", name, ": expected ", count,
                  " contiguous elements, got shape ", shape_of(t), t.is_contiguous() ? "" : ", not contiguous");
}
template <class A, class D>
inline const A* dense(const D& at, const Tensor& t, const char* name, int64_t count) {
  check_dense<A>(at, t, name, count);
  return static_cast<const A*>(t.const_data_ptr());
}
template <class A, class D>
inline const A* dense(const D& at, const OptionalTensor& t, const char* name, int64_t count) {
  return t ? dense<A>(at, *t, name, count) : nullptr;
}
template <class A, class D>
inline A* dense_out(const D& at, const Tensor& t, const char* name, int64_t count) {
  check_dense<A>(at, t, name, count);
  return static_cast<A*>(t.mutable_data_ptr());
}
template <class A, class D>
inline A* dense_out(const D& at, const OptionalTensor& t, const char* name, int64_t count) {
  return t ? dense_out<A>(at, *t, name, count) : nullptr;
}

inline void check_together(const OptionalTensor& a, const OptionalTensor& b, const char* names) {
  STD_TORCH_CHECK(a.has_value() == b.has_value(), "densenet_ext: ", names, ": expected both or neither");
}

// The five arguments of a BatchNorm.
template <class A, class D>
inline Norm<A> norm(const D& at, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                    const OptionalTensor& bias, double eps, int64_t C) {
  return {dense<A>(at, mean, "mean", C), dense<A>(at, var, "var", C), dense<A>(at, weight, "weight", C),
          dense<A>(at, bias, "bias", C), eps};
}

inline void check_two_dims(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, "densenet_ext: ", name, ": expected rows [M, C], got shape ", shape_of(x));
}

// Runs f(T{}) for the storage type of x.
template <class F>
inline void for_storage_type(const Tensor& x, const char* name, const F& f) {
  check_two_dims(x, name);
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

}  // namespace dx::ops
