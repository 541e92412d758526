// BatchNorm (Ioffe, Szegedy 2015), GroupNorm (Wu, He 2018), InstanceNorm (Ulyanov et al. 2016): LayerNorm's arithmetic over a slab
// (core/channel_args.h), with the affine per channel, then an optional residual and activation.
//
//   z = xhat*w_c + b_c + residual,  y = act(z);   dz = dy*act'(z)
//   dw_c = sum dz*xhat,  db_c = sum dz;   g = dz*w_c;   dx = rstd * (g - mean(g) - xhat*mean(g*xhat)), means over the slab
// The means follow from the sums of each channel, or are summed by themselves: mean(g) = sum_c w_c*sum(dz) / n, mean(g*xhat) =
// sum_c w_c*sum(dz*xhat) / n.
#pragma once

#include "core/channel_args.h"
#include "norms/activation.h"
#include "norms/layer_norm.h"

namespace normext {
inline namespace NORMEXT_ISA {

struct ChannelNorm {
  template <class A>
  using Slab = CentredRow<A>;

  // What the activation is applied to.
  template <class V, class A>
  NORMEXT_INLINE static V affine(V x, Slab<A> slab, V weight, V bias) {
    return fma<V>(LayerNorm::normalise(x, slab), weight, bias);
  }
  // What running_var takes: the variance over n - 1. That of a single value is 0, not 0/0, which would stay in running_var for
  // ever.
  template <class A>
  NORMEXT_INLINE static A unbiased_variance(A m2, A n) {
    return m2 / (n > A(1) ? n - A(1) : A(1));
  }
  // The statistics of evaluation mode.
  template <class V>
  NORMEXT_INLINE static Slab<V> from_running(V mean, V variance, V eps) {
    const V rstd = reciprocal_sqrt(variance + eps), most = V{} + 3.4e38f;
    return {mean, V{}, rstd > most ? most : rstd};  // infinity would turn the 0 beside the mean into NaN
  }
  template <class V>
  NORMEXT_INLINE static V running(V old, V found, V momentum) {
    return fma<V>(momentum, found, (1.0f - momentum) * old);
  }
};

}  // namespace NORMEXT_ISA
}  // namespace normext
