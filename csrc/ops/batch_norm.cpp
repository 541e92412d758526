// The BatchNorm ops, and those SyncBatchNorm is made of: schemas, and how their arguments map to a channel norm.
#include <tuple>

#include "ops/boxed.h"
#include "ops/channel_norm.h"

namespace normext::ops {
namespace {

// The lean form, for evaluation: fewer arguments cross the dispatcher, and none is optional.
Tensor batch_norm(const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor& running_mean,
                  const Tensor& running_var, double eps) {
  ChannelForward forward{"batch_norm", input};
  forward.weight = &weight;
  forward.bias = &bias;
  forward.running_mean = &running_mean;
  forward.running_var = &running_var;
  forward.eps = eps;
  return channel_forward(forward).output;
}

ChannelForward forward_request(const char* op, const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                               double eps, std::int64_t activation) {
  ChannelForward forward{op, input};
  forward.residual = residual.or_null();
  forward.weight = weight.or_null();
  forward.bias = bias.or_null();
  forward.running_mean = running_mean.or_null();
  forward.running_var = running_var.or_null();
  forward.eps = eps;
  forward.activation = activation;
  return forward;
}

Tensor batch_norm_inference(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                            double eps, std::int64_t activation) {
  return channel_forward(
             forward_request("batch_norm_inference", input, residual, weight, bias, running_mean, running_var, eps, activation))
      .output;
}

std::tuple<Tensor, Tensor> batch_norm_forward(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                                              const OptionalTensor& bias, const OptionalTensor& running_mean,
                                              const OptionalTensor& running_var, double eps, std::int64_t activation) {
  ChannelForward forward =
      forward_request("batch_norm_forward", input, residual, weight, bias, running_mean, running_var, eps, activation);
  forward.save_stats = true;
  ChannelForwardResult result = channel_forward(forward);
  return {std::move(result.output), std::move(result.stats)};
}

// Training outside of graphs, in one call: the running statistics, checked before, take those of the batch.
std::tuple<Tensor, Tensor> batch_norm_train_(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                                             const OptionalTensor& bias, const OptionalTensor& running_mean,
                                             const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                             double momentum, double eps, std::int64_t activation) {
  ChannelForward forward =
      forward_request("batch_norm_train_", input, residual, weight, bias, running_mean, running_var, eps, activation);
  forward.training = true;
  forward.num_batches_tracked = num_batches_tracked.or_null();
  forward.momentum = momentum;
  forward.save_stats = true;
  ChannelForwardResult result = channel_forward(forward);
  return {std::move(result.output), std::move(result.stats)};
}

ChannelBackward backward_request(const char* op, const Tensor& grad_output, const Tensor& input, const Tensor& stats,
                                 const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
                                 std::int64_t activation) {
  ChannelBackward backward{op, grad_output, input, stats};
  backward.residual = residual.or_null();
  backward.weight = weight.or_null();
  backward.bias = bias.or_null();
  backward.activation = activation;
  return backward;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad_output, const Tensor& input, const Tensor& stats,
                                                               const OptionalTensor& residual, const OptionalTensor& weight,
                                                               const OptionalTensor& bias, std::int64_t fixed_stats,
                                                               std::int64_t activation, std::int64_t needs) {
  ChannelBackward backward = backward_request("batch_norm_backward", grad_output, input, stats, residual, weight, bias, activation);
  backward.fixed_stats = fixed_stats != 0;
  backward.needs = needs;
  ChannelBackwardResult result = channel_backward(backward);
  return {std::move(result.grad_input), std::move(result.grad_residual), std::move(result.grad_weight),
          std::move(result.grad_bias)};
}

void batch_norm_update_(const Tensor& stats, const Tensor& running_mean, const Tensor& running_var,
                        const OptionalTensor& num_batches_tracked, double momentum) {
  update_running("batch_norm_update_", stats, running_mean, running_var, num_batches_tracked.or_null(), momentum);
}

// ---- SyncBatchNorm: moments -> all_gather -> merge -> apply; backward sums -> all_reduce -> backward apply

Tensor batch_norm_moments(const Tensor& input) { return channel_moments("batch_norm_moments", input); }

std::tuple<Tensor, Tensor> batch_norm_merge(const Tensor& gathered, double eps) {
  MergeResult result = merge_moments("batch_norm_merge", gathered, eps);
  return {std::move(result.stats), std::move(result.count)};
}

Tensor batch_norm_apply(const Tensor& input, const OptionalTensor& residual, const Tensor& stats, const OptionalTensor& weight,
                        const OptionalTensor& bias, std::int64_t activation) {
  ChannelForward forward{"batch_norm_apply", input};
  forward.residual = residual.or_null();
  forward.weight = weight.or_null();
  forward.bias = bias.or_null();
  forward.given_stats = &stats;
  forward.activation = activation;
  return channel_forward(forward).output;
}

Tensor batch_norm_backward_sums(const Tensor& grad_output, const Tensor& input, const Tensor& stats, const OptionalTensor& residual,
                                const OptionalTensor& weight, const OptionalTensor& bias, std::int64_t activation) {
  return channel_backward_sums(
      backward_request("batch_norm_backward_sums", grad_output, input, stats, residual, weight, bias, activation));
}

std::tuple<Tensor, Tensor> batch_norm_backward_apply(const Tensor& grad_output, const Tensor& input, const Tensor& stats,
                                                     const OptionalTensor& residual, const OptionalTensor& weight,
                                                     const OptionalTensor& bias, const Tensor& sums, const Tensor& count,
                                                     std::int64_t activation, std::int64_t needs) {
  ChannelBackward backward =
      backward_request("batch_norm_backward_apply", grad_output, input, stats, residual, weight, bias, activation);
  backward.given_sums = &sums;
  backward.given_count = &count;
  backward.needs = needs;
  ChannelBackwardResult result = channel_backward(backward);
  return {std::move(result.grad_input), std::move(result.grad_residual)};
}

const bool defined = [] {
  define("batch_norm(Tensor input, Tensor weight, Tensor bias, Tensor running_mean, Tensor running_var, float eps) -> Tensor",
         boxed<batch_norm>);
  define(
      "batch_norm_inference(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, "
      "Tensor? running_var, float eps, int activation) -> Tensor",
      boxed<batch_norm_inference>);
  define(
      "batch_norm_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, "
      "Tensor? running_var, float eps, int activation) -> (Tensor output, Tensor stats)",
      boxed<batch_norm_forward>);
  define(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor stats, Tensor? residual, Tensor? weight, Tensor? bias, "
      "int fixed_stats, int activation, int needs) "
      "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
      boxed<batch_norm_backward>);
  define(
      "batch_norm_export(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, "
      "Tensor? running_var, float eps, int activation) -> (Tensor output, Tensor stats)",
      boxed<batch_norm_forward>);
  define(
      "batch_norm_train_(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor? num_batches_tracked, float momentum, float eps, int activation) "
      "-> (Tensor output, Tensor stats)",
      boxed<batch_norm_train_>);
  define(
      "batch_norm_update_(Tensor stats, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor? num_batches_tracked, "
      "float momentum) -> ()",
      boxed<batch_norm_update_>);
  define("batch_norm_moments(Tensor input) -> Tensor", boxed<batch_norm_moments>);
  define("batch_norm_merge(Tensor gathered, float eps) -> (Tensor stats, Tensor count)", boxed<batch_norm_merge>);
  define("batch_norm_apply(Tensor input, Tensor? residual, Tensor stats, Tensor? weight, Tensor? bias, int activation) -> Tensor",
         boxed<batch_norm_apply>);
  define(
      "batch_norm_backward_sums(Tensor grad_output, Tensor input, Tensor stats, Tensor? residual, Tensor? weight, Tensor? bias, "
      "int activation) -> Tensor",
      boxed<batch_norm_backward_sums>);
  define(
      "batch_norm_backward_apply(Tensor grad_output, Tensor input, Tensor stats, Tensor? residual, Tensor? weight, Tensor? bias, "
      "Tensor sums, Tensor count, int activation, int needs) -> (Tensor grad_input, Tensor grad_residual)",
      boxed<batch_norm_backward_apply>);
  return true;
}();

}  // namespace
}  // namespace normext::ops
