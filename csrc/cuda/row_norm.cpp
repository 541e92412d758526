// The entry points of row_norm.h: the run-time norm to its instantiations.
#include "cuda/row_norm.h"

#include "cuda/row_entry.h"
#include "norms/layer_norm.h"
#include "norms/rms_norm.h"

namespace normext::cuda {
namespace {

template <class F>
auto with_norm(RowNorm norm, F&& f) {
  return norm == RowNorm::kLayerNorm ? f(RowEntry<LayerNorm>{}) : f(RowEntry<RmsNorm>{});
}

}  // namespace

std::size_t row_forward_workspace(RowNorm norm, const RowForwardArgs& args, int device) {
  return with_norm(norm, [&](auto entry) { return entry.forward_workspace(args, device); });
}
void row_forward(RowNorm norm, const RowForwardArgs& args, void* workspace, int device, void* stream) {
  with_norm(norm, [&](auto entry) { entry.forward(args, workspace, device, stream); });
}
std::size_t row_backward_workspace(RowNorm norm, const RowBackwardArgs& args, int device) {
  return with_norm(norm, [&](auto entry) { return entry.backward_workspace(args, device); });
}
void row_backward(RowNorm norm, const RowBackwardArgs& args, void* workspace, int device, void* stream) {
  with_norm(norm, [&](auto entry) { entry.backward(args, workspace, device, stream); });
}

}  // namespace normext::cuda
