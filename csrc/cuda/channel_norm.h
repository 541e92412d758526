// Entry points of the channel norms on CUDA; the contract is that of row_norm.h.
#pragma once

#include <cstddef>

#include "core/channel_args.h"

namespace normext::cuda {

std::size_t channel_forward_workspace(const ChannelForwardArgs& args, int device);
void channel_forward(const ChannelForwardArgs& args, void* workspace, int device, void* stream);
std::size_t channel_backward_workspace(const ChannelBackwardArgs& args, int device);
void channel_backward(const ChannelBackwardArgs& args, void* workspace, int device, void* stream);

void merge_moments(const ChannelMergeArgs& args, int device, void* stream);
void update_running(const RunningArgs& args, int device, void* stream);

}  // namespace normext::cuda
