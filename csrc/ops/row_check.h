// The argument checker of every row norm op, and the layouts its kernels take. After it, no argument can make a kernel read or
// write out of bounds.
#pragma once

#include "core/row_args.h"
#include "ops/check.h"
#include "ops/row_norm.h"
#include "ops/tensor.h"

namespace normext::ops {

struct Geometry {
  std::int64_t rows = 1;
  std::int64_t cols = 1;
  int leading = 0;  // dimensions that are not normalised
  DType dtype = DType::kFloat32;
  DType param_dtype = DType::kFloat32;   // of weight and bias
  DType output_dtype = DType::kFloat32;  // and of its gradient
  DType stats_dtype = DType::kFloat32;
  Rounding rounding = Rounding::kTorch;
};

constexpr int stats_planes(RowNorm norm) { return norm == RowNorm::kLayerNorm ? 3 : 1; }

Geometry check(const RowForward& request);
Geometry check(const RowBackward& request);

// In place: refuses targets that overlap themselves, each other or a parameter (in torch's words), and an output dtype that is
// not the input's.
void check_in_place(const RowForward& request, const Geometry& geometry);

// A tensor's rows as kernels take them: as they lie where the columns are contiguous and the leading dimensions collapse to
// kMaxRowDims, else a copy.
struct Rows {
  const void* data = nullptr;
  RowLayout layout;
  Tensor copy;
};
Rows rows_of(const Tensor& tensor, const Geometry& geometry, DType dtype);

}  // namespace normext::ops
