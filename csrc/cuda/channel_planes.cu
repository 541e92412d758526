// Channel norm forward over planes: schedules in channel_planes.cuh and channel_resident.cuh, formulas in norms/channel_norm.h.
#include "cuda/channel_planes_launch.cuh"

namespace normext::cuda {

std::size_t planes_forward_workspace(const ChannelForwardArgs& args, int device) { return planes_workspace(args, device); }

void planes_forward(const ChannelForwardArgs& args, void* workspace, int device, void* stream) {
  visit(args.dtype, [&](auto tag) { planes_forward_typed<typename decltype(tag)::type>(args, workspace, device, stream); });
}

}  // namespace normext::cuda
