// Limits that choose a path, as measured; no result depends on them. Where one kind of processor gained and the other was not
// measured or did not, the path is for the former alone: cpu::is_amd(). Limits of one kernel stand beside it. No inline functions
// here, as in row_kernels.h.
#pragma once

#include <cstdint>

namespace normext::cpu {

// Waking the pool costs a microsecond or two, in which one core handles this much, counted as if 16-bit elements had 32 bits: they
// take as long. Measured even at about 18000 elements of a norm and 9000 of a fused one.
constexpr std::int64_t kSerialBytes = 160 * 1024;
// An input of more comes from memory, or from a cache that is as far.
constexpr std::int64_t kBeyondL2Bytes = 3 << 20;
// Beyond this the caches hold little of an input and what is made of it: rows of channels-last in float32 and wider, if they are
// not long, are taken one at a time on Zen 3, as memory gives them, instead of two [times torch eager, both in one process, ops
// alone: BatchNorm in evaluation 8x256x56x56 0.84 and 0.99, 8x144x56x56 0.92 and 1.05, 8x512x28x28, which are 12.2 MB, 1.32
// and 1.18; its backward 0.89 and 1.17, 0.74 and 0.99, 0.97 and 1.16; of 6 MB, forward, 1.42 and 1.29; in bfloat16 of any size up
// to a quarter slower].
constexpr std::int64_t kMemoryBytes = 12 << 20;
// Zen 4 is slow far from L2 when several rows are read or written in turns [us, batches from cache, batches from memory, pipeline:
// LayerNorm 2048x1024 float32 417, 450, 316; RMSNorm 285, 304, 205; LayerNorm 16384x1024 bfloat16 2963, 2954, 2711]. In 16 bits
// arithmetic counts as much, and batches save more of it [LayerNorm bfloat16 2048x1024 242, 260, 263], above all in short rows
// [bfloat16 32768x128 635, 814, 965; float32, batches and pipeline: 32768x128 1265, 843; 50000x48 677, 1124]. A residual is a
// second input. Sapphire Rapids was measured with batches alone, its limit with plain norms.
constexpr std::int64_t kBeyondL2HalfBytes = 6 << 20;
constexpr std::int64_t kBeyondL2Cols = 128, kBeyondL2HalfCols = 512;
// Where L2 holds half a megabyte, as on Zen 3, wide rows in float32 and wider come from beyond it from here on, as soon as what is
// read and written is not what was there a moment ago [us, batches and the pipeline: RMSNorm 512x768 77, 63; 768x768 171, 128;
// 1024x768 187, 136; LayerNorm 93, 88; 194, 158; 216, 175; fused equal or less; narrow rows, LayerNorm 4096x128, 255, 283].
constexpr std::int64_t kSmallL2Bytes = 512 * 1024;
constexpr std::int64_t kBeyondL2WideBytes = 1 << 20, kBeyondL2WideCols = 512;
// An output that fills the caches is written past them where its pages are mapped [Zen 4, 16384x1024 in mapped pages: LayerNorm
// float32 4.97 -> 3.43 ms, RMSNorm and the sum of its output 6.04 -> 5.66, and its product with 64 columns 21.8 -> 20.2; bfloat16
// 2.59 -> 2.36, 3.05 -> 2.48, 8.21 -> 7.07. Fresh pages are in the caches once the system has cleared them: no gain there, on a
// Xeon a loss; on that mapped pages were not measured together with what follows].
constexpr std::int64_t kStreamBytes = 32 << 20;
// Inputs from here on have their gradients fetched ahead on Zen, if those of input and parameters are wanted [forward and backward,
// us: LayerNorm float32 1576x768 1001 -> 802, bfloat16 745 -> 691; 4096x4096 13804 -> 11963, 7390 -> 6296]. In L2 it brings nothing
// and costs up to 1 %.
constexpr std::int64_t kFetchGradientBytes = 2 << 20;
constexpr std::int64_t kFetchGradientSmallL2Bytes = 1 << 20;  // [Zen 3, LayerNorm float32 4096x128 440 -> 403, backward alone]
// Input (and gradient) up to here, and up to L2, are still there when they are read again: half of L2 on a Xeon, all of it on
// Zen 4. [Zen 3, L2 of 512 KB, 1 MB and 512 KB: GroupNorm of channels-last, float32, 2x640x32x32 0.73 and 0.98 of torch's speed.]
constexpr std::int64_t kMostResidentBytes = 1 << 20;
// Slabs up to here have their output fetched while their statistics are taken, unless an activation takes longer than memory [Zen
// 4, float32: BatchNorm 32x256x14x14 381 -> 279 us, InstanceNorm of the same 349 -> 250, of 8x64x56x56 227 -> 204; GroupNorm of
// 1x512x128x128, slabs of 1 MB, 1.65 -> 1.85 ms]. So is dx [forward and backward, float32: GroupNorm 2x640x32x32 765 -> 690 us,
// BatchNorm 32x256x14x14 1417 -> 1308; with SiLU or ReLU, and in slabs of 1 MB, 1 to 3 % more].
constexpr std::int64_t kFetchOutputBytes = 256 * 1024;
// GroupNorm of channels-last whose images do not fit L2: inputs up to kMostBlockedBytes in all are handled in blocks of columns, of
// at least kLeastBlockBytes of a row, on Zen, without an activation. Everything else takes longer than memory, or no less time
// [images and blocks, us: float32 2x640x32x32 387 -> 291, with SiLU 394 -> 443, backward 908 -> 850; bfloat16 230 -> 170, 328 ->
// 323, 546 -> 568; float32 8x512x28x28, 13 MB, 847 -> 1025].
constexpr std::int64_t kMostBlockedBytes = 6 << 20;
constexpr std::int64_t kLeastBlockBytes = 512;
// And in float32 and wider, where images do fit, in blocks of about this many channels where there are two of them or more: their
// scalars stay in L1 [1x1280x8x8 25.1 -> 21.8, 2x1280x8x8 28.3 -> 25.0, 2x960x16x16 74.4 -> 70.5; 512 channels alike].
constexpr std::int64_t kNarrowColumns = 320;
constexpr std::int64_t kPageBytes = 4096;  // over which prefetchers of memory follow a sequence of lines

}  // namespace normext::cpu
