// The Python module. Importing it loads the library that registers the ops (by its static initialisers); what it exposes itself
// handles no tensors. No torch header here: torch 2.10's bundled pybind11 refuses to compile under TORCH_TARGET_VERSION.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/isa.h"

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

}  // namespace

#if NORMEXT_EMULATED
PYBIND11_MODULE(_C_emulated, module) {
#else
PYBIND11_MODULE(_C, module) {
#endif
  module.def("build_info", &build_info, "What this library was built with, and what it chose on this machine.");
}
