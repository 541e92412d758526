// Channel norm forward over rows of channels: schedule in channels_last.cuh, formulas in norms/channel_norm.h.
#include "cuda/channels_last.cuh"

namespace normext::cuda {

void last_forward(const ChannelForwardArgs& args, void* workspace, void* stream) {
  visit(args.dtype, [&](auto tag) { last_forward_typed<typename decltype(tag)::type>(args, workspace, stream); });
}

}  // namespace normext::cuda
