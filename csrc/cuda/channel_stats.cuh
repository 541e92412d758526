// The small kernels of the channel norms, which work on statistics and sums, not on tensors of input's shape.
//
//   finalise     merges the moments of each slab; a block of up to 8 warps per slab
//   grad_sums    adds the partial sums of dz and dz*xhat of each channel: parameter gradients, and batch norm's slab means
//   slab_means   group norm's slab means of g and g*xhat, from the same partial sums; a warp per slab
// (On planes the kernel that needs the means finds them: channel_backward.cuh.)
// Orders of addition depend on the number of entries only. All are bound by latency: they read what L2 holds.
#pragma once

#include "cuda/channel_backward.cuh"
#include "cuda/channel_entry.h"
#include "cuda/channel_launch.cuh"
#include "cuda/channel_merge.cuh"
#include "cuda/param_grad.cuh"

namespace normext::cuda {

constexpr int kFinaliseWarps = 8;

template <class A>
__global__ void __launch_bounds__(kFinaliseWarps * 32, 1)
    channel_finalise_kernel(const __grid_constant__ FinaliseParams<A> params) {
  const std::int64_t slab = blockIdx.x;
  const std::int64_t entries = params.runs * params.group_channels;
  const A* table = params.partials + slab * 3 * entries;
  const int warp = warp_id();
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;

  dependency_wait();
  MergeSequence<A> sequence;
  NORMEXT_NO_UNROLL
  for (std::int64_t e = threadIdx.x; e < entries; e += blockDim.x) {
    const std::int64_t begin = (params.group_channels == 1 ? e : e / params.group_channels) * params.run_rows;
    const std::int64_t rest = params.rows - begin;
    const A count = static_cast<A>(rest < params.run_rows ? rest : params.run_rows);
    sequence.push({{table[e], table[entries + e], table[2 * entries + e]}, count});
  }
  Counted<A> merged = merge_lanes(sequence.all());
  if (warps > 1) {
    A* shared = reinterpret_cast<A*>(dynamic_smem());
    if (lane_id() == 0) {
      put_moments(shared, warps, warp, merged.moments);
      shared[3 * warps + warp] = merged.n;
    }
    block_barrier();
    merged = merge_table(shared, warps, [&](std::int64_t w) { return shared[3 * warps + w]; });
  }
  if (threadIdx.x == 0) {
    SlabStats<A>(merged.moments, static_cast<A>(params.slab_size), params.eps).save(params.sink, slab);
  }
  launch_dependents();
}

template <class A>
void launch_finalise_typed(const FinaliseParams<A>& params, void* stream) {
  const std::int64_t entries = params.runs * params.group_channels;
  const int warps = static_cast<int>(std::clamp<std::int64_t>(ceil_div(entries, 128), 1, kFinaliseWarps));
  launch_channel(channel_finalise_kernel<A>, params.sink.slabs, warps * 32, 4 * warps * sizeof(A), stream, params);
}

// A block takes 32 channels of one of the two sums, its slices of threads contiguous entries (column_sum()).
// Count, a double, is a template parameter so that the kernel's name says that it converts one.
template <class A, class Count>
__global__ void __launch_bounds__(kGradColumns* kGradSlices, 1) grad_sums_kernel(const __grid_constant__ GradSumsParams<A> params) {
  const std::int64_t channels = params.shape.channels;
  const std::int64_t blocks = ceil_div(channels, kGradColumns);
  const int which = blockIdx.x < blocks ? 0 : 1;
  const std::int64_t channel = (blockIdx.x - which * blocks) * kGradColumns + threadIdx.x % kGradColumns;
  const bool exists = channel < channels;

  dependency_wait();
  // Up to 2^31 entries: as many as a grid can write.
  const A sum = column_sum<kImageLevels + 1, A>(
      params.entries(), [&](std::int64_t e) { return exists ? params.partials[params.place(which, e, channel)] : A(0); });
  if (threadIdx.x >= kGradColumns || !exists) return launch_dependents();
  if (params.grad[which] != nullptr) store_any(params.param_dtype, params.grad[which], channel, sum);
  if (params.sums != nullptr) params.sums[which * channels + channel] = sum;
  if (params.means == nullptr || !params.shape.batch_norm()) return launch_dependents();
  const A n =
      params.count != nullptr ? static_cast<A>(*static_cast<const Count*>(params.count)) : static_cast<A>(params.shape.slab_size());
  const A weight = load_any<A>(params.param_dtype, params.weight, channel, 1.0f);
  launch_dependents();
  params.means[which * channels + channel] = weight * sum / n;
}

constexpr int kMeansWarps = 4;

template <class A>
__global__ void __launch_bounds__(kMeansWarps * 32, 1) slab_means_kernel(const __grid_constant__ GradSumsParams<A> params) {
  const std::int64_t slab = static_cast<std::int64_t>(blockIdx.x) * kMeansWarps + warp_id();
  const std::int64_t slabs = params.shape.slabs();

  dependency_wait();
  for (int which = 0; which < 2; ++which) {
    const A mean = group_mean(params, which, slab < slabs ? slab : -1);
    if (slab < slabs && lane_id() == 0) params.means[which * slabs + slab] = mean;
  }
  launch_dependents();
}

template <class A>
void launch_grad_sums_typed(const GradSumsParams<A>& params, void* stream) {
  const bool batch_norm = params.shape.batch_norm();
  if (params.grad[0] != nullptr || params.grad[1] != nullptr || params.sums != nullptr || (batch_norm && params.means != nullptr)) {
    const int threads = column_threads(params.entries());
    launch_channel(grad_sums_kernel<A, double>, 2 * ceil_div(params.shape.channels, kGradColumns), threads, threads * sizeof(A),
                   stream, params);
  }
  if (batch_norm || params.means == nullptr) return;
  launch_channel(slab_means_kernel<A>, ceil_div(params.shape.slabs(), kMeansWarps), kMeansWarps * 32, 0, stream, params);
}

}  // namespace normext::cuda
