// What the .cu files of the channel norms define for each other and for channel_norm.cpp. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/channel_args.h"

namespace normext::cuda {

// In the file of that layout; the contract is that of channel_norm.h.
std::size_t planes_forward_workspace(const ChannelForwardArgs& args, int device);
void planes_forward(const ChannelForwardArgs& args, void* workspace, int device, void* stream);
void planes_backward(const ChannelBackwardArgs& args, void* workspace, void* stream);
void last_forward(const ChannelForwardArgs& args, void* workspace, void* stream);
void last_backward(const ChannelBackwardArgs& args, void* workspace, void* stream);

// What becomes of the statistics of a slab.
template <class A>
struct SlabSink {
  A* stats = nullptr;    // [4][slabs] or null
  A* moments = nullptr;  // [3][slabs] or null
  std::int64_t slabs = 0;
  RunningUpdate update;  // batch norm only
  A momentum = A(0);     // that of `update`

  SlabSink() = default;
  explicit SlabSink(const ChannelForwardArgs& args)
      : stats(static_cast<A*>(args.stats)),
        moments(static_cast<A*>(args.moments)),
        slabs(args.shape.slabs()),
        update(args.update),
        momentum(static_cast<A>(args.update.momentum)) {}
};

// Merges the moments of each slab. Entry r * group_channels + d of a slab's table is of run r: of run_rows of `rows` values.
template <class A>
struct FinaliseParams {
  const A* partials;  // [slabs][3][runs * group_channels]
  SlabSink<A> sink;
  std::int64_t slab_size, runs, run_rows, rows;
  std::int64_t group_channels = 1;
  A eps;
};
void launch_finalise(const FinaliseParams<float>& params, void* stream);
void launch_finalise(const FinaliseParams<double>& params, void* stream);

// What becomes of the backward's sums over the entries (images * runs) of each channel.
template <class A>
struct GradSumsParams {
  const A* partials;  // of dz, of dz * xhat: [2][images * runs][channels], or by_channel [channels][2][images * runs]
  bool by_channel;
  ChannelShape shape;
  std::int64_t runs;  // entries per image; batch norm: in all
  DType param_dtype;
  const void* weight;   // [channels] or null
  void* grad[2];        // [channels] of param_dtype, or null: bias, weight
  A* sums;              // [2][channels] or null
  A* means;             // [2][slabs] or null: of g, of g * xhat
  const double* count;  // values per slab, or null: the shape's

  NORMEXT_HOST_DEVICE constexpr std::int64_t entries() const { return (shape.batch_norm() ? 1 : shape.batch) * runs; }
  NORMEXT_HOST_DEVICE constexpr std::int64_t place(int which, std::int64_t entry, std::int64_t channel) const {
    return by_channel ? (channel * 2 + which) * entries() + entry : (which * entries() + entry) * shape.channels + channel;
  }
};
void launch_grad_sums(const GradSumsParams<float>& params, void* stream);
void launch_grad_sums(const GradSumsParams<double>& params, void* stream);

}  // namespace normext::cuda
