// CPU back end: entry points, and the choice of an instruction set at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/channel_args.h"
#include "core/row_args.h"
#include "core/types.h"

namespace normext::cpu {

// The caller's thread pool. run() executes body(ctx, begin, end) over contiguous ranges covering [0, tasks); bodies never throw.
struct Parallel {
  int threads = 1;
  void (*run)(std::int64_t tasks, void (*body)(void* ctx, std::int64_t begin, std::int64_t end),
              void* ctx) = nullptr;  // null: serial
};

// Results do not depend on the number of threads.
void row_forward(RowNorm norm, const RowForwardArgs& args, const Parallel& parallel);
std::size_t row_backward_workspace(RowNorm norm, const RowBackwardArgs& args);  // bytes; any alignment will do
void row_backward(RowNorm norm, const RowBackwardArgs& args, void* workspace, const Parallel& parallel);

// Likewise for channel norms. The workspace may have any alignment. Nothing is called on an empty input.
std::size_t channel_forward_workspace(const ChannelForwardArgs& args);
void channel_forward(const ChannelForwardArgs& args, void* workspace, const Parallel& parallel);
std::size_t channel_backward_workspace(const ChannelBackwardArgs& args, const Parallel& parallel);  // which the call takes, too
void channel_backward(const ChannelBackwardArgs& args, void* workspace, const Parallel& parallel);
void merge_moments(const ChannelMergeArgs& args);
void update_running(const RunningArgs& args);

// [batch, rows, cols] to [batch, cols, rows], at least kLeastTransposed of each; elements of 2, 4 or 8 bytes.
constexpr std::int64_t kLeastTransposed = 32;
void transpose(const void* from, void* to, std::int64_t batch, std::int64_t rows, std::int64_t cols, std::size_t element_bytes,
               const Parallel& parallel);

// Whether channel_forward() takes planes_output. Without fma it does not: there the order of the sums shows [error summed over the
// inputs of test_channel_accuracy, over torch's: 1.28 as the input lies, 1.22 from a copy; that test's limit is 1.265].
bool turns_into_planes(const ChannelShape& shape);

const char* isa_name();                     // the one in use: NORMEXT_CPU_ISA, or the best the machine has
std::vector<std::string> available_isas();  // slowest first: {"scalar", "avx2", "avx512", "avx512_bf16"}

// For memory that was just allocated and not yet written: asks for huge pages where whole ones fit, from 4 MB on.
// First-touch page faults, not bandwidth, bound fresh outputs. NORMEXT_HUGE_PAGES=0 turns it off.
void advise_huge_pages(void* data, std::size_t bytes);

}  // namespace normext::cpu
