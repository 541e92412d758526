// The steps of a channel norm's backward, which are the same for both layouts.
//
//   sums     partial sums of dz and dz*xhat per channel (and image, for group norm)       skipped where nothing needs them
//   finish   parameter gradients, SyncBatchNorm's sums, means over the slabs              channel_stats.cuh; planes: see below
//   apply    gradients of input and residual: dz is computed again                        skipped where neither is wanted
//
// On planes apply may find the means of its slab by itself, and batch norm's parameter gradients with them: a launch less.
#pragma once

#include "cuda/channel_entry.h"
#include "cuda/channel_launch.cuh"
#include "cuda/channel_merge.cuh"

namespace normext::cuda {

// launch_sums(finish), launch_apply(finish). Where finish.means is null and means are wanted, apply finds them.
template <class A, class Sums, class Apply>
void backward_steps(const ChannelBackwardArgs& args, void* workspace, void* stream, Sums launch_sums, Apply launch_apply) {
  const GradWorkspace sizes(args, args.shape, static_cast<int>(size_of(args.dtype)));
  A* partials = static_cast<A*>(workspace);
  GradSumsParams<A> finish{};
  finish.shape = args.shape;
  finish.runs = sizes.runs;
  finish.param_dtype = args.param_dtype;
  finish.weight = args.weight;
  A* means = sizes.means > 0 ? partials + sizes.partials : nullptr;
  if (sizes.needs_sums) {
    finish.by_channel = sizes.apply_finishes && args.shape.batch_norm();
    finish.partials = partials;
    finish.grad[0] = args.grad_bias;
    finish.grad[1] = args.grad_weight;
    finish.sums = args.given_sums ? nullptr : static_cast<A*>(args.sums);
    finish.means = args.given_sums ? nullptr : means;
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

constexpr int kMeansLevels = 6;  // up to 2^35 partial sums in a group

// Means over a slab of g (which = 0) and g * xhat (1), from the partial sums of its channels; by a whole warp.
template <class A>
__device__ __forceinline__ A group_mean(const GradSumsParams<A>& params, int which, std::int64_t slab) {
  const ChannelShape& shape = params.shape;
  const std::int64_t each = shape.channels / shape.groups;
  const std::int64_t image = slab / shape.groups;
  const std::int64_t first_channel = (slab - image * shape.groups) * each;
  const A sum = warp_pairwise<kMeansLevels, A>(slab < 0 ? 0 : params.runs * each, [&](std::int64_t e) {
    const std::int64_t run = e / each;
    const std::int64_t channel = first_channel + e - run * each;
    const A weight = load_any<A>(params.param_dtype, params.weight, channel, 1.0f);
    return weight * params.partials[params.place(which, image * params.runs + run, channel)];
  });
  return sum / static_cast<A>(each * shape.spatial);
}
// The same of batch norm, whose slabs are channels. Where `stores`, the sum is a parameter's gradient, too.
template <class A>
__device__ __forceinline__ A channel_mean(const GradSumsParams<A>& params, int which, std::int64_t channel, bool stores) {
  const A sum =
      warp_pairwise<kMeansLevels, A>(params.runs, [&](std::int64_t e) { return params.partials[params.place(which, e, channel)]; });
  if (stores && params.grad[which] != nullptr && lane_id() == 0) store_any(params.param_dtype, params.grad[which], channel, sum);
  const A weight = load_any<A>(params.param_dtype, params.weight, channel, 1.0f);
  return weight * sum / static_cast<A>(params.shape.slab_size());
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
