// What a channel norm (BatchNorm, GroupNorm, InstanceNorm, SyncBatchNorm) is asked to do, in terms that know neither torch nor
// CUDA.
//
// Input is [batch, channels, spatial], dense, in one of two layouts. A slab is what shares statistics: a channel of the whole batch
// (batch norm), or the channels of a group in one image (group norm; instance norm has one channel per group).
#pragma once

#include <cstdint>

#include "core/portable.h"
#include "core/types.h"

namespace normext {

enum class ChannelLayout : int {
  kPlanes,        // [batch, channels, spatial] contiguous
  kChannelsLast,  // [batch, spatial, channels] contiguous
};

struct ChannelShape {
  std::int64_t batch = 0;
  std::int64_t channels = 0;
  std::int64_t spatial = 0;
  std::int64_t groups = 0;  // of channels, in each image; 0: batch norm
  ChannelLayout layout = ChannelLayout::kPlanes;

  NORMEXT_HOST_DEVICE constexpr bool batch_norm() const { return groups == 0; }
  NORMEXT_HOST_DEVICE constexpr std::int64_t group_channels() const { return batch_norm() ? 1 : channels / groups; }
  NORMEXT_HOST_DEVICE constexpr std::int64_t slabs() const { return batch_norm() ? channels : batch * groups; }
  NORMEXT_HOST_DEVICE constexpr std::int64_t slab_size() const {
    return batch_norm() ? batch * spatial : group_channels() * spatial;
  }
  NORMEXT_HOST_DEVICE constexpr std::int64_t elements() const { return batch * channels * spatial; }
};

// The layout kernels use where memory is the same in both: lanes go along what is longer than one.
constexpr ChannelShape canonical(ChannelShape shape) {
  if (shape.channels == 1) {
    shape.layout = ChannelLayout::kPlanes;
  } else if (shape.spatial == 1) {
    shape.layout = ChannelLayout::kChannelsLast;
  }
  return shape;
}

// Planes of the statistics of a slab, each [slabs] in the accumulate dtype: the mean, its rounding error, rstd, and the unbiased
// variance, which running statistics take. It is kNoValues where SyncBatchNorm found all ranks empty; the others are then 0.
constexpr int kChannelStats = 4;
constexpr float kNoValues = -1.0f;
// Planes of moments that SyncBatchNorm exchanges: the mean, its rounding error, the sum of squared deviations.
constexpr int kChannelMoments = 3;

// Running statistics, of batch norm or of the images of instance norm: running = (1 - momentum) * running + momentum * statistic.
struct RunningUpdate {
  DType dtype = DType::kFloat32;          // float64 with float64 statistics, another with float32
  void* mean = nullptr;                   // [channels]; null, like var: nothing is updated
  void* var = nullptr;                    // [channels]
  const std::int64_t* batches = nullptr;  // [1] or null: momentum is then 1 / *batches (cumulative average)
  double momentum = 0.0;
};

// output = activation(norm(input) * weight + bias + residual). All tensors of input's shape have input's layout, but see
// planes_output.
struct ChannelForwardArgs {
  ChannelShape shape;
  DType dtype = DType::kFloat32;        // of input, residual and output
  DType param_dtype = DType::kFloat32;  // of weight and bias: dtype, or float32 with 16-bit dtype
  const void* input = nullptr;
  const void* residual = nullptr;  // or null
  void* output = nullptr;          // or null: statistics only; overlaps nothing that is read
  const void* weight = nullptr;    // [channels] or null
  const void* bias = nullptr;      // [channels] or null
  void* stats = nullptr;           // [4, slabs]; written, or read where given_stats. Null where only moments are wanted
  void* moments = nullptr;         // [3, slabs] or null; written
  bool given_stats = false;
  // Evaluation of batch norm: the statistics come from these; on CUDA, stats may then be null.
  const void* running_mean = nullptr;  // [channels] of param_dtype, or null
  const void* running_var = nullptr;   // likewise
  RunningUpdate update;                // batch norm only: what takes the statistics of this batch
  bool planes_output = false;          // of input in kChannelsLast without residual, where cpu::turns_into_planes() says so
  double eps = 0.0;
  Activation activation = Activation::kNone;

  bool takes_statistics() const { return !given_stats && running_mean == nullptr; }
};

// Gradients of the same; dz is the gradient of what the activation is applied to.
struct ChannelBackwardArgs {
  ChannelShape shape;
  DType dtype = DType::kFloat32;        // of input, residual and their gradients, and of grad_output
  DType param_dtype = DType::kFloat32;  // of weight, bias and their gradients
  const void* grad_output = nullptr;
  const void* input = nullptr;
  const void* residual = nullptr;  // or null; read only where there is an activation
  const void* weight = nullptr;    // [channels] or null
  const void* bias = nullptr;      // [channels] or null; read only where there is an activation
  const void* stats = nullptr;     // [4, slabs] as the forward made them
  void* grad_input = nullptr;      // or null; like the next, overlaps nothing that is read
  void* grad_residual = nullptr;   // or null: dz
  void* grad_weight = nullptr;     // [channels] or null
  void* grad_bias = nullptr;       // [channels] or null
  bool fixed_stats = false;        // the statistics do not depend on input: dx = dz * weight * rstd
  // SyncBatchNorm, in two calls. First sums are written and no gradient of input or residual is wanted; then given_sums is set, and
  // sums are those of all ranks, over *count values per channel.
  void* sums = nullptr;  // [2, channels] in the accumulate dtype or null: sum(dz), sum(dz * xhat)
  bool given_sums = false;
  const double* count = nullptr;  // [1], on the device; with given_sums
  Activation activation = Activation::kNone;
};

// SyncBatchNorm: the statistics of all ranks. Row r of `gathered` is [3 * channels] moments of rank r, then the count of values per
// channel as the bits of an int64, in the last 8 bytes.
struct ChannelMergeArgs {
  DType dtype = DType::kFloat32;  // float32 or float64: of gathered and stats
  std::int64_t ranks = 0;
  std::int64_t channels = 0;
  const void* gathered = nullptr;  // [ranks, 3 * channels + 2] float32, or + 1 float64
  void* stats = nullptr;           // [4, channels]
  double* count = nullptr;         // [1]: of all ranks
  double eps = 0.0;
};

// An update of running statistics alone, by the mean over the images of each channel (one for batch norm).
struct RunningArgs {
  DType dtype = DType::kFloat32;  // of stats: float32 or float64
  std::int64_t images = 1;
  std::int64_t channels = 0;
  const void* stats = nullptr;  // [4, images * channels]
  RunningUpdate update;
};

}  // namespace normext
