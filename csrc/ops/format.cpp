#include "ops/format.h"

#include "core/dtypes.h"
#include "ops/boxed.h"
#include "ops/check.h"
#include "ops/launch.h"

namespace normext::ops {

void copy_format(const Tensor& from, const Tensor& to) {
  DType dtype;
  const bool like = from_torch_dtype(from.dtype_number(), &dtype) && to.has_dtype(dtype) && from.same_shape(to) && from.ndim() >= 3;
  const bool to_planes = like && has_channels_last_strides(from) && to.is_contiguous();
  const bool to_channels_last = like && from.is_contiguous() && has_channels_last_strides(to);
  if (!runs_cpu_kernels(from.device()) || !runs_cpu_kernels(to.device()) || from.is_empty() || !(to_planes || to_channels_last)) {
    return copy(from, to);
  }
  const std::int64_t batch = from.sizes()[0], channels = from.sizes()[1];
  std::int64_t spatial = 1;
  for (int d = 2; d < from.ndim(); ++d) spatial *= from.sizes()[d];
  if (channels < cpu::kLeastTransposed || spatial < cpu::kLeastTransposed) return copy(from, to);  // which is as fast there
  cpu::transpose(from.data(), to.mutable_data(), batch, to_planes ? spatial : channels, to_planes ? channels : spatial,
                 size_of(dtype), thread_pool());
}

namespace {

Tensor contiguous(const Tensor& input) {
  constexpr const char* op = "contiguous";
  DType dtype;
  if (!input) refuse_argument(op, "input", "an undefined tensor");
  if (!input.device().is_cpu() && !input.device().is_cuda()) refuse_argument(op, "a CPU or CUDA tensor", input.device_text());
  if (!from_torch_dtype(input.dtype_number(), &dtype)) {
    refuse_argument(op, "input of dtype float32, float16, bfloat16 or float64", input.dtype_text());
  }
  Tensor output = allocate_like(input, dtype);
  copy_format(input, output);
  return output;
}

const bool defined = [] {
  define("contiguous(Tensor input) -> Tensor", boxed<contiguous>);
  return true;
}();

}  // namespace
}  // namespace normext::ops
