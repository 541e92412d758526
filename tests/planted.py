"""The bugs that mutants.py plants: those that norms elsewhere really had, as far as one can have them on the CPU or the emulator,
and some that our own rules invite. Not here, because they need a GPU: a removed device guard, the default stream. Nor are these: an
early return for empty rows, a mean saved in half precision, scratch memory of an earlier call read where there is no weight, the
residual written before all is read.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    find: str
    replace: str
    backends: str  # for --backend
    tests: tuple


ACCURACY = ("tests/test_accuracy.py",)
EXACT = ("tests/test_exact.py",)
INVARIANCE = ("tests/test_invariance.py",)
LAYOUTS = ("tests/test_layouts.py", "tests/test_invariance.py")
TREE = ("tests/test_tree.py",)
OPS = ("tests/test_ops.py",)

SUMS = "csrc/cuda/collectives.cuh"
FORWARD = "csrc/cuda/row_forward.cuh"
BACKWARD = "csrc/cuda/row_backward.cuh"
BACKWARD_VALUES = "csrc/cuda/row_backward_values.cuh"
PARAM_GRAD = "csrc/cuda/row_param_grad.cuh"
RING = "csrc/cuda/row_ring.cuh"
CPU_FORWARD = "csrc/cpu/row_forward.inl"
CPU_MOMENTS = "csrc/cpu/row_moments.inl"

MUTANTS = (
    # ---- statistics
    Mutant(
        "one-pass variance",
        FORWARD,
        "const A mean = lanes_sum(pairwise(sums), lanes) / divisor;",
        "const A mean = A(0);",
        "emulated",
        (*ACCURACY, "-k", "mean"),
    ),
    Mutant(
        "mean not corrected",
        FORWARD,
        "moments(mean, sum_d, sum_d2, divisor)",
        "moments(mean, A(0), sum_d2, divisor)",
        "emulated",
        ACCURACY,
    ),
    Mutant("low part of the mean dropped", FORWARD, "= stats.lo;", "= A(0);", "emulated", (*ACCURACY, "-k", "mean")),
    Mutant("eps dropped", SUMS, "return s.sum_x2; }), cols, eps);", "return s.sum_x2; }), cols, A(0));", "emulated", ACCURACY),
    *(
        Mutant(
            f"error of a merged mean left, {name}",
            "csrc/norms/stats.h",
            "finite ? centre.lo + rest : centre.lo",
            "centre.lo",
            name,
            (*ACCURACY, "tests/test_channel_accuracy.py", "-k", "lead"),
        )
        for name in ("emulated", "avx2")
    ),
    Mutant("eps outside the root, one segment", SUMS, "ts.m2, cols, eps);", "ts.m2, cols, eps * eps);", "emulated", ACCURACY),
    Mutant("eps outside the root", SUMS, "rest, m2, cols, eps);", "rest, m2, cols, eps * eps);", "emulated", ACCURACY),
    Mutant(
        "unbiased variance",
        SUMS,
        "rest, m2, cols, eps);",
        "rest, m2 * (cols / (cols - A(1))), cols, eps);",
        "emulated",
        ACCURACY,
    ),
    Mutant("reciprocal instead of division", FORWARD, "lanes) / divisor;", "lanes) * (A(1) / divisor);", "emulated", EXACT),
    Mutant(
        "absent columns counted in the variance",
        FORWARD,
        "sums[s] = A(0);\n      if (!columns.owns(s)) continue;",
        "sums[s] = A(0);",
        "emulated",
        ACCURACY,
    ),
    Mutant(
        "a short last segment counted as full",
        SUMS,
        "n = count(lane);",
        "n = static_cast<A>(tree.segment_cols());",
        "emulated",
        ACCURACY,
    ),
    Mutant(
        "statistics of the unrounded sum",
        CPU_MOMENTS,
        "return keep<T>(sum.unpack(), extent);",
        "const Pair<A> x = load<T>(input + column, extent), r = load<T>(residual + column, extent);\n"
        "return keep<T>({fma(r.a, Vector<A>{} + alpha, x.a), fma(r.b, Vector<A>{} + alpha, x.b)}, extent);",
        "avx2",
        EXACT,
    ),
    Mutant(
        "pipeline: the shift of the row before",
        CPU_FORWARD,
        "shift = shift_of(r + 1);",
        "shift = shift_of(r);",
        "avx2",
        INVARIANCE,
    ),
    Mutant(
        "a shift that misses the mean is kept",
        CPU_MOMENTS,
        "__builtin_expect(near_mean(found, static_cast<Accumulate<T>>(cols), kRowSlack), 1)",
        "true",
        "avx2",
        ACCURACY,
    ),
    Mutant(
        "a shift may miss the mean by a deviation",
        CPU_MOMENTS,
        "constexpr int kRowSlack = 4;",
        "constexpr int kRowSlack = 1;",
        "avx2",
        ACCURACY,
    ),
    Mutant(
        "sums of a few rows looked for in the wrong lanes",
        "csrc/cpu/row_sums.inl",
        "every<kLanes<A> / kRows>(",
        "every<1>(",
        "avx2",
        INVARIANCE,
    ),
    Mutant(
        "past the caches: the upper half of a unit is lost",
        "csrc/cpu/packed.h",
        "stream_bytes(p + kLanes<Accumulate<T>>, x.high);",
        "stream_bytes(p, x.high);",
        "avx2",
        INVARIANCE,
    ),
    # ---- races and mappings
    Mutant(
        "barrier between the reductions removed",
        FORWARD,
        "own.put(table, tree.segments, segment);\n        block_barrier();",
        "own.put(table, tree.segments, segment);",
        "emulated",
        (*TREE, *ACCURACY),
    ),
    Mutant("cluster barrier removed", FORWARD, "        cluster_barrier();", "", "emulated", (*TREE, *INVARIANCE)),
    Mutant(
        "barrier of the backward's exchange removed",
        BACKWARD,
        "put_sums<Norm>(table, segments, segment, sums);\n    block_barrier();",
        "put_sums<Norm>(table, segments, segment, sums);",
        "emulated",
        (*TREE, *ACCURACY),
    ),
    Mutant("exchange tables not alternated", BACKWARD, "turn = table_values - turn;", "", "emulated", (*TREE, *ACCURACY)),
    Mutant(
        "barrier of the shared-memory tier removed", "csrc/cuda/row_wide.cuh", "if (shared) block_barrier();", "", "emulated", TREE
    ),
    Mutant(
        "tree depends on the number of rows",
        "csrc/cuda/row_forward_launch.cuh",
        "row_tree(Direction::kForward, args.cols, element_size);",
        "row_tree(args.rows < 256 ? Direction::kForward : Direction::kBackward, args.cols, element_size);",
        "emulated",
        INVARIANCE,
    ),
    Mutant(
        "rows from 65536 blocks on unwritten",
        "csrc/cuda/row_forward_launch.cuh",
        "shape.blocks = ceil_div(params.args.rows, std::int64_t{m.repeats} * m.rows_at_once) * m.blocks_per_row;",
        "shape.blocks = std::min<std::int64_t>(65535, ceil_div(params.args.rows, m.repeats * m.rows_at_once) * m.blocks_per_row);",
        "emulated",
        TREE,
    ),
    Mutant(
        "runs depend on the thread count",
        "csrc/cpu/isa.cpp",
        "plan = backward_tree(args);\n  const std::uintptr_t",
        "plan = backward_tree(args);\n  if (parallel.threads > 1 && plan.runs > 1) plan.runs -= 1;\n  const std::uintptr_t",
        "avx2",
        INVARIANCE,
    ),
    # ---- memory
    Mutant(
        "float32 parameters read as the input's type",
        "csrc/cuda/row_forward_launch.cuh",
        "params.float_params = args.param_dtype != args.dtype;",
        "params.float_params = false;",
        "emulated",
        ACCURACY,
    ),
    Mutant(
        "row offset in 32 bits",
        "csrc/core/views.h",
        "return inner + row * stride[dims - 1];",
        "return inner + static_cast<std::int32_t>(row * stride[dims - 1]);",
        "avx2",
        LAYOUTS,
    ),
    Mutant(
        "alignment assumed",
        "csrc/cuda/row_launch.cuh",
        "return reinterpret_cast<std::uintptr_t>(p) % bytes == 0;",
        "return p != nullptr || bytes > 0;",
        "emulated",
        INVARIANCE,
    ),
    Mutant(
        "last dimension assumed contiguous",
        "csrc/ops/row_check.cpp",
        "if (tensor.strides()[d] != expected) return false;",
        "",
        "avx2",
        LAYOUTS,
    ),
    Mutant(
        "layout of grad_output ignored",
        "csrc/ops/row_norm.cpp",
        "args.grad_output_layout = grad_rows.layout;",
        "args.grad_output_layout = input_rows.layout;",
        "avx2",
        LAYOUTS,
    ),
    Mutant(
        "residual_out not written",
        FORWARD,
        "x.store(static_cast<T*>(args.residual_out) + args.residual_out_layout.offset(row), here, params.output_aligned);",
        "",
        "emulated",
        EXACT,
    ),
    Mutant(
        "grad_output overwritten",
        "csrc/ops/row_norm.cpp",
        "(request.needs & 1) != 0 ? result.grad_input.mutable_data() : nullptr;",
        "(request.needs & 1) != 0 ? const_cast<void*>(grad_rows.data) : nullptr;",
        "avx2",
        OPS,
    ),
    Mutant(
        "last vector of a row unwritten",
        "csrc/cuda/tile.cuh",
        "if (columns.owns(s)) slot[s].template store<kAligned>(p + columns.offset(s));",
        "if (columns.owns(s) && columns.left != V) slot[s].template store<kAligned>(p + columns.offset(s));",
        "emulated",
        ACCURACY,
    ),
    Mutant(
        "shape of stats not checked",
        "csrc/ops/check.cpp",
        "if (!tensor.has_shape(shape) || !tensor.is_contiguous()) {",
        "if (!tensor.is_contiguous()) {",
        "avx2",
        OPS,
    ),
    Mutant(
        "overlap of in-place targets not checked",
        "csrc/ops/row_check.cpp",
        "if (overlap) {",
        "if (overlap && written[0] == nullptr) {",
        "avx2",
        ("tests/test_errors.py",),
    ),
    # ---- gradients
    Mutant(
        "partial gradients rounded to the parameter type",
        "csrc/cuda/param_grad.cuh",
        "exists ? partial[p * params.cols + column] : A(0)",
        "exists ? A(to_accumulate(from_accumulate<P>(partial[p * params.cols + column]))) : A(0)",
        "emulated",
        ACCURACY,
    ),
    Mutant(
        "last partial gradient skipped",
        "csrc/cuda/param_grad.cuh",
        "first + i < count ?",
        "first + i + 1 < count ?",
        "emulated",
        ACCURACY,
    ),
    Mutant(
        "the row that is on its way is the same again",
        RING,
        "before + layout.stride[0]",
        "before",
        "emulated",
        ACCURACY,
    ),
    Mutant("a row on its way is not waited for", RING, "copies_.template wait<kRows - 1>();", "", "emulated", ACCURACY),
    Mutant(
        "a row through registers takes the place of the next",
        RING,
        "if (loaded_) put(next_ - 1);",
        "if (loaded_) put(next_);",
        "emulated",
        TREE,
    ),
    Mutant("only half a fold", PARAM_GRAD, "store_pack(total + p, ", "store_pack(total, ", "emulated", ACCURACY),
    Mutant("a repeat takes the first row again", FORWARD, "(block * repeats + r) *", "(block * repeats) *", "emulated", TREE),
    Mutant("llama rounding: scaled twice", FORWARD, "  row.rstd = A(1);\n", "", "emulated", ACCURACY),
    Mutant(
        "last run skipped",
        "csrc/cpu/row_backward.inl",
        "{pairwise(a, plan.runs), pairwise(b, plan.runs)}",
        "{pairwise(a, plan.runs > 1 ? plan.runs - 1 : 1), pairwise(b, plan.runs > 1 ? plan.runs - 1 : 1)}",
        "avx2",
        ACCURACY,
    ),
    Mutant(
        "long accumulation chains, CPU", "csrc/cpu/row_kernels.h", "kTermsPerSum = 16;", "kTermsPerSum = 512;", "avx2", ACCURACY
    ),
    Mutant("long accumulation chains, CUDA", "csrc/cuda/tuning.h", "kGroupRows = 16;", "kGroupRows = 256;", "emulated", ACCURACY),
    Mutant(
        "gradient of the sum dropped",
        BACKWARD_VALUES,
        "dx[s][i] = dx[s][i] + residual.slot[s][i];",
        "dx[s][i] = dx[s][i];",
        "emulated",
        ACCURACY,
    ),
    Mutant("mean of the gradient dropped", BACKWARD, "{sums.g / params.cols,", "{A(0),", "emulated", ACCURACY),
    Mutant(
        "offset added without a weight",
        "csrc/ops/row_norm.cpp",
        "return weight == nullptr || weight_offset == 0.0 ? -0.0 : weight_offset;",
        "return weight_offset == 0.0 ? -0.0 : weight_offset;",
        "emulated",
        EXACT,
    ),
    # ---- rounding
    Mutant("llama rounding dropped", FORWARD, "params.args.rounding == Rounding::kLlama", "false", "emulated", EXACT),
    Mutant("llama rounding of dweight dropped", PARAM_GRAD, "rounding == Rounding::kLlama", "false", "emulated", EXACT),
    Mutant(
        "weight offset added in the parameter type",
        FORWARD,
        "params.weight_offset + weight[i], A(0))",
        "A(to_accumulate(from_accumulate<P>(params.weight_offset + weight[i]))), A(0))",
        "emulated",
        EXACT,
    ),
    Mutant(
        "alpha times residual rounded",
        FORWARD,
        "fma(params.alpha, r.slot[s][i], x.slot[s][i])",
        "params.alpha * r.slot[s][i] + x.slot[s][i]",
        "emulated",
        ACCURACY,
    ),
    Mutant(
        "ties away from even",
        "csrc/core/math.h",
        "(bits + 0x7fffu + (bits >> 16 & 1u)) >> 16",
        "(bits + 0x8000u) >> 16",
        "emulated",
        LAYOUTS,
    ),
    Mutant(
        "NaN becomes a number",
        "csrc/core/math.h",
        "> 0x7f800000u) return {0x7fc0u};",
        "> 0xff800000u) return {0x7fc0u};",
        "emulated",
        LAYOUTS,
    ),
    Mutant(
        "subnormal bfloat16 becomes zero",
        "csrc/cpu/packed.h",
        "_kortestz_mask16_u8(a, b)",
        "_kortestz_mask16_u8(b, b)",
        "avx512_bf16",
        LAYOUTS,
    ),
    # ---- Python
    Mutant(
        "fake ignores channels-last",
        "normext/rms_norm.py",
        "_library.channels_last_like(input, dtype), input.new_empty(0)",
        "_library.contiguous_like(input, dtype), input.new_empty(0)",
        "avx512",
        LAYOUTS,
    ),
    Mutant(
        "version counters not bumped",
        "normext/rms_norm.py",
        "torch.autograd.graph.increment_version((input, residual))",
        "pass",
        "avx512",
        ("tests/test_autograd.py",),
    ),
    Mutant(
        "alpha missing in the residual's gradient",
        "normext/layer_norm.py",
        "grad if alpha == 1.0 else grad * alpha",
        "grad",
        "avx512",
        ACCURACY,
    ),
    Mutant(
        "create_graph takes another path",
        "normext/_library.py",
        "        return from_kernel(*tensors)\n",
        "        return from_reference(*tensors)\n",
        "avx512",
        ("tests/test_autograd.py",),
    ),
    Mutant(
        "autocast of rms_norm forgotten",
        "normext/rms_norm.py",
        "_library.AUTOCASTS_RMS_NORM",
        "False",
        "avx512",
        ("tests/test_compile.py",),
    ),
    Mutant(
        "eps of the input type",
        "normext/rms_norm.py",
        "_EPS = {dtype: torch.finfo(torch.float32).eps",
        "_EPS = {dtype: torch.finfo(dtype).eps",
        "avx512",
        EXACT,
    ),
)
