#include "ops/row_check.h"

#include <algorithm>
#include <string>

#include "core/dtypes.h"
#include "ops/overlap.h"

namespace normext::ops {
namespace {

[[noreturn]] void refuse_argument(const char* op, const std::string& expected, const std::string& got) {
  refuse(std::string(op) + ": expected " + expected + ", got " + got);
}

// A kernel never follows a pointer of another device.
void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  if (!tensor) refuse_argument(op, name, "an undefined tensor");
  if (tensor.device() != input.device()) {
    refuse_argument(op, std::string(name) + " on " + input.device_text() + " like input", tensor.device_text());
  }
}

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

void check_like_input(const char* op, const char* name, const Tensor& tensor, const Tensor& input, DType dtype) {
  check_device(op, name, tensor, input);
  if (!tensor.same_shape(input)) {
    refuse_argument(op, std::string(name) + " of input's shape " + input.shape_text(), tensor.shape_text());
  }
  if (!tensor.has_dtype(dtype)) refuse_argument(op, std::string(name) + " of " + dtype_text(dtype), tensor.dtype_text());
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

// The dimensions of a channels-last tensor from fastest to slowest: C, W, H, (D,) N.
int channels_last_dim(int place, int ndim) { return place == 0 ? 1 : (place == ndim - 1 ? 0 : ndim - place); }

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
  const Tensor& stats = request.stats;
  const int planes = stats_planes(request.norm);
  check_device(op, "stats", stats, input);
  if (!stats.has_shape({planes, geometry.rows}) || !stats.is_contiguous()) {
    refuse_argument(op, "contiguous stats of shape [" + std::to_string(planes) + ", " + std::to_string(geometry.rows) + "]",
                    stats.shape_text());
  }
  if (!stats.has_dtype(geometry.stats_dtype)) {
    refuse_argument(op, "stats of " + dtype_text(geometry.stats_dtype), stats.dtype_text());
  }
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

Elements elements_of(const Tensor* parameter, DType dtype) {
  Elements elements;
  if (parameter == nullptr) return elements;
  if (!parameter->is_contiguous()) elements.copy = contiguous_copy(*parameter, dtype);
  elements.data = (elements.copy ? elements.copy : *parameter).data();
  return elements;
}

bool is_channels_last(const Tensor& tensor) {
  if (tensor.ndim() != 4 && tensor.ndim() != 5) return false;
  const std::int64_t channel_stride = tensor.strides()[1];
  if (channel_stride == 0) return false;
  std::int64_t least = 0;
  for (int place = 0; place < tensor.ndim(); ++place) {
    const int d = channels_last_dim(place, tensor.ndim());
    if (tensor.sizes()[d] == 0 || tensor.strides()[d] < least) return false;
    if (d == 0 && least == channel_stride) return false;  // N111 and NC11: the order cannot be told, so it is contiguous
    least = tensor.strides()[d] * std::max<std::int64_t>(tensor.sizes()[d], 1);
  }
  return true;
}

Tensor allocate_channels_last(const Tensor& like, DType dtype) {
  std::int64_t strides[5];
  std::int64_t next = 1;
  for (int place = 0; place < like.ndim(); ++place) {
    const int d = channels_last_dim(place, like.ndim());
    strides[d] = next;
    next *= like.sizes()[d];
  }
  return allocate(like.ndim(), like.sizes(), strides, dtype, like.device());
}

}  // namespace normext::ops
