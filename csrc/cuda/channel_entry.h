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

// Merges the moments of each slab. Entry r * group_channels + d of a slab's table is of run r: of run_rows of `rows` values.
template <class A>
struct FinaliseParams {
  const A* partials;  // [slabs][3][runs * group_channels]
  A* stats;           // [4][slabs] or null
  A* moments;         // [3][slabs] or null
  std::int64_t slabs, slab_size, runs, run_rows, rows;
  std::int64_t group_channels = 1;
  A eps;
};
void launch_finalise(const FinaliseParams<float>& params, void* stream);
void launch_finalise(const FinaliseParams<double>& params, void* stream);

// What becomes of the backward's sums over the entries (images * runs) of each channel.
template <class A>
struct GradSumsParams {
  const A* partials;  // [2][images * runs][channels]: of dz, of dz * xhat
  ChannelShape shape;
  std::int64_t runs;  // entries per image; batch norm: in all
  DType param_dtype;
  const void* weight;   // [channels] or null
  void* grad[2];        // [channels] of param_dtype, or null: bias, weight
  A* sums;              // [2][channels] or null
  A* means;             // [2][slabs] or null: of g, of g * xhat
  const double* count;  // values per slab, or null: the shape's
};
void launch_grad_sums(const GradSumsParams<float>& params, void* stream);
void launch_grad_sums(const GradSumsParams<double>& params, void* stream);

}  // namespace normext::cuda
