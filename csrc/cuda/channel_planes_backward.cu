// Channel norm backward over planes: schedule in channel_planes_backward.cuh, formulas in norms/channel_norm.h.
#include "cuda/channel_planes_backward.cuh"

namespace normext::cuda {

void planes_backward(const ChannelBackwardArgs& args, void* workspace, void* stream) {
  visit(args.dtype, [&](auto tag) { planes_backward_typed<typename decltype(tag)::type>(args, workspace, stream); });
}

}  // namespace normext::cuda
