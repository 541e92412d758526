// What a row norm is asked to do, in terms that know neither torch nor CUDA. Every pointer carries its shape.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "core/views.h"

namespace normext {

// output = norm(x) * weight + bias with x = input, or x = round(input + alpha * residual), stored in residual_out.
struct RowForwardArgs {
  DType dtype = DType::kFloat32;         // of input, residual and residual_out
  DType param_dtype = DType::kFloat32;   // of weight and bias: dtype, or float32 with 16-bit dtype
  DType output_dtype = DType::kFloat32;  // dtype, or float32 (llama rounding with float32 weight)
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  const void* input = nullptr;     // [rows, cols], input_layout
  const void* residual = nullptr;  // [rows, cols], residual_layout; or null
  void* residual_out = nullptr;    // [rows, cols], residual_out_layout; present if and only if residual is
  void* output = nullptr;          // [rows, cols], output_layout; may be `input`
  const void* weight = nullptr;    // [cols] or null
  const void* bias = nullptr;      // [cols] or null; LayerNorm only
  void* stats = nullptr;           // or null. LayerNorm [3, rows]: mean, its rounding error, rstd; RMSNorm [1, rows]: rstd
  RowLayout input_layout, residual_layout, residual_out_layout, output_layout;
  double eps = 0.0;
  double alpha = 1.0;
  double weight_offset = -0.0;  // RMSNorm: the weight used is weight_offset + weight; -0 leaves every weight as it is
  Rounding rounding = Rounding::kTorch;
};

// Gradients of the same. grad_input is also the gradient of residual_out, and, times alpha, that of residual.
struct RowBackwardArgs {
  DType dtype = DType::kFloat32;              // of input, grad_residual_out and grad_input
  DType param_dtype = DType::kFloat32;        // of weight, grad_weight and grad_bias
  DType grad_output_dtype = DType::kFloat32;  // dtype, or float32
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  const void* grad_output = nullptr;        // [rows, cols], grad_output_layout
  const void* grad_residual_out = nullptr;  // [rows, cols], grad_residual_out_layout; or null
  const void* input = nullptr;              // [rows, cols], input_layout: what was normalised
  const void* weight = nullptr;             // [cols] or null
  const void* stats = nullptr;              // as saved by the forward
  void* grad_input = nullptr;               // [rows, cols] contiguous, or null
  void* grad_weight = nullptr;              // [cols] or null
  void* grad_bias = nullptr;                // [cols] or null
  RowLayout grad_output_layout, grad_residual_out_layout, input_layout;
  double weight_offset = -0.0;
  Rounding rounding = Rounding::kTorch;
};

}  // namespace normext
