// Entry points of the row norms on CUDA. Plain C++: neither torch nor CUDA types. Pointers are device pointers, `device` is the
// current device and the stream a cudaStream_t of it. The workspace, where its size is not 0, is device memory of that size that
// lives until the stream has passed the call. Nothing here synchronises or allocates.
#pragma once

#include <cstddef>

#include "core/row_args.h"

namespace normext::cuda {

std::size_t row_forward_workspace(RowNorm norm, const RowForwardArgs& args, int device);
void row_forward(RowNorm norm, const RowForwardArgs& args, void* workspace, int device, void* stream);

std::size_t row_backward_workspace(RowNorm norm, const RowBackwardArgs& args, int device);
void row_backward(RowNorm norm, const RowBackwardArgs& args, void* workspace, int device, void* stream);

}  // namespace normext::cuda
