// From tensors to the kernels' plain arguments, with the checks: every message names the argument, what was expected
// and what came. Checks read sizes, strides and dtypes, never data.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/parallel.h"
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

template <class T>
inline void check_dtype(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == Storage<T>::type, "densenet_ext: ", name, ": expected dtype ",
                  torch::headeronly::toString(Storage<T>::type), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.is_cpu(), "densenet_ext: ", name, ": expected a CPU tensor");
}

// Rows of a feature map: [M, C], channels contiguous, any pitch of at least C.
template <class T>
inline int64_t check_rows(const Tensor& t, const char* name, int64_t M, int64_t C) {
  check_dtype<std::remove_const_t<T>>(t, name);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == M && t.size(1) == C, "densenet_ext: ", name, ": expected shape [", M,
                  ", ", C, "], got ", shape_of(t));
  STD_TORCH_CHECK((C <= 1 || t.stride(1) == 1) && (M <= 1 || t.stride(0) >= C), "densenet_ext: ", name,
                  ": expected contiguous channels and rows that do not overlap (strides [>= ", C,
                  ", 1]), got strides [", t.stride(0), ", ", t.stride(1), "]");
  return M <= 1 ? C : t.stride(0);
}
template <class T>
inline Rows<const T> rows(const Tensor& t, const char* name, int64_t M, int64_t C) {
  const int64_t pitch = check_rows<T>(t, name, M, C);
  return {static_cast<const T*>(t.const_data_ptr()), pitch};
}
template <class T>
inline Rows<T> rows_out(const Tensor& t, const char* name, int64_t M, int64_t C) {
  const int64_t pitch = check_rows<T>(t, name, M, C);
  return {static_cast<T*>(t.mutable_data_ptr()), pitch};
}

// Per-channel vectors and small matrices: contiguous, in the acc dtype.
template <class A>
inline void check_dense(const Tensor& t, const char* name, int64_t count) {
  check_dtype<A>(t, name);
  STD_TORCH_CHECK(t.numel() == count && t.is_contiguous(), "densenet_ext: ", name, ": expected ", count,
                  " contiguous elements, got shape ", shape_of(t), t.is_contiguous() ? "" : ", not contiguous");
}
template <class A>
inline const A* dense(const Tensor& t, const char* name, int64_t count) {
  check_dense<A>(t, name, count);
  return static_cast<const A*>(t.const_data_ptr());
}
template <class A>
inline const A* dense(const OptionalTensor& t, const char* name, int64_t count) {
  return t ? dense<A>(*t, name, count) : nullptr;
}
template <class A>
inline A* dense_out(const Tensor& t, const char* name, int64_t count) {
  check_dense<A>(t, name, count);
  return static_cast<A*>(t.mutable_data_ptr());
}
template <class A>
inline A* dense_out(const OptionalTensor& t, const char* name, int64_t count) {
  return t ? dense_out<A>(*t, name, count) : nullptr;
}

inline void check_together(const OptionalTensor& a, const OptionalTensor& b, const char* names) {
  STD_TORCH_CHECK(a.has_value() == b.has_value(), "densenet_ext: ", names, ": expected both or neither");
}

// The five arguments of a BatchNorm.
template <class A>
inline Norm<A> norm(const Tensor& mean, const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
                    double eps, int64_t C) {
  return {dense<A>(mean, "mean", C), dense<A>(var, "var", C), dense<A>(weight, "weight", C), dense<A>(bias, "bias", C),
          eps};
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

// Torch's own threads, as many as the work is worth.
inline cpu::Pool pool(int64_t elements) {
  constexpr int64_t kElementsPerTask = 16384;
  const int64_t worth = std::max<int64_t>(1, elements / kElementsPerTask);
  return {int(std::min<int64_t>(torch::stable::get_num_threads(), worth)),
          [](int tasks, void (*body)(void*, int), void* context) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, int(i));
            });
          }};
}

}  // namespace dx::ops
