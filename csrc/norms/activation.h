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

// e^x to 1.2 ulp (Cody and Waite reduction, the polynomial of Cephes); 0 or infinity where the result is no normal number.
template <class V>
NORMEXT_INLINE V exponential(V x) {
  if constexpr (Math<V>::kDouble) {
    return Math<V>::exp(x);
  } else {
    // Adding 1.5 * 2^23 leaves the nearest integer n in the low bits.
    const V shifted = fma<V>(x, V{} + 1.44269504f, V{} + 12582912.0f);
    const V n = shifted - 12582912.0f;
    V r = fma<V>(n, V{} - 0.693359375f, x);
    r = fma<V>(n, V{} + 2.12194440e-4f, r);
    V p = fma<V>(V{} + 1.9875691500e-4f, r, V{} + 1.3981999507e-3f);
    p = fma<V>(p, r, V{} + 8.3334519073e-3f);
    p = fma<V>(p, r, V{} + 4.1665795894e-2f);
    p = fma<V>(p, r, V{} + 1.6666665459e-1f);
    p = fma<V>(p, r, V{} + 5.0000001201e-1f);
    p = fma<V>(p, r * r, r) + 1.0f;
    const V e = p * Math<V>::from_bits((Math<V>::to_bits(shifted) + 127u) << 23);
    return x < V{} - 87.0f ? V{} : (x > V{} + 88.0f ? V{} + __builtin_huge_valf() : e);
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
  const V e = exponential<V>(z * z * -0.5f);
  if constexpr (Math<V>::kDouble) {
    return {e * kDensity, 0.5 * Math<V>::erfc(z * -0.7071067811865476)};
  } else {
    // Phi(-|z|) = t*q(t) * e^(-z^2/2) / 2 with t = 1/(1 + 0.4*|z|/sqrt(2)); q fitted to 6e-8 of erfcx over |z| <= 13.
    const V t = 1.0f / fma<V>(z < V{} ? -z : z, V{} + 0.282842712f, V{} + 1.0f);
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
      return z < V{} ? V{} : z;  // NaN stays NaN
    case Activation::kSilu:
      return z / (1.0f + exponential<V>(-z));
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
      const V e = exponential<V>(-z);
      const V s = 1.0f / (1.0f + e);
      // e * s is 1 - s without cancellation, and infinity times 0 far below.
      return z < V{} - 87.0f ? V{} : dy * s * fma<V>(z, e * s, V{} + 1.0f);
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
