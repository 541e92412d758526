// LayerNorm (Ba, Kiros, Hinton 2016):  xhat = (x - mean) * rstd,  rstd = 1/sqrt(var + eps), biased var;  y = xhat*w + b
//   g = dy*w;  dx = rstd * (g - mean(g) - xhat * mean(g*xhat));  dw = sum_rows dy*xhat;  db = sum_rows dy
#pragma once

#include "norms/stats.h"

namespace normext {
inline namespace NORMEXT_ISA {

struct LayerNorm {
  static constexpr RowNorm kNorm = RowNorm::kLayerNorm;
  static constexpr bool kCentred = true;  // statistics need the mean; bias and its gradient exist
  static constexpr int kSavedStats = 3;   // hi, lo, rstd
  template <class A>
  using Row = CentredRow<A>;

  // The mean is subtracted before scaling, never folded into a*x + b: that cancels at large mean.
  template <class V, class A>
  NORMEXT_INLINE static V normalise(V x, Row<A> row) {
    return fma<V>(x - row.hi, V{} + row.rstd, V{} - row.lo * row.rstd);
  }
  template <class V>
  NORMEXT_INLINE static V affine(V xhat, V weight, V bias) {
    return fma<V>(xhat, weight, bias);
  }
  // dx from g, its mean and the mean of g*xhat.
  template <class V, class A>
  NORMEXT_INLINE static V gradient(V g, V xhat, Row<A> row, A mean_g, A mean_gx) {
    return exact_product_fma<V>(-xhat, V{} + mean_gx, g - mean_g) * row.rstd;
  }
};

}  // namespace NORMEXT_ISA
}  // namespace normext
