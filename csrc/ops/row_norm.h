// What the row norm ops share: a request in torch tensors is checked (row_check.h), results are allocated, and the kernels of the
// device's back end are called. One path serves CPU and CUDA.
#pragma once

#include <cstdint>

#include "core/row_args.h"
#include "ops/tensor.h"

namespace normext::ops {

// output = norm(x) * weight + bias with x = input, or x = residual_out = input + alpha * residual.
struct RowForward {
  const char* op;  // for error texts
  RowNorm norm;
  const Tensor& input;
  const Tensor* residual = nullptr;
  const Tensor* weight = nullptr;
  const Tensor* bias = nullptr;
  std::int64_t normalized_ndim = 0;
  double eps = 0.0;
  double alpha = 1.0;
  double weight_offset = 0.0;
  std::int64_t rounding = 0;  // a Rounding
  bool save_stats = false;
};

struct RowForwardResult {
  Tensor output;        // contiguous for LayerNorm; channels-last for RMSNorm where the input is, as in torch
  Tensor residual_out;  // contiguous; absent without residual
  Tensor stats;         // [3, rows] LayerNorm, [1, rows] RMSNorm, accumulate dtype; absent unless saved
};

RowForwardResult row_forward(const RowForward& request);

// The same in place: input becomes the output, residual the sum.
void row_forward_in_place(const RowForward& request);

struct RowBackward {
  const char* op;
  RowNorm norm;
  const Tensor& grad_output;
  const Tensor& input;
  const Tensor& stats;
  const Tensor* grad_residual_out = nullptr;
  const Tensor* weight = nullptr;
  const Tensor* bias = nullptr;  // tells the dtype of grad_bias where weight is absent; may be left out where it is not
  std::int64_t normalized_ndim = 0;
  double weight_offset = 0.0;
  std::int64_t rounding = 0;
  std::int64_t needs = 0;  // bit 0 grad_input, bit 1 grad_weight, bit 2 grad_bias
};

// What was not asked for has shape [0].
struct RowBackwardResult {
  Tensor grad_input;  // contiguous
  Tensor grad_weight;
  Tensor grad_bias;
};

RowBackwardResult row_backward(const RowBackward& request);

}  // namespace normext::ops
