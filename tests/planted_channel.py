"""The bugs that mutants.py plants in the channel norms; planted.py has the others."""

from planted import Mutant

CHANNEL = "csrc/norms/channel_norm.h"
CHANNEL_ACCURACY = ("tests/test_channel_accuracy.py",)
CHANNEL_INVARIANCE = ("tests/test_channel_invariance.py",)
RUNNING = ("tests/test_channel_running.py",)
SYNC = ("tests/test_sync_batch_norm.py",)

MUTANTS = (
    Mutant(
        "running variance biased",
        CHANNEL,
        "return m2 / (n > A(1) ? n - A(1) : A(1));",
        "return m2 / n;",
        "avx2",
        RUNNING,
    ),
    Mutant(
        "momentum of the other convention",
        CHANNEL,
        "fma<V>(momentum, found, (1.0f - momentum) * old)",
        "fma<V>(1.0f - momentum, found, momentum * old)",
        "avx2",
        RUNNING,
    ),
    Mutant(
        "training step that normalises by running statistics",
        "csrc/ops/channel_norm.cpp",
        "request.running_mean != nullptr && !request.training",
        "request.running_mean != nullptr",
        "avx2",
        RUNNING,
    ),
    Mutant(
        "16-bit rows woven in the wrong place",
        "csrc/cpu/transpose.inl",
        "load_bytes<Half>(x + cols)",
        "load_bytes<Half>(x + cols - 1)",
        "avx2",
        ("tests/test_format.py",),
    ),
    Mutant("batches not counted", "csrc/cpu/channel_running.inl", "args.batches == nullptr ?", "true ?", "avx2", RUNNING),
    Mutant(
        "empty batch teaches running statistics",
        "csrc/ops/batch_norm.cpp",
        "if (forward.running_mean != nullptr && !input.is_empty()) {",
        "if (forward.running_mean != nullptr) {",
        "avx2",
        RUNNING,
    ),
    Mutant(
        "empty batch teaches running statistics in a graph",
        "normext/_channel.py",
        "running_var is None or input.numel() == 0:",
        "running_var is None:",
        "avx512",
        ("tests/test_channel_compile.py",),
    ),
    Mutant(
        "one value per channel accepted",
        "normext/_channel.py",
        "return input.numel() == input.shape[1] and",
        "return False and",
        "avx2",
        RUNNING,
    ),
    Mutant(
        "derivative of silu without its second term",
        "csrc/norms/activation.h",
        "fma<V>(z, l.e * l.s, V{} + 1.0f)",
        "(V{} + 1.0f)",
        "emulated",
        CHANNEL_ACCURACY,
    ),
    Mutant(
        "residual forgotten in the backward",
        "csrc/cpu/channel_planes_backward.inl",
        "if (residual[0] != nullptr) {",
        "if (false) {",
        "avx2",
        CHANNEL_ACCURACY,
    ),
    Mutant(
        "gradient of evaluation as in training",
        "csrc/cpu/channel_sums.inl",
        "return args.fixed_stats || args.grad_input == nullptr;",
        "return args.grad_input == nullptr;",
        "avx2",
        CHANNEL_ACCURACY,
    ),
    Mutant(
        "gradient of training as in evaluation, in the pass that sums",
        "csrc/cpu/channel_sums.inl",
        "return wants_values(args) && !(wants_sums(args) && values_need_no_sums(args));",
        "return wants_values(args) && !wants_sums(args);",
        "avx2",
        CHANNEL_ACCURACY,
    ),
    Mutant(
        "runs of an image depend on the batch",
        "csrc/cpu/channel_norm.cpp",
        "std::clamp(shape.spatial / kRunsOfImage,",
        "std::clamp(shape.batch * shape.spatial / kRunsOfImage,",
        "avx2",
        CHANNEL_INVARIANCE,
    ),
    Mutant(
        "last segment of a slab counted whole",
        "csrc/cuda/channel_plan.h",
        "return s + 1 < segments ? segment : slab_size - s * segment;",
        "return segment;",
        "emulated",
        CHANNEL_ACCURACY,
    ),
    Mutant(
        "statistics of a slab read before they are written",
        "csrc/cuda/channel_planes.cuh",
        "  block_barrier();\n  return {shared[0]",
        "  return {shared[0]",
        "emulated",
        CHANNEL_ACCURACY,
    ),
    Mutant(
        "ranks merged without their counts",
        "csrc/cpu/channel_norm.cpp",
        "n.push_back(static_cast<A>(count));",
        "n.push_back(A(1));",
        "avx2",
        SYNC,
    ),
    Mutant(
        "parameter gradients of all ranks",
        "normext/sync_batch_norm.py",
        "copy=True",
        "copy=False",
        "avx2",
        SYNC,
    ),
)
