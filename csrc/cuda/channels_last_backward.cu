// Channel norm backward over rows of channels: schedule in channels_last_backward.cuh, formulas in norms/channel_norm.h.
#include "cuda/channels_last_backward.cuh"

namespace normext::cuda {

void last_backward(const ChannelBackwardArgs& args, void* workspace, void* stream) {
  visit(args.dtype, [&](auto tag) { last_backward_typed<typename decltype(tag)::type>(args, workspace, stream); });
}

}  // namespace normext::cuda
