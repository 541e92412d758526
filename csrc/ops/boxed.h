// From a typed function to the boxed kernel torch's dispatcher calls: `define(schema, boxed<f>)`. A leaner TORCH_BOX: tensors are
// owned handles without a control block. Arguments: Tensor, OptionalTensor (`Tensor?`), int64_t, double; results: Tensor, tuples
// of it, void.
#pragma once

#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "ops/tensor.h"

namespace normext::ops {

using BoxedKernel = void (*)(StableIValue* stack, std::uint64_t inputs, std::uint64_t outputs);

// Defines an op of namespace `normext` and its kernel for CPU and CUDA tensors; the kernel looks at the device.
void define(const char* schema, BoxedKernel kernel);

namespace detail {

template <class T>
struct Unbox;
template <>
struct Unbox<Tensor> {
  static Tensor from(StableIValue value) noexcept { return Tensor(reinterpret_cast<AtenTensorHandle>(value)); }
};
template <>
struct Unbox<OptionalTensor> {
  // A present optional arrives as an owned heap cell that holds the value.
  static OptionalTensor from(StableIValue value) noexcept {
    auto* cell = reinterpret_cast<StableIValue*>(value);
    if (cell == nullptr) return OptionalTensor();
    OptionalTensor tensor(reinterpret_cast<AtenTensorHandle>(*cell));
    delete cell;
    return tensor;
  }
};
template <>
struct Unbox<std::int64_t> {
  static std::int64_t from(StableIValue value) noexcept { return static_cast<std::int64_t>(value); }
};
template <>
struct Unbox<double> {
  static double from(StableIValue value) noexcept {
    double number;
    std::memcpy(&number, &value, sizeof(number));
    return number;
  }
};

template <class F>
struct Signature;
template <class R, class... A>
struct Signature<R (*)(A...)> {
  using Result = R;
  using Arguments = std::tuple<std::decay_t<A>...>;

  // Every argument leaves the stack before anything can throw, so nothing leaks. Braces evaluate left to right.
  template <std::size_t... I>
  static Arguments take(StableIValue* stack, std::index_sequence<I...>) noexcept {
    return Arguments{Unbox<std::decay_t<A>>::from(stack[I])...};
  }
};

inline StableIValue box(Tensor& tensor) { return reinterpret_cast<StableIValue>(tensor.release()); }

template <class... T, std::size_t... I>
void put(std::tuple<T...>& results, StableIValue* stack, std::index_sequence<I...>) {
  ((stack[I] = box(std::get<I>(results))), ...);
}

}  // namespace detail

template <auto function>
void boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  using Signature = detail::Signature<decltype(function)>;
  using Result = typename Signature::Result;
  constexpr std::size_t count = std::tuple_size_v<typename Signature::Arguments>;
  const auto arguments = Signature::take(stack, std::make_index_sequence<count>());
  if constexpr (std::is_void_v<Result>) {
    std::apply(function, arguments);
  } else if constexpr (std::is_same_v<Result, Tensor>) {
    Tensor result = std::apply(function, arguments);
    stack[0] = detail::box(result);
  } else {
    Result results = std::apply(function, arguments);
    detail::put(results, stack, std::make_index_sequence<std::tuple_size_v<Result>>());
  }
}

}  // namespace normext::ops
