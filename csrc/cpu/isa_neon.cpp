// NEON, which every AArch64 machine has. No flags.
#if defined(__aarch64__)

#define NORMEXT_ISA neon
#define NORMEXT_ISA_NAME "neon"
#define NORMEXT_VECTOR_BYTES 16
#define NORMEXT_HAS_FMA 1

#include "cpu/isa_kernels.inl"

#endif
