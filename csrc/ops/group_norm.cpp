// The GroupNorm ops, which serve InstanceNorm too: schemas, and how their arguments map to a channel norm.
#include <tuple>

#include "ops/boxed.h"
#include "ops/channel_norm.h"

namespace normext::ops {
namespace {

void check_groups(std::int64_t num_groups) {
  if (num_groups < 1) refuse("group_norm: expected num_groups of at least 1, got " + std::to_string(num_groups));
}

ChannelForward request(const Tensor& input, const Tensor* weight, const Tensor* bias, std::int64_t num_groups, double eps,
                       std::int64_t activation, bool save_stats) {
  check_groups(num_groups);
  ChannelForward request{"group_norm", input};
  request.groups = num_groups;
  request.weight = weight;
  request.bias = bias;
  request.eps = eps;
  request.activation = activation;
  request.save_stats = save_stats;
  return request;
}

// The lean form: fewer arguments cross the dispatcher, and none is optional.
Tensor group_norm(const Tensor& input, const Tensor& weight, const Tensor& bias, std::int64_t num_groups, double eps) {
  return channel_forward(request(input, &weight, &bias, num_groups, eps, 0, false)).output;
}

Tensor group_norm_inference(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, std::int64_t num_groups,
                            double eps, std::int64_t activation) {
  return channel_forward(request(input, weight.or_null(), bias.or_null(), num_groups, eps, activation, false)).output;
}

std::tuple<Tensor, Tensor> group_norm_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                              std::int64_t num_groups, double eps, std::int64_t activation) {
  ChannelForwardResult result =
      channel_forward(request(input, weight.or_null(), bias.or_null(), num_groups, eps, activation, true));
  return {std::move(result.output), std::move(result.stats)};
}

// InstanceNorm without gradients: its output is contiguous, as in torch, for which channels-last input need not always be copied.
std::tuple<Tensor, Tensor> instance_norm_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                                 double eps, std::int64_t activation) {
  ChannelForward forward{"instance_norm", input};
  forward.groups = ChannelForward::kGroupPerChannel;
  forward.weight = weight.or_null();
  forward.bias = bias.or_null();
  forward.eps = eps;
  forward.activation = activation;
  forward.save_stats = true;
  forward.contiguous_output = true;
  ChannelForwardResult result = channel_forward(forward);
  return {std::move(result.output), std::move(result.stats)};
}

// needs: bit 0 grad_input, bit 1 grad_weight, bit 2 grad_bias
std::tuple<Tensor, Tensor, Tensor> group_norm_backward(const Tensor& grad_output, const Tensor& input, const Tensor& stats,
                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                       std::int64_t num_groups, std::int64_t activation, std::int64_t needs) {
  check_groups(num_groups);
  if (needs < 0 || needs > 7) refuse("group_norm_backward: expected needs of 0 to 7, got " + std::to_string(needs));
  ChannelBackward backward{"group_norm_backward", grad_output, input, stats};
  backward.groups = num_groups;
  backward.weight = weight.or_null();
  backward.bias = bias.or_null();
  backward.activation = activation;
  backward.needs = (needs & 1) | (needs & 6) << 1;
  ChannelBackwardResult result = channel_backward(backward);
  return {std::move(result.grad_input), std::move(result.grad_weight), std::move(result.grad_bias)};
}

const bool defined = [] {
  define("group_norm(Tensor input, Tensor weight, Tensor bias, int num_groups, float eps) -> Tensor", boxed<group_norm>);
  define("group_norm_inference(Tensor input, Tensor? weight, Tensor? bias, int num_groups, float eps, int activation) -> Tensor",
         boxed<group_norm_inference>);
  define(
      "group_norm_forward(Tensor input, Tensor? weight, Tensor? bias, int num_groups, float eps, int activation) "
      "-> (Tensor output, Tensor stats)",
      boxed<group_norm_forward>);
  define(
      "instance_norm_forward(Tensor input, Tensor? weight, Tensor? bias, float eps, int activation) "
      "-> (Tensor output, Tensor stats)",
      boxed<instance_norm_forward>);
  define(
      "group_norm_backward(Tensor grad_output, Tensor input, Tensor stats, Tensor? weight, Tensor? bias, int num_groups, "
      "int activation, int needs) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      boxed<group_norm_backward>);
  define(
      "group_norm_export(Tensor input, Tensor? weight, Tensor? bias, int num_groups, float eps, int activation) "
      "-> (Tensor output, Tensor stats)",
      boxed<group_norm_forward>);
  return true;
}();

}  // namespace
}  // namespace normext::ops
