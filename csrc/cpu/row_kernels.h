// What isa.cpp asks of the kernels of one instruction set. No inline functions here: the header is seen by every instruction set.
#pragma once

#include <cstdint>

#include "core/row_args.h"
#include "cpu/channel_kernels.h"
#include "cpu/isa.h"

namespace normext::cpu {

constexpr std::int64_t kSegment = 4096;    // columns; moments and sums of a row are taken per segment
constexpr std::int64_t kMaxSegments = 64;  // of a row that one thread handles alone
constexpr std::int64_t kColumnTask = 256;  // of parameter gradients that one thread takes at least; whole units
constexpr std::int64_t kTermsPerSum = 16;  // that any accumulator takes in sequence
constexpr std::int64_t kMaxRuns = 128;     // of rows, for parameter gradients
constexpr std::int64_t kMaxUnit = 64;      // columns to which the widest instruction set pads a row of sums

// How a thread goes through its rows; the result is the same. Without fma, and in float64, kBatches is all there is.
enum class RowSchedule {
  kBatches,        // statistics of a batch of rows, then its output
  kMemoryBatches,  // the same, and the next batch is fetched meanwhile
  kPipeline        // a row at a time, its output after the statistics of what follows; all is fetched a row ahead
};

// Null scratch: a row belongs to one thread. Otherwise segments are shared out, `group` rows at a time.
struct ForwardPlan {
  Parallel parallel;
  RowSchedule schedule = RowSchedule::kBatches;
  bool stream = false;  // the output may go past the caches; batches from cache never do
  std::int64_t group = 1;
  void* scratch = nullptr;  // group * (kScratchPerSegment * segments + kScratchPerRow) doubles
};
constexpr std::int64_t kScratchPerSegment = 4;
constexpr std::int64_t kScratchPerRow = 3;

constexpr std::int64_t kBlockRows = 4;  // of a block of rows that are not too wide

// Parameter gradients are summed over `runs` runs of consecutive rows; in a run over blocks of `block` rows, whose sums pass
// through `levels` accumulators of kTermsPerSum terms each. All of this depends on the shape only.
struct BackwardPlan {
  Parallel parallel;
  bool inside_runs = false;  // threads share the rows, then the columns, of `chunk` rows at a time; otherwise they take whole runs
  bool fetch = false;        // into L2: grad_input during the row sums, the next rows during a pass for both kinds of gradients
  std::int64_t runs = 0;     // 0: no parameter gradient is wanted
  std::int64_t block = 1;    // kBlockRows or 1
  std::int64_t levels = 1;
  std::int64_t padded_cols = 0;
  std::int64_t chunk = 0;
  void* sums = nullptr;      // [runs, levels, LayerNorm 2 | RMSNorm 1, padded_cols]
  void* row_sums = nullptr;  // [chunk, 2, segments]; inside_runs only
};

struct RowKernels {
  void (*forward)(const RowForwardArgs& args, const ForwardPlan& plan);  // a bias comes with a weight
  void (*backward)(const RowBackwardArgs& args, const BackwardPlan& plan);
};

// The kernels of one instruction set.
struct IsaKernels {
  const char* name;
  bool fused_multiply_add;
  bool has_bfloat16_instruction;  // may be used
  RowKernels row[2];              // indexed by RowNorm
  ChannelKernels channel;
  // [batch, rows, cols] to [batch, cols, rows]; elements of 2, 4 or 8 bytes.
  void (*transpose)(const void* from, void* to, std::int64_t batch, std::int64_t rows, std::int64_t cols, std::size_t element_bytes,
                    const Parallel& parallel);
};

const IsaKernels& kernels();  // the ones in use
// They may use avx512_bf16; set when they are chosen.
extern __attribute__((visibility("hidden"))) bool has_bfloat16_instruction;
bool is_amd();            // the processor, as it says itself
std::int64_t l2_bytes();  // of a core; 1 MB where the system does not say
// The caller's threads, or none where waking them costs more than they save: `bytes` are those of all passes over the values.
Parallel threads_for(const Parallel& parallel, std::int64_t bytes);

}  // namespace normext::cpu
