// What values go through, a unit at a time, in either layout: output from input, gradients from input and output's gradient.
#pragma once

#include "cpu/channel_sums.inl"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

// What the values of a unit go through; slab[0] is for its first vector, slab[1] for the second.
template <class A>
struct UnitAffine {
  CentredRow<Vector<A>> slab[2];
  Pair<A> weight, bias;
};
// Of one slab, with a weight and a bias for every column.
template <class A>
NORMEXT_INLINE UnitAffine<A> affine_of_slab(CentredRow<A> slab, Pair<A> weight, Pair<A> bias) {
  using V = Vector<A>;
  const CentredRow<V> wide = {V{} + slab.hi, V{} + slab.lo, V{} + slab.rstd};
  return {{wide, wide}, weight, bias};
}

// Output of kUnits units that go through the same. Each is `stride` values after the one before, or in y `y_stride`. All are loaded
// before any is stored: equal offsets within pages of 4 KB would make loads wait for the stores.
template <class T, bool kFused, int kUnits, class Extent>
NORMEXT_INLINE void output_units(Activation activation, const T* x, const T* residual, std::int64_t stride, T* y,
                                 std::int64_t y_stride, const UnitAffine<Accumulate<T>>& affine, Extent extent) {
  using A = Accumulate<T>;
  Pair<A> z[kUnits];
#pragma GCC unroll 8
  for (int u = 0; u < kUnits; ++u) z[u] = load<T>(x + u * stride, extent);
#pragma GCC unroll 8
  for (int u = 0; u < kUnits; ++u) {
    z[u] = {ChannelNorm::affine(z[u].a, affine.slab[0], affine.weight.a, affine.bias.a),
            ChannelNorm::affine(z[u].b, affine.slab[1], affine.weight.b, affine.bias.b)};
  }
  if constexpr (kFused) {
    if (residual != nullptr) {
#pragma GCC unroll 8
      for (int u = 0; u < kUnits; ++u) z[u] = z[u] + load<T>(residual + u * stride, extent);
    }
    activate_all<A>(activation, z);
  }
#pragma GCC unroll 8
  for (int u = 0; u < kUnits; ++u) store<T>(y + u * y_stride, z[u], extent);
}

// xhat and dz of kCount units: dz comes as dy.
template <class T, bool kFused, int kCount, class Extent>
NORMEXT_INLINE void backward_units(Activation activation, const T* const (&residual)[kCount],
                                   const UnitAffine<Accumulate<T>>& affine, Pair<Accumulate<T>> (&x)[kCount],
                                   Pair<Accumulate<T>> (&dz)[kCount], Extent extent) {
  using A = Accumulate<T>;
#pragma GCC unroll 8
  for (int u = 0; u < kCount; ++u) {
    x[u] = {LayerNorm::normalise(x[u].a, affine.slab[0]), LayerNorm::normalise(x[u].b, affine.slab[1])};
  }
  if constexpr (kFused) {
    Pair<A> z[kCount];
#pragma GCC unroll 8
    for (int u = 0; u < kCount; ++u) {
      z[u] = {LayerNorm::affine(x[u].a, affine.weight.a, affine.bias.a), LayerNorm::affine(x[u].b, affine.weight.b, affine.bias.b)};
    }
    if (residual[0] != nullptr) {
#pragma GCC unroll 8
      for (int u = 0; u < kCount; ++u) z[u] = z[u] + load<T>(residual[u], extent);
    }
    activation_gradients<A>(activation, z, dz);
  }
}

// Writes dz and dx of one unit, whichever are wanted. The means are those of g and g*xhat.
template <class T, bool kFixed, class Extent>
NORMEXT_INLINE void store_gradients(const ChannelBackwardArgs& args, std::int64_t i, const UnitAffine<Accumulate<T>>& affine,
                                    Pair<Accumulate<T>> dz, Pair<Accumulate<T>> xhat, Pair<Accumulate<T>> mean_g,
                                    Pair<Accumulate<T>> mean_gx, Extent extent) {
  using A = Accumulate<T>;
  if (args.grad_residual != nullptr) store<T>(static_cast<T*>(args.grad_residual) + i, dz, extent);
  if (args.grad_input == nullptr) return;
  Pair<A> dx = {dz.a * affine.weight.a, dz.b * affine.weight.b};
  if constexpr (kFixed) {
    dx = {dx.a * affine.slab[0].rstd, dx.b * affine.slab[1].rstd};
  } else {
    dx = {LayerNorm::gradient(dx.a, xhat.a, affine.slab[0], mean_g.a, mean_gx.a),
          LayerNorm::gradient(dx.b, xhat.b, affine.slab[1], mean_g.b, mean_gx.b)};
  }
  store<T>(static_cast<T*>(args.grad_input) + i, dx, extent);
}

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
