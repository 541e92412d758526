// Statistics of all ranks (SyncBatchNorm), and running statistics by themselves: of instance norm, of SyncBatchNorm, where the
// forward and they are separate ops, and where they share memory with what the forward reads. One thread per channel; nothing is
// read by the host, so that a captured graph replays right.
#pragma once

#include "cuda/channel_launch.cuh"
#include "cuda/channel_merge.cuh"
#include "cuda/param_grad.cuh"

namespace normext::cuda {

constexpr int kRunningThreads = 128;

__device__ __forceinline__ std::int64_t thread_channel() {
  return static_cast<std::int64_t>(blockIdx.x) * kRunningThreads + threadIdx.x;
}

// The int64 whose bits the values from p on hold; a row of floats may leave it at 4 bytes past a multiple of 8.
template <class A>
__device__ __forceinline__ std::int64_t count_of(const A* p) {
  std::int64_t count = 0;
  if constexpr (sizeof(A) == 4) {
    const std::uint64_t low = float_to_bits(p[0]), high = float_to_bits(p[1]);
    count = static_cast<std::int64_t>(low | high << 32);
  } else {
    const A value = p[0];
    memcpy(&count, &value, sizeof(count));
  }
  return count;
}

// Count, a double, is a template parameter so that the kernel's name says that it makes one.
template <class A, class Count>
__global__ void __launch_bounds__(kRunningThreads, 1) merge_moments_kernel(const __grid_constant__ ChannelMergeArgs args, A eps) {
  constexpr std::int64_t kCountValues = 8 / static_cast<int>(sizeof(A));
  const std::int64_t channels = args.channels;
  const std::int64_t channel = thread_channel();
  if (channel >= channels) return;

  dependency_wait();
  MergeSequence<A> sequence;
  std::int64_t values = 0;
  for (std::int64_t r = 0; r < args.ranks; ++r) {
    const A* row = static_cast<const A*>(args.gathered) + r * (3 * channels + kCountValues);
    const std::int64_t count = count_of(row + 3 * channels);
    sequence.push({{row[channel], row[channels + channel], row[2 * channels + channel]}, static_cast<A>(count)});
    values += count;
  }
  SlabStats<A> stats(sequence.all().moments, static_cast<A>(values), eps);
  if (values == 0) {
    stats.row = {};
    stats.unbiased = kNoValues;
  }
  put_stats(static_cast<A*>(args.stats), channels, channel, stats.row, stats.unbiased);
  if (channel == 0) *args.count = static_cast<Count>(values);
}

template <class A>
__global__ void __launch_bounds__(kRunningThreads, 1) update_running_kernel(const __grid_constant__ RunningArgs args, A momentum) {
  const std::int64_t channel = thread_channel();
  if (channel >= args.channels) return;
  dependency_wait();
  const A* stats = static_cast<const A*>(args.stats);
  const std::int64_t slabs = args.images * args.channels;
  if (stats[3 * slabs + channel] == A(kNoValues)) return;
  const auto mean_of_images = [&](auto found) {
    PairwiseSum<A, kImageLevels> pairs;
    const std::int64_t padded = power_of_two_at_least(args.images);
    for (std::int64_t i = 0; i < padded; ++i) pairs.push(i < args.images ? found(i * args.channels + channel) : A(0));
    return pairs.sum() / static_cast<A>(args.images);
  };
  const A mean = mean_of_images([&](std::int64_t s) { return stats[s] + stats[slabs + s]; });
  const A unbiased = mean_of_images([&](std::int64_t s) { return stats[3 * slabs + s]; });
  update_running_stats(args.update, momentum, channel, mean, unbiased);
}

}  // namespace normext::cuda
