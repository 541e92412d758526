// The RMSNorm ops: schemas, and how their arguments map to a row norm.
#include <tuple>

#include "ops/boxed.h"
#include "ops/row_norm.h"

namespace normext::ops {
namespace {

RowForward request(const char* op, const Tensor& input, const Tensor* weight, std::int64_t normalized_ndim, double eps,
                   double weight_offset = 0.0, std::int64_t rounding = 0) {
  RowForward request{op, RowNorm::kRmsNorm, input};
  request.weight = weight;
  request.normalized_ndim = normalized_ndim;
  request.eps = eps;
  request.weight_offset = weight_offset;
  request.rounding = rounding;
  return request;
}

// The lean forms: fewer arguments cross the dispatcher, and none is optional, which costs as much as the kernel on a small input.
Tensor rms_norm(const Tensor& input, const Tensor& weight, double eps) {
  return row_forward(request("rms_norm", input, &weight, weight.ndim(), eps)).output;
}

Tensor rms_norm_inference(const Tensor& input, const OptionalTensor& weight, std::int64_t normalized_ndim, double eps,
                          double weight_offset, std::int64_t rounding) {
  return row_forward(request("rms_norm", input, weight.or_null(), normalized_ndim, eps, weight_offset, rounding)).output;
}

std::tuple<Tensor, Tensor> rms_norm_forward(const Tensor& input, const OptionalTensor& weight, std::int64_t normalized_ndim,
                                            double eps, double weight_offset, std::int64_t rounding) {
  RowForward forward = request("rms_norm", input, weight.or_null(), normalized_ndim, eps, weight_offset, rounding);
  forward.save_stats = true;
  RowForwardResult result = row_forward(forward);
  return {std::move(result.output), std::move(result.stats)};
}

RowForwardResult add_forward(const Tensor& input, const Tensor& residual, const Tensor* weight, std::int64_t normalized_ndim,
                             double eps, double weight_offset, std::int64_t rounding, bool save_stats) {
  RowForward forward = request("add_rms_norm", input, weight, normalized_ndim, eps, weight_offset, rounding);
  forward.residual = &residual;
  forward.save_stats = save_stats;
  return row_forward(forward);
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& input, const Tensor& residual, const Tensor& weight, double eps) {
  RowForwardResult result = add_forward(input, residual, &weight, weight.ndim(), eps, 0.0, 0, false);
  return {std::move(result.output), std::move(result.residual_out)};
}

std::tuple<Tensor, Tensor> add_rms_norm_inference(const Tensor& input, const Tensor& residual, const OptionalTensor& weight,
                                                  std::int64_t normalized_ndim, double eps, double weight_offset,
                                                  std::int64_t rounding) {
  RowForwardResult result = add_forward(input, residual, weight.or_null(), normalized_ndim, eps, weight_offset, rounding, false);
  return {std::move(result.output), std::move(result.residual_out)};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_forward(const Tensor& input, const Tensor& residual, const OptionalTensor& weight,
                                                        std::int64_t normalized_ndim, double eps, double weight_offset,
                                                        std::int64_t rounding) {
  RowForwardResult result = add_forward(input, residual, weight.or_null(), normalized_ndim, eps, weight_offset, rounding, true);
  return {std::move(result.output), std::move(result.residual_out), std::move(result.stats)};
}

// What torch.export records: one op with and without residual; without, residual_out has shape [0]. Its gradient is registered
// in Python.
std::tuple<Tensor, Tensor, Tensor> rms_norm_export(const Tensor& input, const OptionalTensor& residual,
                                                   const OptionalTensor& weight, std::int64_t normalized_ndim, double eps,
                                                   double weight_offset, std::int64_t rounding) {
  if (residual) return add_rms_norm_forward(input, residual, weight, normalized_ndim, eps, weight_offset, rounding);
  auto [output, stats] = rms_norm_forward(input, weight, normalized_ndim, eps, weight_offset, rounding);
  return {std::move(output), allocate_none(input), std::move(stats)};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_output, const OptionalTensor& grad_residual_out,
                                             const Tensor& input, const Tensor& stats, const OptionalTensor& weight,
                                             std::int64_t normalized_ndim, double weight_offset, std::int64_t rounding,
                                             std::int64_t needs) {
  RowBackward backward{"rms_norm_backward", RowNorm::kRmsNorm, grad_output, input, stats};
  backward.grad_residual_out = grad_residual_out.or_null();
  backward.weight = weight.or_null();
  backward.normalized_ndim = normalized_ndim;
  backward.weight_offset = weight_offset;
  backward.rounding = rounding;
  backward.needs = needs;
  RowBackwardResult result = row_backward(backward);
  return {std::move(result.grad_input), std::move(result.grad_weight)};
}

// In place on both: residual becomes input + residual, input its norm.
void fused_add_rms_norm_(const Tensor& input, const Tensor& residual, const Tensor& weight, double eps) {
  RowForward forward = request("fused_add_rms_norm_", input, &weight, weight.ndim(), eps);
  forward.residual = &residual;
  row_forward_in_place(forward);
}

const bool defined = [] {
  define("rms_norm(Tensor input, Tensor weight, float eps) -> Tensor", boxed<rms_norm>);
  define(
      "rms_norm_inference(Tensor input, Tensor? weight, int normalized_ndim, float eps, float weight_offset, "
      "int rounding) -> Tensor",
      boxed<rms_norm_inference>);
  define(
      "rms_norm_forward(Tensor input, Tensor? weight, int normalized_ndim, float eps, float weight_offset, "
      "int rounding) -> (Tensor output, Tensor stats)",
      boxed<rms_norm_forward>);
  define(
      "rms_norm_backward(Tensor grad_output, Tensor? grad_residual_out, Tensor input, Tensor stats, Tensor? weight, "
      "int normalized_ndim, float weight_offset, int rounding, int needs) -> (Tensor grad_input, Tensor grad_weight)",
      boxed<rms_norm_backward>);
  define("add_rms_norm(Tensor input, Tensor residual, Tensor weight, float eps) -> (Tensor output, Tensor residual_out)",
         boxed<add_rms_norm>);
  define(
      "add_rms_norm_inference(Tensor input, Tensor residual, Tensor? weight, int normalized_ndim, float eps, "
      "float weight_offset, int rounding) -> (Tensor output, Tensor residual_out)",
      boxed<add_rms_norm_inference>);
  define(
      "add_rms_norm_forward(Tensor input, Tensor residual, Tensor? weight, int normalized_ndim, float eps, "
      "float weight_offset, int rounding) -> (Tensor output, Tensor residual_out, Tensor stats)",
      boxed<add_rms_norm_forward>);
  define("fused_add_rms_norm_(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps) -> ()", boxed<fused_add_rms_norm_>);
  define(
      "rms_norm_export(Tensor input, Tensor? residual, Tensor? weight, int normalized_ndim, float eps, "
      "float weight_offset, int rounding) -> (Tensor output, Tensor residual_out, Tensor stats)",
      boxed<rms_norm_export>);
  return true;
}();

}  // namespace
}  // namespace normext::ops
