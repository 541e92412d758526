// What each row norm's .cu files define, one specialisation per norm; row_norm.cpp chooses among them.
#pragma once

#include "cuda/row_norm.h"

namespace normext::cuda {

template <class Norm>
struct RowEntry {
  static std::size_t forward_workspace(const RowForwardArgs& args, int device);
  static void forward(const RowForwardArgs& args, void* workspace, int device, void* stream);
  static std::size_t backward_workspace(const RowBackwardArgs& args, int device);
  static void backward(const RowBackwardArgs& args, void* workspace, int device, void* stream);
};

}  // namespace normext::cuda
