// The steps of a channel norm's backward, which are the same for both layouts.
//
//   sums     partial sums of dz and dz*xhat per channel (and image, for group norm)       skipped where nothing needs them
//   finish   parameter gradients, SyncBatchNorm's sums, means over the slabs              channel_stats.cuh; planes: see below
//   apply    gradients of input and residual: dz is computed again                        skipped where neither is wanted
//
// On planes apply finds the means of its slab by itself, and batch norm's parameter gradients with them: a launch less.
#pragma once

#include "cuda/channel_entry.h"
#include "cuda/channel_launch.cuh"
#include "cuda/channel_merge.cuh"

namespace normext::cuda {

// launch_sums(finish), launch_apply(finish). Where finish.means is null and means are wanted, apply finds them.
template <class A, class Sums, class Apply>
void backward_steps(const ChannelBackwardArgs& args, void* workspace, void* stream, Sums launch_sums, Apply launch_apply) {
  const GradWorkspace sizes(args, args.shape, static_cast<int>(size_of(args.dtype)));
  const bool planes = args.shape.layout == ChannelLayout::kPlanes, batch_norm = args.shape.batch_norm();
  const bool apply_finishes = planes && sizes.needs_means && args.sums == nullptr;
  A* partials = static_cast<A*>(workspace);
  GradSumsParams<A> finish{};
  finish.shape = args.shape;
  finish.runs = sizes.runs;
  finish.param_dtype = args.param_dtype;
  finish.weight = args.weight;
  A* means = sizes.needs_means ? partials + sizes.partials : nullptr;
  if (sizes.needs_sums) {
    finish.by_channel = apply_finishes && batch_norm;
    finish.partials = partials;
    finish.grad[0] = args.grad_bias;
    finish.grad[1] = args.grad_weight;
    finish.sums = args.given_sums ? nullptr : static_cast<A*>(args.sums);
    finish.means = args.given_sums || apply_finishes ? nullptr : means;
    launch_sums(finish);
    if (!finish.by_channel) launch_grad_sums(finish, stream);
  }
  if (args.given_sums && sizes.needs_means) {
    finish.runs = 1;
    finish.by_channel = false;
    finish.partials = static_cast<const A*>(args.sums);
    finish.grad[0] = finish.grad[1] = nullptr;
    finish.means = means;
    finish.count = args.count;
    launch_grad_sums(finish, stream);
  }
  if (args.grad_input != nullptr || args.grad_residual != nullptr) launch_apply(finish);
}

// Replaces dy by dz and gives xhat, of N values.
template <bool kFused, class A, int N, class X, class Row, class Weight, class Bias>
__device__ __forceinline__ void slot_gradients(const ChannelBackwardArgs& args, const X& x, const X& dy, const X& residual, Row row,
                                               Weight weight, Bias bias, A (&xhat)[N], A (&dz)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    xhat[i] = LayerNorm::normalise<A>(x[i], row(i));
    dz[i] = dy[i];
  }
  if constexpr (kFused) {
    A z[N];
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = LayerNorm::affine<A>(xhat[i], weight(i), bias(i));
    if (args.residual != nullptr) {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = z[i] + residual[i];
    }
    activation_gradients(args.activation, z, dz);
  }
}

// dx of N values.
template <class A, int N, class Row, class Weight, class Mean, class MeanX>
__device__ __forceinline__ void input_gradients(bool fixed_stats, const A (&xhat)[N], const A (&dz)[N], Row row, Weight weight,
                                                Mean mean_g, MeanX mean_gx, A (&dx)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const A g = dz[i] * weight(i);
    dx[i] = fixed_stats ? g * row(i).rstd : LayerNorm::gradient<A>(g, xhat[i], row(i), mean_g(i), mean_gx(i));
  }
}

}  // namespace normext::cuda
