// The Python module. Importing it loads the library that registers the ops (by its static initialisers); what it exposes itself
// handles no tensors. No torch header here: torch 2.10's bundled pybind11 refuses to compile under TORCH_TARGET_VERSION.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "core/dtypes.h"
#include "core/error.h"
#include "cpu/isa.h"
#include "cuda/tuning.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = std::string(NORMEXT_VERSION);
  info["cuda"] = bool(NORMEXT_WITH_CUDA);
  info["cuda_archs"] = std::string(NORMEXT_WITH_CUDA ? NORMEXT_CUDA_ARCHS : "");
  info["emulated"] = bool(NORMEXT_EMULATED);
  info["cpu_isas"] = normext::cpu::available_isas();
  info["cpu_isa"] = std::string(normext::cpu::isa_name());
  info["compiler"] = std::string(__VERSION__);
  return info;
}

using normext::Direction;
using normext::RowTree;
using normext::cuda::RowMapping;
using normext::cuda::RowTier;

constexpr const char* kTiers[] = {"registers", "shared", "split"};

RowMapping to_mapping(const py::dict& wanted) {
  RowMapping mapping;
  for (const auto& [key, value] : wanted) {
    const auto name = key.cast<std::string>();
    if (name == "tier") {
      const auto tier = value.cast<std::string>();
      int index = 0;
      while (index < 3 && tier != kTiers[index]) ++index;
      if (index == 3) normext::fail("plan: expected tier registers, shared or split, got " + tier);
      mapping.tier = static_cast<RowTier>(index);
    } else if (name == "warps") {
      mapping.warps = value.cast<int>();
    } else if (name == "rows_at_once") {
      mapping.rows_at_once = value.cast<int>();
    } else if (name == "blocks_per_row") {
      mapping.blocks_per_row = value.cast<int>();
    } else if (name == "repeats") {
      mapping.repeats = value.cast<int>();
    } else {
      normext::fail("plan: expected tier, warps, rows_at_once, blocks_per_row or repeats in override, got " + name);
    }
  }
  return mapping;
}

normext::DType to_dtype(const std::string& name) {
  if (name == "float32") return normext::DType::kFloat32;
  if (name == "float16") return normext::DType::kFloat16;
  if (name == "bfloat16") return normext::DType::kBFloat16;
  if (name == "float64") return normext::DType::kFloat64;
  normext::fail("plan: expected dtype float32, float16, bfloat16 or float64, got " + name);
}

py::dict plan(const std::string& direction_name, const std::string& dtype, std::int64_t rows, std::int64_t cols, int arch,
              const std::optional<py::dict>& override_mapping) {
  if (direction_name != "forward" && direction_name != "backward") {
    normext::fail("plan: expected direction forward or backward, got " + direction_name);
  }
  if (rows < 0 || cols < 1) normext::fail("plan: expected rows >= 0 and cols >= 1");
  const Direction direction = direction_name == "forward" ? Direction::kForward : Direction::kBackward;
  const int element_size = static_cast<int>(normext::size_of(to_dtype(dtype)));
  const RowTree tree = normext::row_tree(direction, cols, element_size);
  const auto device = normext::cuda::device_of_arch(arch);
  auto& overrides = normext::cuda::row_overrides();
  auto& forced = direction == Direction::kForward ? overrides.forward : overrides.backward;
  if (override_mapping && override_mapping->empty()) {
    forced.reset();
  } else if (override_mapping) {
    const RowMapping mapping = to_mapping(*override_mapping);
    const std::string error = normext::cuda::mapping_error(direction, tree, mapping, element_size, device);
    if (!error.empty()) normext::fail("plan: " + error);
    forced = mapping;
  }
  const RowMapping mapping = forced                             ? *forced
                             : direction == Direction::kForward ? normext::cuda::forward_mapping(tree, rows, element_size, device)
                                                                : normext::cuda::backward_mapping(tree, rows, element_size, device);
  py::dict result;
  result["vector"] = tree.vector;
  result["lanes"] = tree.lanes;
  result["slots"] = tree.slots;
  result["segments"] = tree.segments;
  result["segment_cols"] = tree.segment_cols();
  result["runs"] = normext::cuda::row_runs(rows);
  result["tier"] = kTiers[static_cast<int>(mapping.tier)];
  result["warps"] = mapping.warps;
  result["rows_at_once"] = mapping.rows_at_once;
  result["blocks_per_row"] = mapping.blocks_per_row;
  result["repeats"] = mapping.repeats;
  return result;
}

constexpr const char* kPlanDoc =
    R"(The reduction tree and the thread mapping of a row norm on CUDA, for tests and tuning only.

Args: direction "forward" or "backward"; dtype of the row; rows and cols of the problem; arch, for example 90.
override: a mapping {tier, warps, rows_at_once, blocks_per_row, repeats} that all later calls of that direction use, in the whole
process, until an empty dict takes it back. It must be legal for every shape it is used on; it is checked for this one only.)";

}  // namespace

#if NORMEXT_EMULATED
PYBIND11_MODULE(_C_emulated, module) {
#else
PYBIND11_MODULE(_C, module) {
#endif
  module.def("plan", &plan, py::arg("direction"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("arch") = 90,
             py::arg("override") = py::none(), kPlanDoc);
  module.def("build_info", &build_info, "What this library was built with, and what it chose on this machine.");
}
