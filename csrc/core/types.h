// Storage types and the closed sets that arguments come from.
#pragma once

#include <cstdint>

namespace normext {

// 16-bit storage only: arithmetic is done in Accumulate<T>.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

enum class DType : int { kFloat32, kFloat16, kBFloat16, kFloat64 };

// Where the normalised value is rounded to the activation type.
enum class Rounding : int {
  kTorch,  // once, after weight and bias
  kLlama,  // before the weight is applied, then once more at the end
};

enum class RowNorm : int { kLayerNorm, kRmsNorm };

// Applied to the output of a channel norm; gelu is the exact one (erf), leaky_relu has slope kLeakyReluSlope.
enum class Activation : int { kNone, kRelu, kSilu, kGelu, kLeakyRelu };
constexpr double kLeakyReluSlope = 0.01;

template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
// The type in which values of storage type T are summed and normalised.
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

}  // namespace normext
