// Changes between contiguous and channels-last.
#pragma once

#include "ops/tensor.h"

namespace normext::ops {

// As copy(), and on the CPU by a transposition where both are dense, one is channels-last, and there are channels and positions
// enough [64x256x256, float32: 1 ms, torch's copy 9 ms].
void copy_format(const Tensor& from, const Tensor& to);

}  // namespace normext::ops
