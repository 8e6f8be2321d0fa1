// Static shared memory of a block, by one macro, because the kernels are also compiled without CUDA: there the emulator
// of the tests gives each block arrays of its own, of exactly this size.
//
//   RNX_SHARED(double, sums, 8);   // __shared__ double sums[8]
#pragma once

#if defined(__CUDACC__)
#define RNX_SHARED(type, name, count) __shared__ type name[count]
#else
#define RNX_SHARED(type, name, count) type* const name = emulator::shared_array<type>(__COUNTER__, count)
#endif
