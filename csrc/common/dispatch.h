// From a tensor's run-time dtype to the storage type a kernel is compiled for.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <limits>

#include "checks.h"

namespace retinanet_ext {

using torch::headeronly::ScalarType;

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline bool is_half(ScalarType type) {
  return type == ScalarType::Half || type == ScalarType::BFloat16;
}

// The type a value is computed in: float64 stays, everything narrower is float32.
inline ScalarType compute_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// A finite value as T, the largest finite one where it is beyond.
template <typename T>
T finite_cast(double value) {
  constexpr double kLargest = static_cast<double>(std::numeric_limits<T>::max());
  return static_cast<T>(value > kLargest ? kLargest : value);
}

}  // namespace retinanet_ext
