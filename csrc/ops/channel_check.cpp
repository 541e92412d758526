#include "ops/channel_check.h"

#include <string>

#include "core/dtypes.h"
#include "ops/format.h"

namespace normext::ops {
namespace {

void check_parameter(const char* op, const char* name, const Tensor* parameter, const Tensor& input, DType dtype) {
  if (parameter == nullptr) return;
  check_device(op, name, *parameter, input);
  if (!parameter->has_shape({input.sizes()[1]})) {
    refuse_argument(op, std::string(name) + " of shape [" + std::to_string(input.sizes()[1]) + "]", parameter->shape_text());
  }
  if (!parameter->has_dtype(dtype)) {
    refuse_argument(
        op, std::string(name) + " of input's dtype " + input.dtype_text() + " (with 16-bit input all parameters may be float32)",
        parameter->dtype_text());
  }
}

ChannelGeometry check_geometry(const char* op, const Tensor& input, std::int64_t groups,
                               std::initializer_list<const Tensor*> parameters, std::int64_t activation) {
  ChannelGeometry geometry;
  if (!input) refuse_argument(op, "input", "an undefined tensor");
  if (!input.device().is_cpu() && !input.device().is_cuda()) refuse_argument(op, "a CPU or CUDA tensor", input.device_text());
  if (!from_torch_dtype(input.dtype_number(), &geometry.dtype)) {
    refuse_argument(op, "input of dtype float32, float16, bfloat16 or float64", input.dtype_text());
  }
  if (input.ndim() < 2) refuse_argument(op, "input of at least 2 dimensions", input.shape_text());
  ChannelShape& shape = geometry.shape;
  shape.batch = input.sizes()[0];
  shape.channels = input.sizes()[1];
  std::uint64_t spatial = 1;  // unsigned: where another extent is 0 the product may wrap, and nothing uses it then
  for (int d = 2; d < input.ndim(); ++d) spatial *= static_cast<std::uint64_t>(input.sizes()[d]);
  shape.spatial = static_cast<std::int64_t>(spatial);
  const bool per_channel = groups == ChannelForward::kGroupPerChannel;
  if (per_channel) groups = shape.channels;
  // Any number divides no channels; the statistics of that many groups must still be countable.
  if (groups < 0 || groups > INT32_MAX || (groups > 0 && shape.channels % groups != 0)) {
    if (per_channel) refuse_argument(op, "at most 2147483647 channels", std::to_string(groups));
    refuse_argument(op, "num_groups that divide " + std::to_string(shape.channels) + " channels", std::to_string(groups));
  }
  shape.groups = groups;
  geometry.channels_last = is_channels_last(input);
  shape.layout = geometry.channels_last ? ChannelLayout::kChannelsLast : ChannelLayout::kPlanes;

  geometry.param_dtype = geometry.dtype;
  for (const Tensor* parameter : parameters) {
    if (parameter == nullptr) continue;
    if (size_of(geometry.dtype) == 2 && parameter->has_dtype(DType::kFloat32)) geometry.param_dtype = DType::kFloat32;
    break;
  }
  geometry.stats_dtype = accumulate_dtype_of(geometry.dtype);
  if (activation < 0 || activation > static_cast<int>(Activation::kLeakyRelu)) {
    refuse_argument(op, "activation 0 (none), 1 (relu), 2 (silu), 3 (gelu) or 4 (leaky_relu)", std::to_string(activation));
  }
  geometry.activation = static_cast<Activation>(activation);
  return geometry;
}

}  // namespace

ChannelGeometry check(const ChannelForward& request) {
  const char* op = request.op;
  const Tensor& input = request.input;
  ChannelGeometry geometry = check_geometry(
      op, input, request.groups, {request.weight, request.bias, request.running_mean, request.running_var}, request.activation);
  // What is both formats (one channel, or one position) torch's batch norm calls contiguous, and what is dense in channels-last but
  // for the stride of a single image, channels-last; its gradient and group norm do not.
  if (request.groups == 0) {
    if (input.is_contiguous()) {
      geometry.channels_last = false;
    } else if (is_dense_channels_last(input)) {
      geometry.channels_last = true;
      geometry.shape.layout = ChannelLayout::kChannelsLast;
    }
  }
  check_parameter(op, "weight", request.weight, input, geometry.param_dtype);
  check_parameter(op, "bias", request.bias, input, geometry.param_dtype);
  if ((request.running_mean == nullptr) != (request.running_var == nullptr)) {
    refuse_argument(op, "running_mean and running_var", "one of them");
  }
  check_parameter(op, "running_mean", request.running_mean, input, geometry.param_dtype);
  check_parameter(op, "running_var", request.running_var, input, geometry.param_dtype);
  if (request.residual != nullptr) check_like_input(op, "residual", *request.residual, input, geometry.dtype);
  if (request.given_stats != nullptr) {
    check_buffer(op, "stats", *request.given_stats, {kChannelStats, geometry.shape.slabs()}, geometry.stats_dtype, input);
  }
  return geometry;
}

ChannelGeometry check(const ChannelBackward& request) {
  const char* op = request.op;
  const Tensor& input = request.input;
  const ChannelGeometry geometry = check_geometry(op, input, request.groups, {request.weight, request.bias}, request.activation);
  check_parameter(op, "weight", request.weight, input, geometry.param_dtype);
  check_parameter(op, "bias", request.bias, input, geometry.param_dtype);
  check_like_input(op, "grad_output", request.grad_output, input, geometry.dtype);
  if (request.residual != nullptr) check_like_input(op, "residual", *request.residual, input, geometry.dtype);
  check_buffer(op, "stats", request.stats, {kChannelStats, geometry.shape.slabs()}, geometry.stats_dtype, input);
  if (request.given_sums != nullptr) {
    check_buffer(op, "sums", *request.given_sums, {2, geometry.shape.channels}, geometry.stats_dtype, input);
    check_buffer(op, "count", *request.given_count, {1}, DType::kFloat64, input);
  }
  const std::int64_t possible = (request.given_sums != nullptr ? 3 : 15) & ~(request.groups > 0 ? 2 : 0);
  if ((request.needs & ~possible) != 0) {
    refuse_argument(op, "needs: 1 for grad_input, 2 for that of the residual, 4 for weight, 8 for bias, where there are such",
                    std::to_string(request.needs));
  }
  return geometry;
}

Tensor allocate_in_format(const ChannelGeometry& geometry, const Tensor& like) {
  return geometry.channels_last ? allocate_channels_last(like, geometry.dtype) : allocate_like(like, geometry.dtype);
}

Dense dense(const ChannelGeometry& geometry, const Tensor* tensor) {
  Dense result;
  if (tensor == nullptr) return result;
  if (!(geometry.channels_last ? has_channels_last_strides(*tensor) : tensor->is_contiguous())) {
    result.copy = allocate_in_format(geometry, *tensor);
    copy_format(*tensor, result.copy);
  }
  result.data = (result.copy ? result.copy : *tensor).data();
  return result;
}

}  // namespace normext::ops
