// What the channel norm ops share (BatchNorm, GroupNorm, InstanceNorm, SyncBatchNorm): a request in torch tensors is checked,
// results are allocated, and the kernels of the device's back end are called. One path serves CPU and CUDA.
//
// Input is [batch, channels, *spatial], any strides. What torch calls channels-last is computed and returned in that format,
// everything else contiguous; what is not dense, or lies in another format than the input, is copied first.
#pragma once

#include <cstdint>

#include "core/channel_args.h"
#include "ops/tensor.h"

namespace normext::ops {

// output = activation(norm(input) * weight + bias + residual)
struct ChannelForward {
  const char* op;  // for error texts
  const Tensor& input;
  static constexpr std::int64_t kGroupPerChannel = -1;
  std::int64_t groups = 0;  // 0: batch norm; kGroupPerChannel: instance norm
  const Tensor* residual = nullptr;
  const Tensor* weight = nullptr;
  const Tensor* bias = nullptr;
  const Tensor* running_mean = nullptr;  // both: statistics of evaluation mode; batch norm only
  const Tensor* running_var = nullptr;
  bool training = false;  // these are not used, but updated
  const Tensor* num_batches_tracked = nullptr;
  double momentum = 0.0;
  const Tensor* given_stats = nullptr;  // [4, channels]: SyncBatchNorm
  double eps = 0.0;
  std::int64_t activation = 0;  // an Activation
  bool save_stats = false;
  bool contiguous_output = false;  // whatever the input's format; without residual
};

struct ChannelForwardResult {
  Tensor output;
  Tensor stats;  // [4, slabs], accumulate dtype; absent unless saved, 0 where input is empty
};

ChannelForwardResult channel_forward(const ChannelForward& request);
Tensor channel_moments(const char* op, const Tensor& input);  // [3, channels]

struct ChannelBackward {
  const char* op;
  const Tensor& grad_output;
  const Tensor& input;
  const Tensor& stats;
  std::int64_t groups = 0;
  const Tensor* residual = nullptr;
  const Tensor* weight = nullptr;
  const Tensor* bias = nullptr;
  bool fixed_stats = false;             // of evaluation mode
  const Tensor* given_sums = nullptr;   // [2, channels], SyncBatchNorm: of all ranks
  const Tensor* given_count = nullptr;  // [1] float64: values per channel on all ranks
  std::int64_t activation = 0;
  std::int64_t needs = 0;  // bit 0 grad_input, bit 1 grad_residual, bit 2 grad_weight, bit 3 grad_bias
};

// What was not asked for has shape [0].
struct ChannelBackwardResult {
  Tensor grad_input;
  Tensor grad_residual;
  Tensor grad_weight;
  Tensor grad_bias;
};

ChannelBackwardResult channel_backward(const ChannelBackward& request);
Tensor channel_backward_sums(const ChannelBackward& request);  // [2, channels]: sum(dz), sum(dz * xhat)

struct MergeResult {
  Tensor stats;  // [4, channels]
  Tensor count;  // [1] float64
};
MergeResult merge_moments(const char* op, const Tensor& gathered, double eps);

// By statistics that were saved.
void update_running(const char* op, const Tensor& stats, const Tensor& running_mean, const Tensor& running_var,
                    const Tensor* num_batches_tracked, double momentum);

}  // namespace normext::ops
