// LayerNorm forward on CUDA: schedules in row_forward.cuh and row_wide.cuh, formula in norms/layer_norm.h.
#include "cuda/row_entry.h"
#include "cuda/row_forward_launch.cuh"
#include "norms/layer_norm.h"

namespace normext::cuda {

template <>
std::size_t RowEntry<LayerNorm>::forward_workspace(const RowForwardArgs& args, int device) {
  return row_forward_workspace<LayerNorm>(args, device);
}
template <>
void RowEntry<LayerNorm>::forward(const RowForwardArgs& args, void* workspace, int device, void* stream) {
  row_forward<LayerNorm>(args, workspace, device, stream);
}

}  // namespace normext::cuda
