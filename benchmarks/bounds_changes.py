"""What bounds.py changes in the sources, by the names of its builds.

no statistics  our kernels without the passes over data that take sums for them: forward, the output is left and the sum with a
               residual; backward, what forms dx, and sums for parameters in the same pass. What merges sums is left, too, and
               prefetches in the passes left out of the channel norms are lost
no kernels     calls, checks, allocations and autograd alone; nobody touches the outputs
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """Replaces the only place of a text in a file."""

    file: str
    find: str
    replace: str


def before(file, find, added):
    return Change(file, find, added + find)


def after(file, find, added):
    return Change(file, find, find + added)


MOMENTS = "csrc/cpu/row_moments.inl"
LAST = "csrc/cpu/channels_last.inl"
PLANES = "csrc/cpu/channel_planes.inl"
PLANES_BACKWARD = "csrc/cpu/channel_planes_backward.inl"

STORE_RESIDUAL = (
    "  if constexpr (kResidual) {\n"
    "    for_units<A>(begin, begin + cols, [&](std::int64_t c, auto extent) { row.take(c, extent); });\n"
    "  }\n"
)

NO_STATISTICS = (
    after(
        MOMENTS,
        "shift_sum(const RowSource<T, kResidual>& row, std::int64_t begin, std::int64_t cols) {\n  using A = Accumulate<T>;\n",
        "  if constexpr (!kResidual) return Vector<A>{};\n",
    ),
    # The pass that is left fetches all of the next row.
    Change("csrc/cpu/row_forward.inl", "constexpr int kShared = Policy::kCentred ? 2 : 1;", "constexpr int kShared = 1;"),
    Change(
        "csrc/cpu/row_passes.inl",
        "constexpr int kShares = kSource == Source::kMemory ? 2 : 0;",
        "constexpr int kShares = kSource == Source::kMemory ? 1 : 0;",
    ),
    # A shift that was not near the mean is not mended.
    before(MOMENTS, "  if (!samples_shift(cols) || __builtin_expect(near_mean(", "  if (cols >= 0) return found;\n"),
    Change(MOMENTS, "__builtin_expect(!all_near<A>(found, n, kRowSlack), 0)", "false"),
    after(
        MOMENTS,
        "                                                Next next) {\n  using A = Accumulate<T>;\n",
        STORE_RESIDUAL + "  if (cols >= 0) return Vector<A>{} + A(1);\n",
    ),
    before(
        MOMENTS,
        "  const Vector<A> one = Vector<A>{} + A(1), centre = Vector<A>{} + shift;\n",
        STORE_RESIDUAL + "  sums_out[0] = sums_out[1] = Vector<A>{} + A(1);\n  if (cols >= 0) return;\n",
    ),
    after(
        "csrc/cpu/row_backward.inl",
        "    const Weight weights = weight();\n    for (int r = 0; r < count; ++r) {\n",
        "      for (int q = 0; q < kSums; ++q) out.of[q][r] = V{};\n      if (count >= 0) continue;\n",
    ),
    after(
        PLANES,
        "    const T* x = static_cast<const T*>(args.input);\n    alignas(V) A sums[3][kMostShortChannels<A>];\n",
        "    for (int q = 0; piece >= 0 && q < 3; ++q) {\n"
        "      A* of = static_cast<A*>(plan.partial) + (q * plan.pieces + piece) * plan.padded + block.first;\n"
        "      for (std::int64_t c = 0; c < block.channels; ++c) of[c] = 1;\n"
        "    }\n"
        "    if (piece >= 0) return;\n",
    ),
    before(
        LAST,
        "  const bool sampled = rows >= kLeastSampledRows;\n",
        "  for (std::int64_t c = columns.begin; c < columns.end; ++c) mean[c] = correction[c] = m2[c] = 1;\n"
        "  if (rows >= 0) return;\n",
    ),
    after(
        PLANES_BACKWARD,
        "    const std::int64_t table = planes * plan.pieces;\n",
        "    if constexpr (!kValues) {\n"
        "      for (std::int64_t i = begin; i < end; ++i) partial[i] = partial[table + i] = 0;\n"
        "      return;\n"
        "    }\n",
    ),
    before(
        PLANES_BACKWARD,
        "    ShortColumns<A> of_columns[2];\n    block.template add_images<2>(begin, end, of_columns,",
        "    for (int q = 0; segment >= 0 && q < 2; ++q) {\n"
        "      A* of = plane_sums + q * planes + segment * channels + block.first;\n"
        "      for (std::int64_t c = 0; c < block.channels; ++c) of[c] = 0;\n"
        "    }\n"
        "    if (segment >= 0) return;\n",
    ),
    before(
        PLANES_BACKWARD,
        "      V lanes[2][kMaxBatch] = {};\n",
        "      for (int q = 0; q < 2; ++q) {\n"
        "        for (int r = 0; r < kMaxBatch; ++r) of_block[q][blocks][r] = 0;\n"
        "      }\n"
        "      if (blocks >= 0) continue;\n",
    ),
    before(
        "csrc/cpu/channels_last_backward.inl",
        "      for_row_groups(smaller(plan.piece, shape.spatial - from), [&](std::int64_t row, int count)",
        "      if constexpr (!kValues) {\n"
        "        for (std::int64_t c = 0; c < channels; ++c) out[c] = out[table + c] = 0;\n"
        "        continue;\n"
        "      }\n",
    ),
    Change("csrc/cpu/channel_norm.cpp", "if (!two_passes || !slow ||", "if (shape.channels >= 0 || !two_passes || !slow ||"),
)

NO_KERNELS = (
    Change("csrc/cpu/isa.cpp", "  kernels().row[static_cast<int>(norm)].forward(args, plan);\n", ""),
    Change("csrc/cpu/isa.cpp", "  kernels().row[static_cast<int>(norm)].backward(args, plan);\n", ""),
    after(
        "csrc/cpu/channel_norm.cpp",
        "\nvoid channel_forward(const ChannelForwardArgs& args, void* workspace, const Parallel& parallel) {\n",
        "  if (args.shape.channels >= 0) return;\n",
    ),
    after(
        "csrc/cpu/channel_norm.cpp",
        "\nvoid channel_backward(const ChannelBackwardArgs& args, void* workspace, const Parallel& parallel) {\n",
        "  if (args.shape.channels >= 0) return;\n",
    ),
)

BUILDS = {"as it is": (), "no kernels": NO_KERNELS, "no statistics": NO_STATISTICS}


def changed(source, changes):
    """The texts of the changed files, by their names in the folder `source`."""
    texts = {change.file: (source / change.file).read_text() for change in changes}
    for change in changes:
        text = texts[change.file]
        assert text.count(change.find) == 1 and change.find != change.replace, change
        texts[change.file] = text.replace(change.find, change.replace)
    return texts
