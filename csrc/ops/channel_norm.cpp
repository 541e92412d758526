#include "ops/channel_norm.h"

#include <string>

#include "core/dtypes.h"
#include "ops/channel_check.h"
#include "ops/launch.h"
#include "ops/overlap.h"

#if NORMEXT_WITH_CUDA || NORMEXT_EMULATED
#include "cuda/channel_norm.h"
#endif

namespace normext::ops {
namespace {

void launch(const ChannelForwardArgs& args, Device device) {
  if (runs_cpu_kernels(device)) {
    Workspace workspace(cpu::channel_forward_workspace(args), device);
    return cpu::channel_forward(args, workspace.address(), thread_pool());
  }
#if NORMEXT_WITH_CUDA || NORMEXT_EMULATED
  const DeviceGuard guard(device);
  Workspace workspace(cuda::channel_forward_workspace(args, cuda_index(device)), device);
  cuda::channel_forward(args, workspace.address(), cuda_index(device), current_stream(device));
#else
  refuse_cuda();
#endif
}

void launch(const ChannelBackwardArgs& args, Device device) {
  if (runs_cpu_kernels(device)) {
    const cpu::Parallel threads = thread_pool();
    Workspace workspace(cpu::channel_backward_workspace(args, threads), device);
    return cpu::channel_backward(args, workspace.address(), threads);
  }
#if NORMEXT_WITH_CUDA || NORMEXT_EMULATED
  const DeviceGuard guard(device);
  Workspace workspace(cuda::channel_backward_workspace(args, cuda_index(device)), device);
  cuda::channel_backward(args, workspace.address(), cuda_index(device), current_stream(device));
#else
  refuse_cuda();
#endif
}

void launch(const ChannelMergeArgs& args, Device device) {
  if (runs_cpu_kernels(device)) return cpu::merge_moments(args);
#if NORMEXT_WITH_CUDA || NORMEXT_EMULATED
  const DeviceGuard guard(device);
  cuda::merge_moments(args, cuda_index(device), current_stream(device));
#else
  refuse_cuda();
#endif
}

void launch(const RunningArgs& args, Device device) {
  if (runs_cpu_kernels(device)) return cpu::update_running(args);
#if NORMEXT_WITH_CUDA || NORMEXT_EMULATED
  const DeviceGuard guard(device);
  cuda::update_running(args, cuda_index(device), current_stream(device));
#else
  refuse_cuda();
#endif
}

bool has_fixed_stats(const ChannelForward& request) { return request.running_mean != nullptr && !request.training; }

Tensor allocate_stats(const ChannelGeometry& geometry, const Tensor& input, int planes) {
  return allocate({planes, geometry.shape.slabs()}, geometry.stats_dtype, input.device());
}

// Everything the kernels do with one input. `stats` and `moments` are what is computed, where not null.
void run_forward(const ChannelForward& request, const ChannelGeometry& geometry, void* output, void* stats, void* moments,
                 const RunningUpdate& update = {}) {
  const Device device = request.input.device();
  const Dense input = dense(geometry, &request.input);
  const Dense residual = dense(geometry, request.residual);
  const Elements weight = elements_of(request.weight, geometry.param_dtype);
  const Elements bias = elements_of(request.bias, geometry.param_dtype);
  const bool fixed = has_fixed_stats(request);
  const Elements running_mean = elements_of(fixed ? request.running_mean : nullptr, geometry.param_dtype);
  const Elements running_var = elements_of(fixed ? request.running_var : nullptr, geometry.param_dtype);
  ChannelForwardArgs args;
  args.shape = geometry.shape;
  args.dtype = geometry.dtype;
  args.param_dtype = geometry.param_dtype;
  args.input = input.data;
  args.residual = residual.data;
  args.output = output;
  args.weight = weight.data;
  args.bias = bias.data;
  args.stats = stats;
  args.moments = moments;
  args.given_stats = request.given_stats != nullptr;
  args.running_mean = running_mean.data;
  args.running_var = running_var.data;
  args.update = update;
  args.planes_output = request.contiguous_output && geometry.channels_last;
  args.eps = request.eps;
  args.activation = geometry.activation;
  launch(args, device);
}

// Running statistics that an op updates, checked. What the kernels update may be a copy, which write_back() returns.
struct RunningTarget {
  RunningUpdate update;
  const Tensor* mean = nullptr;
  const Tensor* var = nullptr;
  Tensor mean_copy, var_copy;

