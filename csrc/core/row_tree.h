// The shape of the reduction tree over one row on CUDA. It depends on the direction, the row width and the
// storage size only, never on the number of rows or on the mapping to threads: that makes results batch-invariant.
//
// Column c is in vector v = c / vector; vector v is in segment v / (lanes * slots), lane v % lanes and
// slot (v % (lanes * slots)) / lanes. Values are added in this order: the columns of a vector pairwise, slots pairwise,
// lanes by xor lanes/2 .. 1, segments pairwise in index order; absent values are exact zeros.
#pragma once

#include <cstdint>

#include "core/portable.h"

namespace normext {

enum class Direction : int { kForward, kBackward };

struct RowTree {
  std::int64_t cols;
  int segments;       // ceil(cols / 1024) forward, ceil(cols / 256) backward
  int vector;         // consecutive columns per access: the largest power of two that divides cols, 16 bytes at most
  int lanes;          // 32, or 8 or 16 for rows of at most 8 or 16 vectors
  int slots;          // vectors per lane and segment
  int full_segments;  // the next one has `rest` columns, those behind it none
  int rest;

  NORMEXT_HOST_DEVICE constexpr int segment_cols() const { return vector * lanes * slots; }
  // Columns of segment s that exist.
  NORMEXT_HOST_DEVICE constexpr int count(int s) const {
    return s < full_segments ? segment_cols() : (s == full_segments ? rest : 0);
  }
};

NORMEXT_HOST_DEVICE constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The smallest power of two >= n.
NORMEXT_HOST_DEVICE constexpr std::int64_t power_of_two_at_least(std::int64_t n) {
  std::int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

constexpr RowTree row_tree(Direction direction, std::int64_t cols, int element_size) {
  int vector = 1;
  while (vector * 2 * element_size <= 16 && cols % (vector * 2) == 0) vector *= 2;
  const std::int64_t vectors = cols / vector;
  const std::int64_t segments = ceil_div(cols > 0 ? cols : 1, direction == Direction::kForward ? 1024 : 256);
  const int lanes = vectors <= 8 ? 8 : (vectors <= 16 ? 16 : 32);
  const int slots = static_cast<int>(ceil_div(vectors > 0 ? vectors : 1, lanes * segments));
  const int segment_cols = vector * lanes * slots;
  return {cols,
          static_cast<int>(segments),
          vector,
          lanes,
          slots,
          static_cast<int>(cols / segment_cols),
          static_cast<int>(cols % segment_cols)};
}

}  // namespace normext
