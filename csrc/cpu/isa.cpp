// Chooses the instruction set once, and decides how a call is divided: what threads share, and how parameter gradients are summed.
// Thread counts decide only who does the work; everything that shapes a sum is computed from the shape of the input.

#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "core/dtypes.h"
#include "core/error.h"
#include "core/math.h"
#include "cpu/row_kernels.h"
#include "cpu/tuning.h"

// What CMake was asked for (NORMEXT_CPU_ISAS), where the compiler's target has it.
#if defined(__x86_64__) && defined(NORMEXT_CPU_AVX2)
#define HAS_AVX2 1
#endif
#if defined(__x86_64__) && defined(NORMEXT_CPU_AVX512)
#define HAS_AVX512 1
#endif

namespace normext {

namespace scalar {
extern const cpu::IsaKernels kKernels;
}
#if HAS_AVX2
namespace avx2 {
extern const cpu::IsaKernels kKernels;
}
#endif
#if HAS_AVX512
namespace avx512 {
extern const cpu::IsaKernels kKernels;
}
#endif
#if defined(__aarch64__)
namespace neon {
extern const cpu::IsaKernels kKernels;
}
#endif

namespace cpu {
namespace {

#if HAS_AVX512
// The same kernels, allowed the instruction.
const IsaKernels& avx512_bf16_kernels() {
  static const IsaKernels found = [] {
    IsaKernels kernels = avx512::kKernels;
    kernels.name = "avx512_bf16";
    kernels.has_bfloat16_instruction = true;
    return kernels;
  }();
  return found;
}
#endif

std::vector<const IsaKernels*> available_kernels() {
  std::vector<const IsaKernels*> list = {&scalar::kKernels};
#if HAS_AVX2 || HAS_AVX512
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#if HAS_AVX2
  if (has_avx2) list.push_back(&avx2::kKernels);
#endif
#if HAS_AVX512
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    list.push_back(&avx512::kKernels);
    if (__builtin_cpu_supports("avx512bf16")) list.push_back(&avx512_bf16_kernels());
  }
#endif
#if defined(__aarch64__)
  list.push_back(&neon::kKernels);
#endif
  return list;
}

const IsaKernels& choose_kernels() {
  const std::vector<const IsaKernels*> list = available_kernels();
  const char* wanted = std::getenv("NORMEXT_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *list.back();
  std::string names;
  for (const IsaKernels* kernels : list) {
    if (std::strcmp(kernels->name, wanted) == 0) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  fail("NORMEXT_CPU_ISA: expected one of " + names + ", got " + wanted);
}

// Bytes of x and dy that all threads together work on between two barriers; they stay in L2.
constexpr std::int64_t kChunkBytes = 2 << 20;
constexpr std::size_t kAlignment = 64;  // of the workspace: a cache line
// Rows of a block share one pass over the accumulators as long as x and dy of the block stay in L2.
constexpr std::int64_t kBlockCols = 32768;

std::int64_t segments_of(std::int64_t cols) { return (cols + kSegment - 1) / kSegment; }

// That of Zen 3 and before.
bool has_small_l2() { return l2_bytes() <= kSmallL2Bytes; }

RowSchedule schedule_of(const RowForwardArgs& args) {
  const std::int64_t bytes = args.rows * args.cols * static_cast<std::int64_t>(size_of(args.dtype));
  if (is_amd()) {
    const std::int64_t read = args.residual == nullptr ? bytes : 2 * bytes;
    const bool half = size_of(args.dtype) == 2;
    const bool wide = has_small_l2() && read > kBeyondL2WideBytes && args.cols >= kBeyondL2WideCols;
    const bool from_memory = half ? read > kBeyondL2HalfBytes && args.cols >= kBeyondL2HalfCols
                                  : wide || (read > kBeyondL2Bytes && args.cols >= kBeyondL2Cols);
    return from_memory ? RowSchedule::kPipeline : RowSchedule::kBatches;
  }
  return bytes > kBeyondL2Bytes ? RowSchedule::kMemoryBatches : RowSchedule::kBatches;
}

// Whether the memory has been touched, as far as a few of its pages tell.
bool is_mapped(const void* data, std::int64_t bytes) {
#if defined(__linux__)
  const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<std::uintptr_t>(data);
  for (int quarter = 1; quarter <= 4; ++quarter) {
    const std::uintptr_t address = (begin + static_cast<std::uintptr_t>(bytes / 4 * quarter) - 1) / page * page;
    unsigned char resident = 0;
    if (mincore(reinterpret_cast<void*>(address), 1, &resident) != 0 || (resident & 1) == 0) return false;
  }
  return true;
#else
  (void)data, (void)bytes;
  return false;
#endif
}

// An output in place of the input is in the caches as it is written.
bool streams(const RowForwardArgs& args) {
  const std::int64_t bytes = args.rows * args.cols * static_cast<std::int64_t>(size_of(args.output_dtype));
  const bool contiguous = args.output_layout.dims == 1 && args.output_layout.stride[0] == args.cols;
  return is_amd() && bytes >= kStreamBytes && contiguous && args.output != args.input && args.output != args.residual_out &&
         is_mapped(args.output, bytes);
}

std::int64_t run_count(std::int64_t rows) { return rows >= 8192 ? kMaxRuns : std::clamp<std::int64_t>(rows / 32, 1, 64); }

// All that decides the order of sums over rows.
BackwardPlan backward_tree(const RowBackwardArgs& args) {
  BackwardPlan plan;
  plan.padded_cols = (args.cols + kMaxUnit - 1) / kMaxUnit * kMaxUnit;
  plan.block = args.cols <= kBlockCols ? kBlockRows : 1;
  // Rows that are handled between two barriers when threads share columns: whole blocks.
  const std::int64_t row_bytes = std::max<std::int64_t>(args.cols, 1) * 2 * static_cast<std::int64_t>(size_of(args.dtype));
  plan.chunk = std::max(kBlockRows, kChunkBytes / row_bytes / kBlockRows * kBlockRows);
  plan.chunk = std::min(plan.chunk, std::max<std::int64_t>(args.rows, 1));
  if (args.grad_weight == nullptr && args.grad_bias == nullptr) return plan;
  plan.runs = run_count(args.rows);
  const std::int64_t rows_of_run = (args.rows + plan.runs - 1) / plan.runs;
  const std::int64_t blocks = rows_of_run / plan.block + plan.block;
  for (std::int64_t terms = kTermsPerSum; terms <= blocks; terms *= kTermsPerSum) ++plan.levels;
  return plan;
}

std::size_t sums_bytes(RowNorm norm, const RowBackwardArgs& args, const BackwardPlan& plan) {
  const std::int64_t kinds = norm == RowNorm::kLayerNorm ? 2 : 1;
  return static_cast<std::size_t>(plan.runs * plan.levels * kinds * plan.padded_cols) * accumulate_size_of(args.dtype);
}

std::size_t row_sums_bytes(const RowBackwardArgs& args, const BackwardPlan& plan) {
  return static_cast<std::size_t>(plan.chunk * segments_of(args.cols) * 2) * accumulate_size_of(args.dtype);
}

void clear_parameters(const RowBackwardArgs& args) {
  const std::size_t bytes = static_cast<std::size_t>(args.cols) * size_of(args.param_dtype);
  if (args.grad_weight != nullptr) std::memset(args.grad_weight, 0, bytes);
  if (args.grad_bias != nullptr) std::memset(args.grad_bias, 0, bytes);
}

// Weights of 1, for a bias without weights: rare, and kernels without weights but with a bias would be a quarter of LayerNorm's.
std::vector<unsigned char> ones(DType dtype, std::int64_t count) {
  std::vector<unsigned char> bytes(static_cast<std::size_t>(count) * size_of(dtype));
  visit(dtype, [&](auto tag) {
    using P = typename decltype(tag)::type;
    P one;
    if constexpr (sizeof(P) == 8) one = 1.0;
    else one = FromFloat<P>::convert(1.0f);
    for (std::size_t i = 0; i < bytes.size(); i += sizeof(P)) std::memcpy(bytes.data() + i, &one, sizeof(P));
  });
  return bytes;
}

bool huge_pages_wanted() {
  const char* value = std::getenv("NORMEXT_HUGE_PAGES");
  return value == nullptr || std::strcmp(value, "0") != 0;
}

}  // namespace

bool has_bfloat16_instruction = false;

const IsaKernels& kernels() {
  static const IsaKernels& chosen = []() -> const IsaKernels& {
    const IsaKernels& found = choose_kernels();
    has_bfloat16_instruction = found.has_bfloat16_instruction;
    return found;
  }();
  return chosen;
}

bool is_amd() {
#if defined(__x86_64__)
  static const bool amd = __builtin_cpu_is("amd") != 0;
  return amd;
#else
  return false;
#endif
}

std::int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const std::int64_t l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (l2 > 0) return l2;
#endif
  return 1 << 20;
}

Parallel threads_for(const Parallel& parallel, std::int64_t bytes) {
  return parallel.run == nullptr || bytes < kSerialBytes ? Parallel{} : parallel;
}

void row_forward(RowNorm norm, const RowForwardArgs& args, const Parallel& parallel) {
  if (args.rows == 0) return;
  if (args.cols == 0) {
    const std::int64_t saved = norm == RowNorm::kLayerNorm ? 3 : 1;
    if (args.stats != nullptr)
      std::memset(args.stats, 0, static_cast<std::size_t>(saved * args.rows) * accumulate_size_of(args.dtype));
    return;
  }
  if (args.weight == nullptr && args.bias != nullptr) {
    const std::vector<unsigned char> weight = ones(args.param_dtype, args.cols);
    RowForwardArgs with_weight = args;
    with_weight.weight = weight.data();
    return row_forward(norm, with_weight, parallel);
  }
  const std::int64_t passes = args.residual == nullptr ? 2 : 4;
  const std::int64_t bytes = args.rows * args.cols * passes * static_cast<std::int64_t>(accumulate_size_of(args.dtype));
  ForwardPlan plan;
  plan.parallel = threads_for(parallel, args.rows < parallel.threads ? bytes / 2 : bytes);  // rows that are shared wake it twice
  plan.schedule = schedule_of(args);
  plan.stream = streams(args);
  const std::int64_t segments = segments_of(args.cols);
  const bool few_rows = args.rows < plan.parallel.threads && segments > 1;
  std::unique_ptr<double[]> scratch;
  if (few_rows || segments > kMaxSegments) {
    plan.group = few_rows ? args.rows : 1;
    scratch.reset(new double[static_cast<std::size_t>(plan.group * (kScratchPerSegment * segments + kScratchPerRow))]);
    plan.scratch = scratch.get();
  }
  kernels().row[static_cast<int>(norm)].forward(args, plan);
}

std::size_t row_backward_workspace(RowNorm norm, const RowBackwardArgs& args) {
  const BackwardPlan plan = backward_tree(args);
  return kAlignment + sums_bytes(norm, args, plan) + row_sums_bytes(args, plan);
}

void row_backward(RowNorm norm, const RowBackwardArgs& args, void* workspace, const Parallel& parallel) {
  if (args.rows == 0 || args.cols == 0) return clear_parameters(args);
  BackwardPlan plan = backward_tree(args);
  const std::uintptr_t aligned = (reinterpret_cast<std::uintptr_t>(workspace) + kAlignment - 1) / kAlignment * kAlignment;
  plan.sums = reinterpret_cast<void*>(aligned);
  plan.row_sums = static_cast<char*>(plan.sums) + sums_bytes(norm, args, plan);
  plan.parallel = threads_for(parallel, args.rows * args.cols * 3 * static_cast<std::int64_t>(accumulate_size_of(args.dtype)));
  const std::int64_t bytes = args.rows * args.cols * static_cast<std::int64_t>(size_of(args.dtype));
  const std::int64_t fetched = has_small_l2() ? kFetchGradientSmallL2Bytes : kFetchGradientBytes;
  plan.fetch = is_amd() && args.grad_input != nullptr && plan.runs != 0 && bytes > fetched;
  // Whole runs, unless sharing the inside of every run keeps more threads busy, a quarter of that lost to its barriers.
  const std::int64_t threads = plan.parallel.threads;
  const auto busy = [threads](std::int64_t tasks) {
    return static_cast<double>(tasks) / static_cast<double>((tasks + threads - 1) / threads * threads);
  };
  const double inside = busy((args.cols + kColumnTask - 1) / kColumnTask);
  plan.inside_runs = busy(plan.runs == 0 ? args.rows : plan.runs) < 0.75 * inside || segments_of(args.cols) > kMaxSegments;
  kernels().row[static_cast<int>(norm)].backward(args, plan);
}

void transpose(const void* from, void* to, std::int64_t batch, std::int64_t rows, std::int64_t cols, std::size_t element_bytes,
               const Parallel& parallel) {
  const std::int64_t bytes = 2 * batch * rows * cols * static_cast<std::int64_t>(element_bytes);
  if (bytes > 0) kernels().transpose(from, to, batch, rows, cols, element_bytes, threads_for(parallel, bytes));
}

bool turns_into_planes(const ChannelShape& shape) {
  return kernels().fused_multiply_add && !shape.batch_norm() && shape.channels >= kLeastTransposed &&
         shape.spatial >= kLeastTransposed;
}

const char* isa_name() { return kernels().name; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const IsaKernels* kernels : available_kernels()) names.emplace_back(kernels->name);
  return names;
}

void advise_huge_pages(void* data, std::size_t bytes) {
#if defined(__linux__)
  constexpr std::size_t kLeast = 4u << 20;
  constexpr std::uintptr_t kPage = 2u << 20;
  if (bytes < kLeast) return;
  static const bool wanted = huge_pages_wanted();
  if (!wanted) return;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kPage * kPage;
  // Advice: where it is refused, the pages are small, and nothing else changes.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace cpu
}  // namespace normext