  void write_back() const {
    if (mean_copy) copy(mean_copy, *mean);
    if (var_copy) copy(var_copy, *var);
  }
};

// `like`: the input, or the statistics of one.
RunningTarget running_target(const char* op, const Tensor& like, bool wide, const Tensor& running_mean, const Tensor& running_var,
                             const Tensor* num_batches_tracked, double momentum) {
  RunningTarget target;
  RunningUpdate& update = target.update;
  check_device(op, "running_mean", running_mean, like);
  check_device(op, "running_var", running_var, like);
  if (!from_torch_dtype(running_mean.dtype_number(), &update.dtype) || !running_var.has_dtype(update.dtype) ||
      (update.dtype == DType::kFloat64) != wide) {
    refuse_argument(op, "running statistics of one dtype: float32, float16 or bfloat16, float64 with float64 stats",
                    running_mean.dtype_text() + " and " + running_var.dtype_text());
  }
  if (running_mean.ndim() != 1 || !running_mean.same_shape(running_var)) {
    refuse_argument(op, "running statistics of one shape [channels]",
                    running_mean.shape_text() + " and " + running_var.shape_text());
  }
  if (may_overlap_itself(running_mean) || may_overlap_itself(running_var)) {
    refuse_argument(op, "running statistics with an element of their own per channel", "expanded ones");
  }
  if (num_batches_tracked != nullptr) {
    const Tensor& batches = *num_batches_tracked;
    check_device(op, "num_batches_tracked", batches, like);
    if (batches.dtype_number() != aoti_torch_dtype_int64() || !(batches.ndim() == 0 || batches.has_shape({1}))) {
      refuse_argument(op, "num_batches_tracked of one int64", batches.dtype_text() + " of shape " + batches.shape_text());
    }
    update.batches = static_cast<const std::int64_t*>(batches.data());
  }
  update.momentum = momentum;
  target.mean = &running_mean;
  target.var = &running_var;
  if (!running_mean.is_contiguous()) target.mean_copy = contiguous_copy(running_mean, update.dtype);
  if (!running_var.is_contiguous()) target.var_copy = contiguous_copy(running_var, update.dtype);
  update.mean = (target.mean_copy ? target.mean_copy : running_mean).mutable_data();
  update.var = (target.var_copy ? target.var_copy : running_var).mutable_data();
  return target;
}

// Whether running statistics share memory with what the forward reads, so that they must be updated after it.
bool updates_what_is_read(const RunningTarget& running, const ChannelForward& request) {
  if (running.mean == nullptr) return false;
  for (const Tensor* read : {&request.input, request.residual, request.weight, request.bias}) {
    if (read != nullptr && (may_overlap(*running.mean, *read) || may_overlap(*running.var, *read))) return true;
  }
  return false;
}

}  // namespace

ChannelForwardResult channel_forward(const ChannelForward& request) {
  const Tensor& input = request.input;
  ChannelGeometry geometry = check(request);
  ChannelForwardResult result;
  if (request.contiguous_output) {
    result.output = allocate_like(input, geometry.dtype);
    // An image's bits must not depend on how the batch lies.
    geometry.channels_last =
        images_are_channels_last(input) && runs_cpu_kernels(input.device()) && cpu::turns_into_planes(geometry.shape);
    geometry.shape.layout = geometry.channels_last ? ChannelLayout::kChannelsLast : ChannelLayout::kPlanes;
  } else {
    result.output = allocate_in_format(geometry, input);
  }
  if (request.save_stats) result.stats = allocate_stats(geometry, input, kChannelStats);
  RunningTarget running;
  if (request.training && request.running_mean != nullptr) {
    running = running_target(request.op, input, geometry.stats_dtype == DType::kFloat64, *request.running_mean,
                             *request.running_var, request.num_batches_tracked, request.momentum);
  }
  if (input.is_empty()) {
    if (result.stats) fill_zero(result.stats);
    return result;
  }
  const bool needed = !has_fixed_stats(request) || runs_cpu_kernels(input.device());
  const bool own = needed && !request.save_stats && request.given_stats == nullptr;
  Workspace unsaved(own ? static_cast<std::size_t>(kChannelStats * geometry.shape.slabs()) * size_of(geometry.stats_dtype) : 0,
                    input.device());
  void* stats = request.given_stats != nullptr ? const_cast<void*>(request.given_stats->data())
                : result.stats                 ? result.stats.mutable_data()
                                               : unsaved.address();
  const bool apart = updates_what_is_read(running, request);
  run_forward(request, geometry, result.output.mutable_data(), stats, nullptr, apart ? RunningUpdate{} : running.update);
  if (apart) launch(RunningArgs{geometry.stats_dtype, 1, geometry.shape.channels, stats, running.update}, input.device());
  running.write_back();
  return result;
}

Tensor channel_moments(const char* op, const Tensor& input) {
  const ChannelForward request{op, input};
  const ChannelGeometry geometry = check(request);
  Tensor moments = allocate_stats(geometry, input, kChannelMoments);
  if (input.is_empty()) fill_zero(moments);
  else run_forward(request, geometry, nullptr, nullptr, moments.mutable_data());
  return moments;
}

namespace {

ChannelBackwardArgs backward_args(const ChannelBackward& request, const ChannelGeometry& geometry) {
  ChannelBackwardArgs args;
  args.shape = geometry.shape;
  args.dtype = geometry.dtype;
  args.param_dtype = geometry.param_dtype;
  args.stats = request.stats.data();
  args.fixed_stats = request.fixed_stats;
  args.activation = geometry.activation;
  return args;
}

void run_backward(const ChannelBackward& request, const ChannelGeometry& geometry, ChannelBackwardArgs args) {
  const Dense grad_output = dense(geometry, &request.grad_output);
  const Dense input = dense(geometry, &request.input);
  const Dense residual = dense(geometry, geometry.activation == Activation::kNone ? nullptr : request.residual);
  const Elements weight = elements_of(request.weight, geometry.param_dtype);
  const Elements bias = elements_of(request.bias, geometry.param_dtype);
  args.grad_output = grad_output.data;
  args.input = input.data;
  args.residual = residual.data;
  args.weight = weight.data;
  args.bias = bias.data;
  launch(args, request.input.device());
}

}  // namespace

ChannelBackwardResult channel_backward(const ChannelBackward& request) {
  const Tensor& input = request.input;
  const ChannelGeometry geometry = check(request);
  ChannelBackwardResult result;
  const auto like_input = [&](int bit) {
    return (request.needs & bit) != 0 ? allocate_in_format(geometry, input) : allocate_none(input);
  };
  const auto parameter_gradient = [&](int bit) {
    if ((request.needs & bit) == 0) return allocate_none(input);
    return allocate({geometry.shape.channels}, geometry.param_dtype, input.device());
  };
  result.grad_input = like_input(1);
  result.grad_residual = like_input(2);
  result.grad_weight = parameter_gradient(4);
  result.grad_bias = parameter_gradient(8);
  if (request.needs == 0) return result;
  if (input.is_empty()) {  // a sum over nothing is 0
    fill_zero(result.grad_weight);
    fill_zero(result.grad_bias);
    return result;
  }
  ChannelBackwardArgs args = backward_args(request, geometry);
  const auto wanted = [&](int bit, const Tensor& tensor) { return (request.needs & bit) != 0 ? tensor.mutable_data() : nullptr; };
  args.grad_input = wanted(1, result.grad_input);
  args.grad_residual = wanted(2, result.grad_residual);
  args.grad_weight = wanted(4, result.grad_weight);
  args.grad_bias = wanted(8, result.grad_bias);
  if (request.given_sums != nullptr) {
    args.sums = const_cast<void*>(request.given_sums->data());
    args.given_sums = true;
    args.count = static_cast<const double*>(request.given_count->data());
  }
  run_backward(request, geometry, args);
  return result;
}

Tensor channel_backward_sums(const ChannelBackward& request) {
  const ChannelGeometry geometry = check(request);
  Tensor sums = allocate({2, geometry.shape.channels}, geometry.stats_dtype, request.input.device());
  if (request.input.is_empty()) {
    fill_zero(sums);
    return sums;
  }
  ChannelBackwardArgs args = backward_args(request, geometry);
  args.sums = sums.mutable_data();
  run_backward(request, geometry, args);
  return sums;
}

MergeResult merge_moments(const char* op, const Tensor& gathered, double eps) {
  ChannelMergeArgs args;
  if (!gathered) refuse_argument(op, "gathered", "an undefined tensor");
  if (!gathered.device().is_cpu() && !gathered.device().is_cuda()) {
    refuse_argument(op, "a CPU or CUDA tensor", gathered.device_text());
  }
  const bool wide = gathered.has_dtype(DType::kFloat64);
  if (!wide && !gathered.has_dtype(DType::kFloat32)) refuse_argument(op, "gathered of float32 or float64", gathered.dtype_text());
  args.dtype = wide ? DType::kFloat64 : DType::kFloat32;
  const std::int64_t tail = wide ? 1 : 2;  // elements that hold the count
  if (gathered.ndim() != 2 || gathered.sizes()[0] < 1 || gathered.sizes()[1] < tail ||
      (gathered.sizes()[1] - tail) % kChannelMoments != 0 || !gathered.is_contiguous()) {
    refuse_argument(op, "contiguous gathered of shape [ranks, 3 * channels + " + std::to_string(tail) + "]", gathered.shape_text());
  }
  args.ranks = gathered.sizes()[0];
  args.channels = (gathered.sizes()[1] - tail) / kChannelMoments;
  MergeResult result;
  result.stats = allocate({kChannelStats, args.channels}, args.dtype, gathered.device());
  result.count = allocate({1}, DType::kFloat64, gathered.device());
  args.gathered = gathered.data();
  args.stats = result.stats.mutable_data();
  args.count = static_cast<double*>(result.count.mutable_data());
  args.eps = eps;
  if (args.channels == 0) fill_zero(result.count);
  else launch(args, gathered.device());
  return result;
}

void update_running(const char* op, const Tensor& stats, const Tensor& running_mean, const Tensor& running_var,
                    const Tensor* num_batches_tracked, double momentum) {
  if (!stats || (!stats.device().is_cpu() && !stats.device().is_cuda())) {
    refuse_argument(op, "a CPU or CUDA tensor", stats ? stats.device_text() : "an undefined tensor");
  }
  const bool wide = stats.has_dtype(DType::kFloat64);
  if ((!wide && !stats.has_dtype(DType::kFloat32)) || stats.ndim() != 2 || stats.sizes()[0] != kChannelStats ||
      !stats.is_contiguous()) {
    refuse_argument(op, "contiguous stats of shape [4, images * channels], float32 or float64", stats.shape_text());
  }
  const RunningTarget running = running_target(op, stats, wide, running_mean, running_var, num_batches_tracked, momentum);
  RunningArgs args;
  args.dtype = wide ? DType::kFloat64 : DType::kFloat32;
  args.channels = running_mean.sizes()[0];
  args.images = args.channels == 0 ? 0 : stats.sizes()[1] / args.channels;
  if (args.images * args.channels != stats.sizes()[1]) {
    refuse_argument(op, "stats of a multiple of " + std::to_string(args.channels) + " columns", stats.shape_text());
  }
  if (args.images == 0) return;
  args.stats = stats.data();
  args.update = running.update;
  launch(args, stats.device());
  running.write_back();
}

}  // namespace normext::ops
