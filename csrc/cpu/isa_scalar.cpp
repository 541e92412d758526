// The baseline every machine of the architecture has. Vectors of 16 bytes, which the compiler maps to what there is.
#define NORMEXT_ISA scalar
#define NORMEXT_ISA_NAME "scalar"
#define NORMEXT_VECTOR_BYTES 16
#define NORMEXT_HAS_FMA 0  // a*b + c: a call to fmaf per lane would be slower than all the rest

#include "cpu/isa_kernels.inl"
