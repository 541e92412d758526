#include "ops/row_check.h"

#include <string>

#include "core/dtypes.h"
#include "ops/overlap.h"

namespace normext::ops {
namespace {

void check_parameter(const char* op, const char* name, const Tensor& parameter, const Tensor& input, int leading, DType dtype) {
  check_device(op, name, parameter, input);
  bool fits = parameter.ndim() == input.ndim() - leading;
  for (int d = 0; fits && d < parameter.ndim(); ++d) fits = parameter.sizes()[d] == input.sizes()[leading + d];
  if (!fits) {
    refuse_argument(op,
                    std::string(name) + " of the shape of the last " + std::to_string(input.ndim() - leading) +
                        " dimension(s) of input " + input.shape_text(),
                    parameter.shape_text());
  }
  if (!parameter.has_dtype(dtype)) {
    refuse_argument(
        op, std::string(name) + " of input's dtype " + input.dtype_text() + " (with 16-bit input all parameters may be float32)",
        parameter.dtype_text());
  }
}

Geometry check_geometry(const char* op, const Tensor& input, const Tensor* weight, const Tensor* bias, std::int64_t normalized_ndim,
                        std::int64_t rounding) {
  Geometry geometry;
  if (!input) refuse_argument(op, "input", "an undefined tensor");
  if (!input.device().is_cpu() && !input.device().is_cuda()) refuse_argument(op, "a CPU or CUDA tensor", input.device_text());
  if (!from_torch_dtype(input.dtype_number(), &geometry.dtype)) {
    refuse_argument(op, "input of dtype float32, float16, bfloat16 or float64", input.dtype_text());
  }
  if (normalized_ndim < 1 || normalized_ndim > input.ndim()) {
    refuse_argument(op, "1 to input.dim() normalized dimensions",
                    std::to_string(normalized_ndim) + " with input " + input.shape_text());
  }
  geometry.leading = input.ndim() - static_cast<int>(normalized_ndim);
  // Unsigned: where another extent is 0 these products may wrap, and nothing uses them then.
  std::uint64_t rows = 1;
  std::uint64_t cols = 1;
  for (int d = 0; d < input.ndim(); ++d) (d < geometry.leading ? rows : cols) *= static_cast<std::uint64_t>(input.sizes()[d]);
  geometry.rows = static_cast<std::int64_t>(rows);
  geometry.cols = static_cast<std::int64_t>(cols);

  const Tensor* first = weight != nullptr ? weight : bias;
  const bool narrow = size_of(geometry.dtype) == 2;
  geometry.param_dtype = first != nullptr && narrow && first->has_dtype(DType::kFloat32) ? DType::kFloat32 : geometry.dtype;
  if (weight != nullptr) check_parameter(op, "weight", *weight, input, geometry.leading, geometry.param_dtype);
  if (bias != nullptr) check_parameter(op, "bias", *bias, input, geometry.leading, geometry.param_dtype);

  if (rounding != 0 && rounding != 1) refuse_argument(op, "rounding 0 (torch) or 1 (llama)", std::to_string(rounding));
  geometry.rounding = static_cast<Rounding>(rounding);
  // HF multiplies the rounded value by the weight, so its output has the promoted dtype.
  geometry.output_dtype = geometry.rounding == Rounding::kLlama && weight != nullptr ? geometry.param_dtype : geometry.dtype;
  geometry.stats_dtype = geometry.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  return geometry;
}

bool collapse(const Tensor& tensor, int leading, RowLayout* layout) {
  std::int64_t expected = 1;
  for (int d = tensor.ndim() - 1; d >= leading; --d) {
    if (tensor.sizes()[d] == 1) continue;
    if (tensor.strides()[d] != expected) return false;
    expected *= tensor.sizes()[d];
  }
  return collapse_rows(tensor.sizes(), tensor.strides(), leading, layout);
}

}  // namespace

Geometry check(const RowForward& request) {
  const Geometry geometry =
      check_geometry(request.op, request.input, request.weight, request.bias, request.normalized_ndim, request.rounding);
  if (request.residual != nullptr) {
    check_like_input(request.op, "residual", *request.residual, request.input, geometry.dtype);
  }
  return geometry;
}

Geometry check(const RowBackward& request) {
  const char* op = request.op;
  const Tensor& input = request.input;
  const Geometry geometry = check_geometry(op, input, request.weight, request.bias, request.normalized_ndim, request.rounding);
  check_like_input(op, "grad_output", request.grad_output, input, geometry.output_dtype);
  if (request.grad_residual_out != nullptr) {
    check_like_input(op, "grad_residual_out", *request.grad_residual_out, input, geometry.dtype);
  }
  check_buffer(op, "stats", request.stats, {stats_planes(request.norm), geometry.rows}, geometry.stats_dtype, input);
  const bool centred = request.norm == RowNorm::kLayerNorm;
  const std::int64_t possible = 1 + (request.weight != nullptr ? 2 : 0) + (centred ? 4 : 0);
  if ((request.needs & ~possible) != 0) {
    refuse_argument(op, "needs: 1 for grad_input, 2 for the gradient of a given weight, 4 for that of LayerNorm's bias",
                    std::to_string(request.needs));
  }
  return geometry;
}

void check_in_place(const RowForward& request, const Geometry& geometry) {
  if (geometry.output_dtype != geometry.dtype) {
    refuse_argument(request.op, "weight of input's dtype, because the output replaces the input", request.weight->dtype_text());
  }
  const Tensor* written[] = {&request.input, request.residual};
  const Tensor* read[] = {request.weight, request.bias};
  for (const Tensor* target : written) {
    if (may_overlap_itself(*target)) {
      refuse(
          "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
          "Please clone() the tensor before performing the operation.");
    }
  }
  bool overlap = may_overlap(request.input, *request.residual);
  for (const Tensor* target : written) {
    for (const Tensor* parameter : read) overlap = overlap || (parameter != nullptr && may_overlap(*target, *parameter));
  }
  if (overlap) {
    refuse(
        "unsupported operation: some elements of the input tensor and the written-to tensor refer to a single memory "
        "location. Please clone() the tensor before performing the operation.");
  }
}

Rows rows_of(const Tensor& tensor, const Geometry& geometry, DType dtype) {
  Rows rows;
  if (collapse(tensor, geometry.leading, &rows.layout)) {
    rows.data = tensor.data();
    return rows;
  }
  rows.copy = contiguous_copy(tensor, dtype);
  rows.layout = strided_rows(geometry.rows, geometry.cols);
  rows.data = rows.copy.data();
  return rows;
}

}  // namespace normext::ops
