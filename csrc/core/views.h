// Where the rows of a tensor start. The columns of a row are contiguous; the leading dimensions have been collapsed to at
// most three (extent, stride) pairs, so that slices, transposed heads and expanded batches need no copy.
#pragma once

#include <cstdint>

#include "core/portable.h"

namespace normext {

constexpr int kMaxRowDims = 3;

// n / d for 0 <= n < 2^31 by one multiplication.
struct FastDivisor {
  std::uint32_t divisor = 1;
  std::uint32_t multiplier = 1;
  std::uint32_t shift = 0;

  FastDivisor() = default;
  explicit FastDivisor(std::uint32_t d) : divisor(d) {
    while ((std::uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<std::uint32_t>(((std::uint64_t{1} << 32) * ((std::uint64_t{1} << shift) - d)) / d + 1);
  }
  NORMEXT_INLINE std::uint32_t divide(std::uint32_t n) const {
    const std::uint32_t high = static_cast<std::uint32_t>((static_cast<std::uint64_t>(n) * multiplier) >> 32);
    return (high + n) >> shift;
  }
};

struct RowLayout {
  int dims = 1;                                  // 1..kMaxRowDims
  std::int64_t extent[kMaxRowDims] = {0, 1, 1};  // [0] varies fastest
  std::int64_t stride[kMaxRowDims] = {0, 0, 0};  // in elements; 64-bit
  FastDivisor fast[kMaxRowDims - 1];             // of extent[0] and extent[1]
  bool small = true;                             // rows < 2^31: fast division is exact

  // Offset, in elements, of the first column of `row`.
  NORMEXT_INLINE std::int64_t offset(std::int64_t row) const {
    std::int64_t inner = 0;
    NORMEXT_NO_UNROLL
    for (int d = 0; d + 1 < dims; ++d) {
      const std::int64_t outer =
          small ? static_cast<std::int64_t>(fast[d].divide(static_cast<std::uint32_t>(row))) : long_division(row, extent[d]);
      inner += (row - outer * extent[d]) * stride[d];
      row = outer;
    }
    return inner + row * stride[dims - 1];
  }

 private:
  // Bit by bit: `/` is a function of 80 instructions in every CUDA kernel, and only tensors of 2^31 rows come here.
  NORMEXT_INLINE static std::int64_t long_division(std::int64_t n, std::int64_t d) {
    std::int64_t quotient = 0;
    std::int64_t rest = 0;
    NORMEXT_NO_UNROLL
    for (int bit = 62; bit >= 0; --bit) {
      rest = 2 * rest + (n >> bit & 1);
      quotient *= 2;
      if (rest < d) continue;
      rest -= d;
      ++quotient;
    }
    return quotient;
  }
};

// Rows one after another, `row_stride` elements apart.
inline RowLayout strided_rows(std::int64_t rows, std::int64_t row_stride) {
  RowLayout layout;
  layout.extent[0] = rows;
  layout.stride[0] = row_stride;
  return layout;
}

// Collapses leading dimensions given outermost first. Returns false if more than kMaxRowDims pairs remain.
inline bool collapse_rows(const std::int64_t* sizes, const std::int64_t* strides, int ndim, RowLayout* layout) {
  std::int64_t extent[kMaxRowDims] = {1, 1, 1};
  std::int64_t stride[kMaxRowDims] = {0, 0, 0};
  std::int64_t rows = 1;
  int dims = 0;
  for (int d = ndim - 1; d >= 0; --d) {
    rows *= sizes[d];
    if (sizes[d] == 1) continue;
    if (dims > 0 && strides[d] == stride[dims - 1] * extent[dims - 1]) {
      extent[dims - 1] *= sizes[d];
      continue;
    }
    if (dims == kMaxRowDims) return false;
    extent[dims] = sizes[d];
    stride[dims++] = strides[d];
  }
  *layout = RowLayout();
  layout->dims = dims == 0 ? 1 : dims;
  layout->small = rows < (std::int64_t{1} << 31);
  for (int d = 0; d < kMaxRowDims; ++d) {
    layout->extent[d] = extent[d];
    layout->stride[d] = stride[d];
    if (d + 1 < dims && layout->small && extent[d] > 0) {
      layout->fast[d] = FastDivisor(static_cast<std::uint32_t>(extent[d]));
    }
  }
  return true;
}

}  // namespace normext
