// LayerNorm backward on CUDA: schedules in row_backward.cuh, row_param_grad.cuh and param_grad.cuh, formula in norms/layer_norm.h.
#include "cuda/row_backward_launch.cuh"
#include "cuda/row_entry.h"
#include "norms/layer_norm.h"

namespace normext::cuda {

template <>
std::size_t RowEntry<LayerNorm>::backward_workspace(const RowBackwardArgs& args, int device) {
  return row_backward_workspace<LayerNorm>(args, device);
}
template <>
void RowEntry<LayerNorm>::backward(const RowBackwardArgs& args, void* workspace, int device, void* stream) {
  row_backward<LayerNorm>(args, workspace, device, stream);
}

}  // namespace normext::cuda
