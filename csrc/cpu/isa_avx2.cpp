// AVX2 with FMA and F16C. Flags: -mavx2 -mfma -mf16c, and of GCC -mmove-max=256 -mstore-max=256
#if defined(__x86_64__)

#define NORMEXT_ISA avx2
#define NORMEXT_ISA_NAME "avx2"
#define NORMEXT_VECTOR_BYTES 32
#define NORMEXT_HAS_FMA 1

#include "cpu/isa_kernels.inl"

#endif
