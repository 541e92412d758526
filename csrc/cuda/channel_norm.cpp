// The entry points of channel_norm.h: which layout's kernels, and how much workspace they need.
#include "cuda/channel_norm.h"

#include "core/dtypes.h"
#include "cuda/channel_entry.h"
#include "cuda/channel_plan.h"

namespace normext::cuda {

std::size_t channel_forward_workspace(const ChannelForwardArgs& args, int device) {
  ChannelForwardArgs canonical_args = args;
  canonical_args.shape = canonical(args.shape);
  if (canonical_args.shape.layout == ChannelLayout::kPlanes) return planes_forward_workspace(canonical_args, device);
  if (!args.takes_statistics()) return 0;
  const LastPlan plan = last_plan(canonical_args.shape, static_cast<int>(size_of(args.dtype)));
  return static_cast<std::size_t>(plan.slabs() * 3 * plan.entries()) * accumulate_size_of(args.dtype);
}

void channel_forward(const ChannelForwardArgs& args, void* workspace, int device, void* stream) {
  ChannelForwardArgs canonical_args = args;
  canonical_args.shape = canonical(args.shape);
  if (canonical_args.shape.layout == ChannelLayout::kPlanes) return planes_forward(canonical_args, workspace, device, stream);
  last_forward(canonical_args, workspace, stream);
}

std::size_t channel_backward_workspace(const ChannelBackwardArgs& args, int) {
  const ChannelShape shape = canonical(args.shape);
  const GradWorkspace sizes(args, shape, static_cast<int>(size_of(args.dtype)));
  return static_cast<std::size_t>(sizes.partials + sizes.means) * accumulate_size_of(args.dtype);
}

void channel_backward(const ChannelBackwardArgs& args, void* workspace, int, void* stream) {
  ChannelBackwardArgs canonical_args = args;
  canonical_args.shape = canonical(args.shape);
  const bool planes = canonical_args.shape.layout == ChannelLayout::kPlanes;
  (planes ? planes_backward : last_backward)(canonical_args, workspace, stream);
}

}  // namespace normext::cuda
