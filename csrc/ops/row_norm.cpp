#include "ops/row_norm.h"

#include "ops/launch.h"
#include "ops/row_check.h"

#if NORMEXT_WITH_CUDA || NORMEXT_EMULATED
#include "cuda/row_norm.h"
#endif

namespace normext::ops {
namespace {

void launch(RowNorm norm, const RowForwardArgs& args, Device device) {
  if (runs_cpu_kernels(device)) return cpu::row_forward(norm, args, thread_pool());
#if NORMEXT_WITH_CUDA || NORMEXT_EMULATED
  const DeviceGuard guard(device);
  Workspace workspace(cuda::row_forward_workspace(norm, args, cuda_index(device)), device);
  cuda::row_forward(norm, args, workspace.address(), cuda_index(device), current_stream(device));
#else
  refuse_cuda();
#endif
}

void launch(RowNorm norm, const RowBackwardArgs& args, Device device) {
  if (runs_cpu_kernels(device)) {
    Workspace workspace(cpu::row_backward_workspace(norm, args), device);
    return cpu::row_backward(norm, args, workspace.address(), thread_pool());
  }
#if NORMEXT_WITH_CUDA || NORMEXT_EMULATED
  const DeviceGuard guard(device);
  Workspace workspace(cuda::row_backward_workspace(norm, args, cuda_index(device)), device);
  cuda::row_backward(norm, args, workspace.address(), cuda_index(device), current_stream(device));
#else
  refuse_cuda();
#endif
}

// -0 where there is nothing to add, or nothing to add it to: 0 would turn a weight of -0 into 0.
double offset_of(double weight_offset, const Tensor* weight) {
  return weight == nullptr || weight_offset == 0.0 ? -0.0 : weight_offset;
}

// Everything but the tensors that are read or written row by row.
RowForwardArgs forward_args(const RowForward& request, const Geometry& geometry, const Elements& weight, const Elements& bias) {
  RowForwardArgs args;
  args.dtype = geometry.dtype;
  args.param_dtype = geometry.param_dtype;
  args.output_dtype = geometry.output_dtype;
  args.rows = geometry.rows;
  args.cols = geometry.cols;
  args.weight = weight.data;
  args.bias = bias.data;
  args.eps = request.eps;
  args.alpha = request.alpha;
  args.weight_offset = offset_of(request.weight_offset, request.weight);
  args.rounding = geometry.rounding;
  return args;
}

}  // namespace

RowForwardResult row_forward(const RowForward& request) {
  const Tensor& input = request.input;
  const Geometry geometry = check(request);

  RowForwardResult result;
  Tensor rows_output;  // where the kernel writes when the rows of the output are not contiguous
  if (request.norm == RowNorm::kRmsNorm && request.residual == nullptr && is_channels_last(input)) {
    result.output = allocate_channels_last(input, geometry.output_dtype);
    if (!result.output.is_contiguous()) rows_output = allocate_like(input, geometry.output_dtype);
  } else {
    result.output = allocate_like(input, geometry.output_dtype);
  }
  if (request.residual != nullptr) result.residual_out = allocate_like(input, geometry.dtype);
  if (request.save_stats) {
    result.stats = allocate({stats_planes(request.norm), geometry.rows}, geometry.stats_dtype, input.device());
  }
  if (input.is_empty()) {
    if (result.stats) fill_zero(result.stats);
    return result;
  }

  const Rows input_rows = rows_of(input, geometry, geometry.dtype);
  const Rows residual_rows = request.residual != nullptr ? rows_of(*request.residual, geometry, geometry.dtype) : Rows();
  const Elements weight = elements_of(request.weight, geometry.param_dtype);
  const Elements bias = elements_of(request.bias, geometry.param_dtype);
  RowForwardArgs args = forward_args(request, geometry, weight, bias);
  args.input = input_rows.data;
  args.input_layout = input_rows.layout;
  args.residual = residual_rows.data;
  args.residual_layout = residual_rows.layout;
  args.residual_out = address_or_null(result.residual_out);
  args.output = (rows_output ? rows_output : result.output).mutable_data();
  args.output_layout = args.residual_out_layout = strided_rows(geometry.rows, geometry.cols);
  args.stats = address_or_null(result.stats);
  launch(request.norm, args, input.device());
  if (rows_output) copy(rows_output, result.output);
  return result;
}

void row_forward_in_place(const RowForward& request) {
  const Geometry geometry = check(request);
  if (request.input.is_empty()) return;
  check_in_place(request, geometry);

  const Rows input_rows = rows_of(request.input, geometry, geometry.dtype);
  const Rows residual_rows = rows_of(*request.residual, geometry, geometry.dtype);
  const Elements weight = elements_of(request.weight, geometry.param_dtype);
  const Elements bias = elements_of(request.bias, geometry.param_dtype);
  RowForwardArgs args = forward_args(request, geometry, weight, bias);
  args.output = (input_rows.copy ? input_rows.copy : request.input).mutable_data();
  args.residual_out = (residual_rows.copy ? residual_rows.copy : *request.residual).mutable_data();
  args.input = args.output;
  args.residual = args.residual_out;
  args.input_layout = args.output_layout = input_rows.layout;
  args.residual_layout = args.residual_out_layout = residual_rows.layout;
  launch(request.norm, args, request.input.device());
  if (input_rows.copy) copy(input_rows.copy, request.input);
  if (residual_rows.copy) copy(residual_rows.copy, *request.residual);
}

RowBackwardResult row_backward(const RowBackward& request) {
  const Tensor& input = request.input;
  const Geometry geometry = check(request);
  const int normalized_ndim = input.ndim() - geometry.leading;
  RowBackwardResult result;
  result.grad_input = (request.needs & 1) != 0 ? allocate_like(input, geometry.dtype) : allocate_none(input);
  const auto parameter_gradient = [&](int bit) {
    if ((request.needs & bit) == 0) return allocate_none(input);
    return allocate_contiguous(normalized_ndim, input.sizes() + geometry.leading, geometry.param_dtype, input.device());
  };
  result.grad_weight = parameter_gradient(2);
  result.grad_bias = parameter_gradient(4);
  if (request.needs == 0) return result;
  if (input.is_empty()) {  // a sum over no rows is 0
    fill_zero(result.grad_weight);
    fill_zero(result.grad_bias);
    return result;
  }

  const Rows grad_rows = rows_of(request.grad_output, geometry, geometry.output_dtype);
  const Rows residual_rows =
      request.grad_residual_out != nullptr ? rows_of(*request.grad_residual_out, geometry, geometry.dtype) : Rows();
  const Rows input_rows = rows_of(input, geometry, geometry.dtype);
  const Elements weight = elements_of(request.weight, geometry.param_dtype);
  RowBackwardArgs args;
  args.dtype = geometry.dtype;
  args.param_dtype = geometry.param_dtype;
  args.grad_output_dtype = geometry.output_dtype;
  args.rows = geometry.rows;
  args.cols = geometry.cols;
  args.grad_output = grad_rows.data;
  args.grad_output_layout = grad_rows.layout;
  args.grad_residual_out = residual_rows.data;
  args.grad_residual_out_layout = residual_rows.layout;
  args.input = input_rows.data;
  args.input_layout = input_rows.layout;
  args.weight = weight.data;
  args.stats = request.stats.data();
  args.weight_offset = offset_of(request.weight_offset, request.weight);
  args.rounding = geometry.rounding;
  args.grad_input = (request.needs & 1) != 0 ? result.grad_input.mutable_data() : nullptr;
  args.grad_weight = (request.needs & 2) != 0 ? result.grad_weight.mutable_data() : nullptr;
  args.grad_bias = (request.needs & 4) != 0 ? result.grad_bias.mutable_data() : nullptr;
  launch(request.norm, args, input.device());
  return result;
}

}  // namespace normext::ops
