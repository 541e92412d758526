#include "ops/boxed.h"

#include <string>

namespace normext::ops {
namespace {

// The libraries live as long as the process: ops are never taken back, so exit order does not matter.
struct Libraries {
  TorchLibraryHandle definitions = nullptr;
  TorchLibraryHandle cpu = nullptr;
  TorchLibraryHandle cuda = nullptr;

  Libraries() {
    if (aoti_torch_library_init_fragment("normext", __FILE__, __LINE__, &definitions) != AOTI_TORCH_SUCCESS ||
        aoti_torch_library_init_impl("normext", "CPU", __FILE__, __LINE__, &cpu) != AOTI_TORCH_SUCCESS ||
        aoti_torch_library_init_impl("normext", "CUDA", __FILE__, __LINE__, &cuda) != AOTI_TORCH_SUCCESS) {
      refuse("normext: torch refused to register the operators");
    }
  }
};

}  // namespace

void define(const char* schema, BoxedKernel kernel) {
  static const Libraries libraries;
  const std::string text(schema);
  const std::string name = text.substr(0, text.find('('));
  // The version fixes how arguments are laid out on the stack: ours is that of the oldest torch, whatever we are built with.
  if (aoti_torch_library_def(libraries.definitions, schema) != AOTI_TORCH_SUCCESS ||
      torch_library_impl(libraries.cpu, name.c_str(), kernel, TORCH_TARGET_VERSION) != AOTI_TORCH_SUCCESS ||
      torch_library_impl(libraries.cuda, name.c_str(), kernel, TORCH_TARGET_VERSION) != AOTI_TORCH_SUCCESS) {
    refuse("normext: torch refused to register the operator " + name);
  }
}

}  // namespace normext::ops
