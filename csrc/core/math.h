// Arithmetic on a value type V: float or double here, a GNU vector type where a CPU file specialises Math.
// Nothing is contracted by the compiler (-ffp-contract=off, -fmad=false): an fma() is written where one is meant.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/portable.h"
#include "core/types.h"

namespace normext {
inline namespace NORMEXT_ISA {

// The operations of a value type. reciprocal(a) of a float is for a between 2^-125 and 2^126. quotient(a, b) is a/b for b from 1
// on; for a float b of 2^126 and more a/b or a * 0, for NaN a * 0. minimum and maximum are for a that is a number, and NaN where b
// is.
template <class V>
struct Math;

NORMEXT_INLINE float bits_to_float(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
NORMEXT_INLINE std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <>
struct Math<float> {
  using Scalar = float;
  static constexpr bool kDouble = false;
  NORMEXT_INLINE static float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
  NORMEXT_INLINE static float exact_product_fma(float a, float b, float c) { return ::fmaf(a, b, c); }
  NORMEXT_INLINE static float reciprocal(float a) { return reciprocal_of_normal(a); }
  NORMEXT_INLINE static float quotient(float a, float b) { return quotient_by_normal(a, b); }
  NORMEXT_INLINE static float sqrt(float a) { return ::sqrtf(a); }
  NORMEXT_INLINE static float minimum(float a, float b) { return minimum_or_nan(a, b); }
  NORMEXT_INLINE static float maximum(float a, float b) { return maximum_or_nan(a, b); }
  NORMEXT_INLINE static float absolute(float a) { return ::fabsf(a); }
  NORMEXT_INLINE static std::uint32_t to_bits(float a) { return float_to_bits(a); }
  NORMEXT_INLINE static float from_bits(std::uint32_t bits) { return bits_to_float(bits); }
};

template <>
struct Math<double> {
  using Scalar = double;
  static constexpr bool kDouble = true;
  NORMEXT_INLINE static double exp(double a) { return ::exp(a); }
  NORMEXT_INLINE static double reciprocal(double a) { return 1.0 / a; }
  NORMEXT_INLINE static double quotient(double a, double b) { return a / b; }
  NORMEXT_INLINE static double minimum(double a, double b) { return a < b ? a : b; }
  NORMEXT_INLINE static double maximum(double a, double b) { return a > b ? a : b; }
  NORMEXT_INLINE static double erfc(double a) { return ::erfc(a); }
  NORMEXT_INLINE static double fma(double a, double b, double c) { return ::fma(a, b, c); }
  NORMEXT_INLINE static double exact_product_fma(double a, double b, double c) { return ::fma(a, b, c); }
  NORMEXT_INLINE static double sqrt(double a) { return ::sqrt(a); }
};

template <class V>
NORMEXT_INLINE V fma(V a, V b, V c) {
  return Math<V>::fma(a, b, c);
}

// The same where the sum may cancel: in float32 the product is exact for instruction sets whose fma() rounds it, too.
template <class V>
NORMEXT_INLINE V exact_product_fma(V a, V b, V c) {
  return Math<V>::exact_product_fma(a, b, c);
}

// 1/sqrt(x) to about half an ulp: two correctly rounded operations, then a Newton step whose residual h = 1 - x*r*r is formed
// without cancellation [RMSNorm dx on a million rows of 4 to 16 columns: 4.5 of the contract's 4 without the step, 3.6 with it].
template <class V>
NORMEXT_INLINE V reciprocal_sqrt(V x) {
  const V r = 1.0f / Math<V>::sqrt(x);
  const V t = x * r;
  const V h = exact_product_fma<V>(-t, r, V{} + 1.0f) - exact_product_fma<V>(x, r, -t) * r;
  // x of zero or infinity leaves nothing to refine.
  return h - h == V{} ? fma<V>(0.5f * r, h, r) : r;
}

// Scalar conversions by integer arithmetic: round to nearest even, NaN to the quiet NaN torch uses.
NORMEXT_INLINE float to_float(float x) { return x; }
NORMEXT_INLINE float to_float(BFloat16 x) { return bits_to_float(static_cast<std::uint32_t>(x.bits) << 16); }
NORMEXT_INLINE float to_float(Half x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude << 13 & 0x7fffffu));
  if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
  return bits_to_float(sign | float_to_bits(subnormal));
}

template <class T>
struct FromFloat;
template <>
struct FromFloat<float> {
  NORMEXT_INLINE static float convert(float x) { return x; }
};
template <>
struct FromFloat<BFloat16> {
  NORMEXT_INLINE static BFloat16 convert(float x) {
    const std::uint32_t bits = float_to_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0u};
    return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
  }
};
template <>
struct FromFloat<Half> {
  NORMEXT_INLINE static Half convert(float x) {
    const std::uint32_t bits = float_to_bits(x);
    const std::uint16_t sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // 65520 and above
    if (magnitude < 0x38800000u) {  // below 2^-14: the addition rounds at the subnormal step
      const float shifted = bits_to_float(magnitude) + 0.5f;
      return {static_cast<std::uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u))};
    }
    const std::uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
  }
};

}  // namespace NORMEXT_ISA
}  // namespace normext
