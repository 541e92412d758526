// RMSNorm forward on CUDA: schedules in row_forward.cuh and row_wide.cuh, formula in norms/rms_norm.h.
#include "cuda/row_entry.h"
#include "cuda/row_forward_launch.cuh"
#include "norms/rms_norm.h"

namespace normext::cuda {

template <>
std::size_t RowEntry<RmsNorm>::forward_workspace(const RowForwardArgs& args, int device) {
  return row_forward_workspace<RmsNorm>(args, device);
}
template <>
void RowEntry<RmsNorm>::forward(const RowForwardArgs& args, void* workspace, int device, void* stream) {
  row_forward<RmsNorm>(args, workspace, device, stream);
}

}  // namespace normext::cuda
