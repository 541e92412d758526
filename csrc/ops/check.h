// What the argument checkers of all ops share, and tensors in the layouts kernels take.
#pragma once

#include <string>

#include "ops/tensor.h"

namespace normext::ops {

[[noreturn]] void refuse_argument(const char* op, const std::string& expected, const std::string& got);

// A kernel never follows a pointer of another device.
void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& input);
void check_like_input(const char* op, const char* name, const Tensor& tensor, const Tensor& input, DType dtype);
// A dense tensor of a kernel's own, such as saved statistics.
void check_buffer(const char* op, const char* name, const Tensor& tensor, std::initializer_list<std::int64_t> shape, DType dtype,
                  const Tensor& input);

// A parameter's elements; a strided parameter is copied.
struct Elements {
  const void* data = nullptr;
  Tensor copy;
};
Elements elements_of(const Tensor* parameter, DType dtype);

// torch's suggest_memory_format() for 4 and 5 dimensions, and an output in that format.
bool is_channels_last(const Tensor& tensor);
bool images_are_channels_last(const Tensor& tensor);  // each; the batch may lie anyhow, as in x[i].unsqueeze(0)
Tensor allocate_channels_last(const Tensor& like, DType dtype);
bool has_channels_last_strides(const Tensor& tensor);  // dense in that format; sizes of 1 may have any stride
bool is_dense_channels_last(const Tensor& tensor);     // the same, of 4 or 5 dimensions: torch's is_contiguous() of that format

}  // namespace normext::ops
