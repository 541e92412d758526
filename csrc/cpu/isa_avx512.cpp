// AVX-512 as every such server and desktop part since Skylake-SP has it. Flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma
// -mf16c
#if defined(__x86_64__)

#define NORMEXT_ISA avx512
#define NORMEXT_ISA_NAME "avx512"
#define NORMEXT_VECTOR_BYTES 64
#define NORMEXT_HAS_FMA 1

#include "cpu/isa_kernels.inl"

#endif
