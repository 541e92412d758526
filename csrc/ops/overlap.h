// Which tensors share memory: what an op that writes its arguments must know. Both answers may err on the side of yes.
#pragma once

#include "ops/tensor.h"

namespace normext::ops {

bool may_overlap_itself(const Tensor& tensor);  // two indices, one address: an expanded dimension, or windows
bool may_overlap(const Tensor& a, const Tensor& b);

}  // namespace normext::ops
