// What lets one source of mathematics serve g++ (CPU kernels, tests) and nvcc (CUDA kernels).
#pragma once

#if defined(__CUDACC__)
#define RNX_HD __host__ __device__ __forceinline__
#else
// always_inline: a CPU kernel compiles the same body once for each instruction set.
#define RNX_HD inline __attribute__((always_inline))
#endif
