// Everything an instruction set offers to isa.cpp: the one symbol each isa_*.cpp exports.

#pragma once

#include "cpu/channel_kernels.inl"
#include "cpu/row_backward.inl"
#include "cpu/row_forward.inl"
#include "cpu/transpose.inl"

namespace normext {
inline namespace NORMEXT_ISA {

extern const cpu::IsaKernels kKernels;
const cpu::IsaKernels kKernels = {
    NORMEXT_ISA_NAME,
    NORMEXT_HAS_FMA != 0,
    false,
    {{forward<LayerNorm>, backward<LayerNorm>}, {forward<RmsNorm>, backward<RmsNorm>}},
    {channel_forward, channel_backward, fixed_stats, update_running},
    transpose,
};

}  // namespace NORMEXT_ISA
}  // namespace normext
