// RMSNorm (Zhang, Sennrich 2019):  xhat = x * rstd,  rstd = 1/sqrt(mean(x^2) + eps);  y = xhat * (offset + w)
//   g = dy*(offset + w);  dx = rstd * (g - xhat * mean(g*xhat));  dw = sum_rows dy*xhat
#pragma once

#include "norms/stats.h"

namespace normext {
inline namespace NORMEXT_ISA {

struct RmsNorm {
  static constexpr RowNorm kNorm = RowNorm::kRmsNorm;
  static constexpr bool kCentred = false;
  static constexpr int kSavedStats = 1;  // rstd
  template <class A>
  using Row = ScaledRow<A>;

  template <class A>
  NORMEXT_INLINE static Row<A> finish(A sum_x2, A n, A eps) {
    return {reciprocal_sqrt(sum_x2 / n + eps)};
  }
  template <class V, class A>
  NORMEXT_INLINE static V normalise(V x, Row<A> row) {
    return x * row.rstd;
  }
  template <class V>
  NORMEXT_INLINE static V affine(V xhat, V weight, V) {
    return xhat * weight;
  }
  template <class V, class A>
  NORMEXT_INLINE static V gradient(V g, V xhat, Row<A> row, A, A mean_gx) {
    return exact_product_fma<V>(-xhat, V{} + mean_gx, g) * row.rstd;
  }
};

}  // namespace NORMEXT_ISA
}  // namespace normext
