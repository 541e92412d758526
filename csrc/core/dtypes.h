// From a run-time DType to a compile-time type: visit(dtype, [&](auto t) { using T = typename decltype(t)::type; }).
#pragma once

#include <cstddef>

#include "core/types.h"

namespace normext {

template <class T>
struct TypeTag {
  using type = T;
};

inline std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
      return 2;
    case DType::kBFloat16:
      return 2;
    case DType::kFloat64:
      return 8;
  }
  return 0;
}

constexpr DType accumulate_dtype_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
inline std::size_t accumulate_size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

template <class F>
decltype(auto) visit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(TypeTag<Half>{});
    case DType::kBFloat16:
      return f(TypeTag<BFloat16>{});
    case DType::kFloat64:
      return f(TypeTag<double>{});
    case DType::kFloat32:
      break;
  }
  return f(TypeTag<float>{});
}

}  // namespace normext
