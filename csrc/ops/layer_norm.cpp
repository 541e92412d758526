// The LayerNorm ops: schemas, and how their arguments map to a row norm.
#include <tuple>

#include "ops/boxed.h"
#include "ops/row_norm.h"

namespace normext::ops {
namespace {

RowForward request(const char* op, const Tensor& input, const Tensor* weight, const Tensor* bias, std::int64_t normalized_ndim,
                   double eps) {
  RowForward request{op, RowNorm::kLayerNorm, input};
  request.weight = weight;
  request.bias = bias;
  request.normalized_ndim = normalized_ndim;
  request.eps = eps;
  return request;
}

// The lean forms: fewer arguments cross the dispatcher, and none is optional, which costs as much as the kernel on a small input.
Tensor layer_norm(const Tensor& input, const Tensor& weight, const Tensor& bias, double eps) {
  return row_forward(request("layer_norm", input, &weight, &bias, weight.ndim(), eps)).output;
}

Tensor layer_norm_inference(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                            std::int64_t normalized_ndim, double eps) {
  return row_forward(request("layer_norm", input, weight.or_null(), bias.or_null(), normalized_ndim, eps)).output;
}

std::tuple<Tensor, Tensor> layer_norm_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                              std::int64_t normalized_ndim, double eps) {
  RowForward forward = request("layer_norm", input, weight.or_null(), bias.or_null(), normalized_ndim, eps);
  forward.save_stats = true;
  RowForwardResult result = row_forward(forward);
  return {std::move(result.output), std::move(result.stats)};
}

RowForwardResult add_forward(const Tensor& input, const Tensor& residual, const Tensor* weight, const Tensor* bias,
                             std::int64_t normalized_ndim, double eps, double alpha, bool save_stats) {
  RowForward forward = request("add_layer_norm", input, weight, bias, normalized_ndim, eps);
  forward.residual = &residual;
  forward.alpha = alpha;
  forward.save_stats = save_stats;
  return row_forward(forward);
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& input, const Tensor& residual, const Tensor& weight, const Tensor& bias,
                                          double eps, double alpha) {
  RowForwardResult result = add_forward(input, residual, &weight, &bias, weight.ndim(), eps, alpha, false);
  return {std::move(result.output), std::move(result.residual_out)};
}

std::tuple<Tensor, Tensor> add_layer_norm_inference(const Tensor& input, const Tensor& residual, const OptionalTensor& weight,
                                                    const OptionalTensor& bias, std::int64_t normalized_ndim, double eps,
                                                    double alpha) {
  RowForwardResult result = add_forward(input, residual, weight.or_null(), bias.or_null(), normalized_ndim, eps, alpha, false);
  return {std::move(result.output), std::move(result.residual_out)};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_forward(const Tensor& input, const Tensor& residual, const OptionalTensor& weight,
                                                          const OptionalTensor& bias, std::int64_t normalized_ndim, double eps,
                                                          double alpha) {
  RowForwardResult result = add_forward(input, residual, weight.or_null(), bias.or_null(), normalized_ndim, eps, alpha, true);
  return {std::move(result.output), std::move(result.residual_out), std::move(result.stats)};
}

// What torch.export records: one op with and without residual; without, residual_out has shape [0]. Its gradient is registered
// in Python.
std::tuple<Tensor, Tensor, Tensor> layer_norm_export(const Tensor& input, const OptionalTensor& residual,
                                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                                     std::int64_t normalized_ndim, double eps, double alpha) {
  if (residual) return add_layer_norm_forward(input, residual, weight, bias, normalized_ndim, eps, alpha);
  auto [output, stats] = layer_norm_forward(input, weight, bias, normalized_ndim, eps);
  return {std::move(output), allocate_none(input), std::move(stats)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_output, const OptionalTensor& grad_residual_out,
                                                       const Tensor& input, const Tensor& stats, const OptionalTensor& weight,
                                                       const OptionalTensor& bias, std::int64_t normalized_ndim,
                                                       std::int64_t needs) {
  RowBackward backward{"layer_norm_backward", RowNorm::kLayerNorm, grad_output, input, stats};
  backward.grad_residual_out = grad_residual_out.or_null();
  backward.weight = weight.or_null();
  backward.bias = bias.or_null();
  backward.normalized_ndim = normalized_ndim;
  backward.needs = needs;
  RowBackwardResult result = row_backward(backward);
  return {std::move(result.grad_input), std::move(result.grad_weight), std::move(result.grad_bias)};
}

const bool defined = [] {
  define("layer_norm(Tensor input, Tensor weight, Tensor bias, float eps) -> Tensor", boxed<layer_norm>);
  define("layer_norm_inference(Tensor input, Tensor? weight, Tensor? bias, int normalized_ndim, float eps) -> Tensor",
         boxed<layer_norm_inference>);
  define(
      "layer_norm_forward(Tensor input, Tensor? weight, Tensor? bias, int normalized_ndim, float eps) "
      "-> (Tensor output, Tensor stats)",
      boxed<layer_norm_forward>);
  define(
      "layer_norm_backward(Tensor grad_output, Tensor? grad_residual_out, Tensor input, Tensor stats, Tensor? weight, "
      "Tensor? bias, int normalized_ndim, int needs) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      boxed<layer_norm_backward>);
  define(
      "add_layer_norm(Tensor input, Tensor residual, Tensor weight, Tensor bias, float eps, float alpha) "
      "-> (Tensor output, Tensor residual_out)",
      boxed<add_layer_norm>);
  define(
      "add_layer_norm_inference(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, int normalized_ndim, float eps, "
      "float alpha) -> (Tensor output, Tensor residual_out)",
      boxed<add_layer_norm_inference>);
  define(
      "add_layer_norm_forward(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, int normalized_ndim, "
      "float eps, float alpha) -> (Tensor output, Tensor residual_out, Tensor stats)",
      boxed<add_layer_norm_forward>);
  define(
      "layer_norm_export(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, int normalized_ndim, float eps, "
      "float alpha) -> (Tensor output, Tensor residual_out, Tensor stats)",
      boxed<layer_norm_export>);
  return true;
}();

}  // namespace
}  // namespace normext::ops
