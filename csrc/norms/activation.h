// Activations that follow a channel norm, and their derivatives, on a value type V.
//
//   relu        max(z, 0)                          z > 0
//   silu        z * s,  s = 1/(1 + e^-z)           s * (1 + z*(1 - s))
//   gelu        z * Phi(z)                         Phi(z) + z*phi(z)          the exact one, not its tanh approximation
//   leaky_relu  z > 0 ? z : z/100                  z > 0 ? 1 : 1/100
//
// In float, e^x and Phi are the polynomials below on every back end, so that they vectorise and agree; in double, libm's.
#pragma once

#include <type_traits>

#include "core/math.h"
#include "core/types.h"

namespace normext {
inline namespace NORMEXT_ISA {

// e^x and e^-x are normal numbers for |x| up to here, in float.
template <class V>
constexpr typename Math<V>::Scalar kMostExponent = Math<V>::kDouble ? 709.7 : 87.0f;
// e^x is too large here.
template <class V>
constexpr typename Math<V>::Scalar kOverflow = Math<V>::kDouble ? 710.0 : 88.75f;

// e^-x to an ulp for -kOverflow <= x <= kMostExponent (Cody and Waite's reduction; the polynomial is fitted to 2e-9), infinite or
// NaN where that is too large, and nothing for other floats.
template <class V>
NORMEXT_INLINE V exponential_of_minus(V x) {
  if constexpr (Math<V>::kDouble) {
    return Math<V>::exp(-x);
  } else {
    // Adding 1.5 * 2^23 leaves the nearest integer n in the low bits: e^-x = 2^n * e^-r.
    const V shifted = fma<V>(x, V{} - 1.44269504f, V{} + 12582912.0f);
    const V n = shifted - 12582912.0f;
    V r = fma<V>(n, V{} + 0.693359375f, x);
    r = fma<V>(n, V{} - 2.12194440e-4f, r);
    V p = fma<V>(V{} + 1.3843607e-3f, r, V{} - 8.3741955e-3f);
    p = fma<V>(p, r, V{} + 4.1668005e-2f);
    p = fma<V>(p, r, V{} - 1.6666430e-1f);
    p = fma<V>(p, r, V{} + 4.9999994e-1f);
    p = fma<V>(p, r, V{} - 1.0f);
    p = fma<V>(p, r, V{} + 1.0f);
    return Math<V>::from_bits(Math<V>::to_bits(p) + (Math<V>::to_bits(shifted) << 23));  // p * 2^n
  }
}

// The normal distribution: density and cumulative probability.
template <class V>
struct Normal {
  V density, cumulative;
};
template <class V>
NORMEXT_INLINE Normal<V> normal(V z) {
  constexpr double kDensity = 0.3989422804014327;  // 1/sqrt(2*pi)
  const V half_square = z * z * 0.5f, exponential = exponential_of_minus<V>(half_square);
  if constexpr (Math<V>::kDouble) {
    return {exponential * kDensity, 0.5 * Math<V>::erfc(z * -0.7071067811865476)};
  } else {
    const V e = half_square > V{} + kMostExponent<V> ? V{} : exponential;
    // Phi(-|z|) = t*q(t) * e^(-z^2/2) / 2 with t = 1/(1 + 0.4*|z|/sqrt(2)); q fitted to 6e-8 of erfcx over |z| <= 13, and beyond 14
    // e is 0.
    const V size = Math<V>::minimum(V{} + 14.0f, Math<V>::absolute(z));
    const V t = Math<V>::reciprocal(fma<V>(size, V{} + 0.282842712f, V{} + 1.0f));
    V q = fma<V>(V{} + 0.04068455f, t, V{} - 0.13743787f);
    q = fma<V>(q, t, V{} + 0.07776277f);
    q = fma<V>(q, t, V{} + 0.09543049f);
    q = fma<V>(q, t, V{} + 0.07433334f);
    q = fma<V>(q, t, V{} + 0.19582847f);
    q = fma<V>(q, t, V{} + 0.20122945f);
    q = fma<V>(q, t, V{} + 0.22654068f);
    q = fma<V>(q, t, V{} + 0.22562817f);
    const V tail = t * q * e * 0.5f;
    return {e * static_cast<float>(kDensity), z < V{} ? tail : 1.0f - tail};
  }
}

// body(std::integral_constant<Activation, ...>) for an activation other than none: the switch then stands outside the loop over
// values, whose steps overlap.
template <class Body>
NORMEXT_INLINE void switch_activation(Activation activation, Body body) {
  switch (activation) {
    case Activation::kRelu:
      return body(std::integral_constant<Activation, Activation::kRelu>());
    case Activation::kSilu:
      return body(std::integral_constant<Activation, Activation::kSilu>());
    case Activation::kGelu:
      return body(std::integral_constant<Activation, Activation::kGelu>());
    case Activation::kLeakyRelu:
      return body(std::integral_constant<Activation, Activation::kLeakyRelu>());
    case Activation::kNone:
      return;
  }
}

template <class V>
NORMEXT_INLINE V activate(Activation activation, V z) {
  switch (activation) {
    case Activation::kRelu:
      return Math<V>::maximum(V{}, z);
    case Activation::kSilu: {
      const V within = Math<V>::minimum(V{} + kMostExponent<V>, Math<V>::maximum(V{} - kOverflow<V>, z));
      return Math<V>::quotient(z, exponential_of_minus<V>(within) + 1.0f);
    }
    case Activation::kGelu:
      return z * normal<V>(z).cumulative;
    case Activation::kLeakyRelu:
      return z > V{} ? z : z * static_cast<typename Math<V>::Scalar>(kLeakyReluSlope);
    case Activation::kNone:
      break;
  }
  return z;
}

// dz from dy, the gradient of activate(z).
template <class V>
NORMEXT_INLINE V activation_gradient(Activation activation, V z, V dy) {
  switch (activation) {
    case Activation::kRelu:
      return z <= V{} ? V{} : dy;
    case Activation::kSilu: {
      const V within = Math<V>::minimum(V{} + kMostExponent<V>, z);
      const V e = exponential_of_minus<V>(within), s = Math<V>::reciprocal(e + 1.0f);
      const V dz = dy * s * fma<V>(within, e * s, V{} + 1.0f);  // e * s is 1 - s without cancellation
      return z < V{} - kMostExponent<V> ? V{} : dz;             // where e means nothing
    }
    case Activation::kGelu: {
      const Normal<V> n = normal<V>(z);
      return dy * fma<V>(z, n.density, n.cumulative);
    }
    case Activation::kLeakyRelu:
      return z > V{} ? dy : dy * static_cast<typename Math<V>::Scalar>(kLeakyReluSlope);
    case Activation::kNone:
      break;
  }
  return dy;
}

}  // namespace NORMEXT_ISA
}  // namespace normext
