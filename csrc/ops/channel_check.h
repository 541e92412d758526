// The argument checker of every channel norm op, and the layouts its kernels take. After it, no argument can make a kernel read or
// write out of bounds.
#pragma once

#include "ops/channel_norm.h"
#include "ops/check.h"

namespace normext::ops {

struct ChannelGeometry {
  ChannelShape shape;
  bool channels_last = false;  // the format of results, in torch's terms
  DType dtype = DType::kFloat32;
  DType param_dtype = DType::kFloat32;  // of weight, bias and running statistics
  DType stats_dtype = DType::kFloat32;
  Activation activation = Activation::kNone;
};

ChannelGeometry check(const ChannelForward& request);
ChannelGeometry check(const ChannelBackward& request);

// A result in the format of the input.
Tensor allocate_in_format(const ChannelGeometry& geometry, const Tensor& like);

// A tensor's elements in the kernel's layout: as they lie, or a copy.
struct Dense {
  const void* data = nullptr;
  Tensor copy;
};
Dense dense(const ChannelGeometry& geometry, const Tensor* tensor);

}  // namespace normext::ops
