// AVX-512 as every such server and desktop part since Skylake-SP has it. Flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma
// -mf16c
#if defined(__x86_64__)

#define NORMEXT_ISA avx512
#define NORMEXT_ISA_NAME "avx512"
#define NORMEXT_VECTOR_BYTES 64
#define NORMEXT_HAS_FMA 1

// avx512_bf16's conversion, by name, since this file is compiled without it. The tests have one for processors with AVX2 alone.
#ifndef NORMEXT_CVTNE2PS2BF16
#define NORMEXT_CVTNE2PS2BF16(words, low, high) asm volatile("vcvtne2ps2bf16 %1, %2, %0" : "=v"(words) : "v"(low), "v"(high))
#endif

#include "cpu/isa_kernels.inl"

#endif
