#include "ops/overlap.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "core/dtypes.h"
#include "core/views.h"

namespace normext::ops {
namespace {

std::uintptr_t element_size(const Tensor& tensor) {
  DType dtype;
  return from_torch_dtype(tensor.dtype_number(), &dtype) ? size_of(dtype) : 1;
}

struct Span {
  std::uintptr_t begin, end;
};

Span span_of(const Tensor& tensor) {
  std::int64_t last = 0;
  for (int d = 0; d < tensor.ndim(); ++d) last += (tensor.sizes()[d] - 1) * tensor.strides()[d];
  const auto begin = reinterpret_cast<std::uintptr_t>(tensor.data());
  return {begin, begin + static_cast<std::uintptr_t>(last + 1) * element_size(tensor)};
}

// Rows `pitch` bytes apart, of `width` contiguous bytes. Returns false where a tensor is not that regular.
bool row_slices(const Tensor& tensor, std::uintptr_t* pitch, std::uintptr_t* width) {
  const int last = tensor.ndim() - 1;
  RowLayout layout;
  if (last < 0 || tensor.strides()[last] != 1 || !collapse_rows(tensor.sizes(), tensor.strides(), last, &layout)) return false;
  *pitch = static_cast<std::uintptr_t>(layout.stride[0]) * element_size(tensor);
  *width = static_cast<std::uintptr_t>(tensor.sizes()[last]) * element_size(tensor);
  return layout.dims == 1 && *pitch >= *width;
}

}  // namespace

bool may_overlap_itself(const Tensor& tensor) {
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;  // stride, size
  for (int d = 0; d < tensor.ndim(); ++d) {
    if (tensor.sizes()[d] > 1) dims.emplace_back(tensor.strides()[d], tensor.sizes()[d]);
  }
  std::sort(dims.begin(), dims.end());
  std::int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return true;
    reach += (size - 1) * stride;
  }
  return false;
}

bool may_overlap(const Tensor& a, const Tensor& b) {
  if (a.is_empty() || b.is_empty()) return false;
  const Span first = span_of(a);
  const Span second = span_of(b);
  if (first.end <= second.begin || second.end <= first.begin) return false;
  // Two column slices of one matrix have interleaved spans and share nothing.
  std::uintptr_t pitch, width, other_pitch, other_width;
  if (!row_slices(a, &pitch, &width) || !row_slices(b, &other_pitch, &other_width) || pitch != other_pitch) return true;
  const bool a_first = first.begin <= second.begin;
  const std::uintptr_t shift = (a_first ? second.begin - first.begin : first.begin - second.begin) % pitch;
  return shift < (a_first ? width : other_width) || shift + (a_first ? other_width : width) > pitch;
}

}  // namespace normext::ops
