#include "ops/check.h"

#include <algorithm>

namespace normext::ops {
namespace {

// The dimensions of a channels-last tensor from fastest to slowest: C, W, H, (D,) N.
int channels_last_dim(int place, int ndim) { return place == 0 ? 1 : (place == ndim - 1 ? 0 : ndim - place); }

}  // namespace

void refuse_argument(const char* op, const std::string& expected, const std::string& got) {
  refuse(std::string(op) + ": expected " + expected + ", got " + got);
}

void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  if (!tensor) refuse_argument(op, name, "an undefined tensor");
  if (tensor.device() != input.device()) {
    refuse_argument(op, std::string(name) + " on " + input.device_text() + " like input", tensor.device_text());
  }
}

void check_like_input(const char* op, const char* name, const Tensor& tensor, const Tensor& input, DType dtype) {
  check_device(op, name, tensor, input);
  if (!tensor.same_shape(input)) {
    refuse_argument(op, std::string(name) + " of input's shape " + input.shape_text(), tensor.shape_text());
  }
  if (!tensor.has_dtype(dtype)) refuse_argument(op, std::string(name) + " of " + dtype_text(dtype), tensor.dtype_text());
}

void check_buffer(const char* op, const char* name, const Tensor& tensor, std::initializer_list<std::int64_t> shape, DType dtype,
                  const Tensor& input) {
  check_device(op, name, tensor, input);
  if (!tensor.has_shape(shape) || !tensor.is_contiguous()) {
    std::string text;
    for (const std::int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
    refuse_argument(op, std::string("contiguous ") + name + " of shape [" + text + "]", tensor.shape_text());
  }
  if (!tensor.has_dtype(dtype)) refuse_argument(op, std::string(name) + " of " + dtype_text(dtype), tensor.dtype_text());
}

Elements elements_of(const Tensor* parameter, DType dtype) {
  Elements elements;
  if (parameter == nullptr) return elements;
  if (!parameter->is_contiguous()) elements.copy = contiguous_copy(*parameter, dtype);
  elements.data = (elements.copy ? elements.copy : *parameter).data();
  return elements;
}

namespace {

// The first `places` dimensions in the order of channels-last have ascending strides, as far as these tell.
bool ascends_as_channels_last(const Tensor& tensor, int places) {
  const std::int64_t channel_stride = tensor.strides()[1];
  if (channel_stride == 0) return false;
  std::int64_t least = 0;
  for (int place = 0; place < places; ++place) {
    const int d = channels_last_dim(place, tensor.ndim());
    if (tensor.sizes()[d] == 0 || tensor.strides()[d] < least) return false;
    if (d == 0 && least == channel_stride) return false;  // N111 and NC11: the order cannot be told, so it is contiguous
    least = tensor.strides()[d] * std::max<std::int64_t>(tensor.sizes()[d], 1);
  }
  return true;
}

bool has_such_rank(const Tensor& tensor) { return tensor.ndim() == 4 || tensor.ndim() == 5; }

}  // namespace

bool is_channels_last(const Tensor& tensor) { return has_such_rank(tensor) && ascends_as_channels_last(tensor, tensor.ndim()); }

bool images_are_channels_last(const Tensor& tensor) {
  return has_such_rank(tensor) && ascends_as_channels_last(tensor, tensor.ndim() - 1);
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

bool has_channels_last_strides(const Tensor& tensor) {
  std::int64_t next = 1;
  for (int place = 0; place < tensor.ndim(); ++place) {
    const int d = channels_last_dim(place, tensor.ndim());
    if (tensor.sizes()[d] != 1 && tensor.strides()[d] != next) return false;
    next *= tensor.sizes()[d];
  }
  return true;
}

bool is_dense_channels_last(const Tensor& tensor) { return has_such_rank(tensor) && has_channels_last_strides(tensor); }

}  // namespace normext::ops
