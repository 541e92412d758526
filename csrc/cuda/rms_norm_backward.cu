// RMSNorm backward on CUDA: schedules in row_backward.cuh, row_param_grad.cuh and param_grad.cuh, formula in norms/rms_norm.h.
#include "cuda/row_backward_launch.cuh"
#include "cuda/row_entry.h"
#include "norms/rms_norm.h"

namespace normext::cuda {

template <>
std::size_t RowEntry<RmsNorm>::backward_workspace(const RowBackwardArgs& args, int device) {
  return row_backward_workspace<RmsNorm>(args, device);
}
template <>
void RowEntry<RmsNorm>::backward(const RowBackwardArgs& args, void* workspace, int device, void* stream) {
  row_backward<RmsNorm>(args, workspace, device, stream);
}

}  // namespace normext::cuda
