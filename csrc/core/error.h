// The one way kernel code reports a failure that has a cause outside it: a sentence, as std::runtime_error.
#pragma once

#include <stdexcept>
#include <string>

namespace normext {

[[noreturn]] inline void fail(const std::string& sentence) { throw std::runtime_error(sentence); }

}  // namespace normext
