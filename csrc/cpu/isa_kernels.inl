// Everything an instruction set offers to isa.cpp: kKernels, and what it is made of. CMake compiles each isa_*.cpp in five parts,
// NORMEXT_PART = 0 to 4, side by side: as one it is most of a build's time and memory. Without NORMEXT_PART a file has all of them.
#pragma once

#include "cpu/row_kernels.h"

namespace normext {
inline namespace NORMEXT_ISA {

void layer_norm_forward(const RowForwardArgs& args, const cpu::ForwardPlan& plan);
void rms_norm_forward(const RowForwardArgs& args, const cpu::ForwardPlan& plan);
void layer_norm_backward(const RowBackwardArgs& args, const cpu::BackwardPlan& plan);
void rms_norm_backward(const RowBackwardArgs& args, const cpu::BackwardPlan& plan);
void channel_forward(const ChannelForwardArgs& args, const cpu::ChannelPlan& plan);
void channel_backward(const ChannelBackwardArgs& args, const cpu::ChannelPlan& plan);
void fixed_stats(const ChannelForwardArgs& args);
void update_running(const RunningArgs& args);
void transpose(const void* from, void* to, std::int64_t batch, std::int64_t rows, std::int64_t cols, std::size_t element_bytes,
               const cpu::Parallel& parallel);
extern const cpu::IsaKernels kKernels;

}  // namespace NORMEXT_ISA
}  // namespace normext

#if !defined(NORMEXT_PART) || NORMEXT_PART == 0
#include "cpu/row_forward.inl"

namespace normext {
inline namespace NORMEXT_ISA {

void layer_norm_forward(const RowForwardArgs& args, const cpu::ForwardPlan& plan) { forward<LayerNorm>(args, plan); }

const cpu::IsaKernels kKernels = {
    NORMEXT_ISA_NAME,
    NORMEXT_HAS_FMA != 0,
    false,
    {{layer_norm_forward, layer_norm_backward}, {rms_norm_forward, rms_norm_backward}},
    {channel_forward, channel_backward, fixed_stats, update_running},
    transpose,
};

}  // namespace NORMEXT_ISA
}  // namespace normext
#endif

#if !defined(NORMEXT_PART) || NORMEXT_PART == 1
#include "cpu/row_forward.inl"

namespace normext {
inline namespace NORMEXT_ISA {

void rms_norm_forward(const RowForwardArgs& args, const cpu::ForwardPlan& plan) { forward<RmsNorm>(args, plan); }

}  // namespace NORMEXT_ISA
}  // namespace normext
#endif

#if !defined(NORMEXT_PART) || NORMEXT_PART == 2
#include "cpu/row_backward.inl"

namespace normext {
inline namespace NORMEXT_ISA {

void layer_norm_backward(const RowBackwardArgs& args, const cpu::BackwardPlan& plan) { backward<LayerNorm>(args, plan); }
void rms_norm_backward(const RowBackwardArgs& args, const cpu::BackwardPlan& plan) { backward<RmsNorm>(args, plan); }

}  // namespace NORMEXT_ISA
}  // namespace normext
#endif

#if !defined(NORMEXT_PART) || NORMEXT_PART == 3
#include "cpu/channel_call.inl"
#include "cpu/channel_planes.inl"
#include "cpu/channel_running.inl"
#include "cpu/channels_last.inl"

namespace normext {
inline namespace NORMEXT_ISA {

void channel_forward(const ChannelForwardArgs& args, const cpu::ChannelPlan& plan) {
  channel_call<PlanesForward, LastForward>(args, plan, args.residual != nullptr || args.activation != Activation::kNone);
}

void transpose(const void* from, void* to, std::int64_t batch, std::int64_t rows, std::int64_t cols, std::size_t element_bytes,
               const cpu::Parallel& parallel) {
  switch (element_bytes) {
    case 2:
      return transpose_elements<std::uint16_t>(from, to, batch, rows, cols, parallel);
    case 4:
      return transpose_elements<std::uint32_t>(from, to, batch, rows, cols, parallel);
    default:
      return transpose_elements<std::uint64_t>(from, to, batch, rows, cols, parallel);
  }
}

}  // namespace NORMEXT_ISA
}  // namespace normext
#endif

#if !defined(NORMEXT_PART) || NORMEXT_PART == 4
#include "cpu/channel_call.inl"
#include "cpu/channel_planes_backward.inl"
#include "cpu/channels_last_backward.inl"

namespace normext {
inline namespace NORMEXT_ISA {

void channel_backward(const ChannelBackwardArgs& args, const cpu::ChannelPlan& plan) {
  channel_call<PlanesBackward, LastBackward>(args, plan, args.activation != Activation::kNone);
}

}  // namespace NORMEXT_ISA
}  // namespace normext
#endif
