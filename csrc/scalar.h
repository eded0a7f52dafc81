// Element types and the arithmetic that the CPU and the CUDA kernels share.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#else
#define HD inline __attribute__((always_inline))
#endif

namespace auglocal {

// bfloat16 as raw bits: what is computed is always float, converted once on load and once on store.
struct bf16 {
  uint16_t bits;
};

// The type a kernel computes in for tensors of T.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

HD float load(float value) { return value; }
HD double load(double value) { return value; }
HD float load(bf16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

HD void store(float* to, float value) { *to = value; }
HD void store(double* to, double value) { *to = value; }
HD void store(bf16* to, float value) {  // to nearest, ties to even; NaN stays NaN
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(value));
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = uint16_t(value != value ? 0x7fc0u : rounded);
#endif
}

// One rounding on the GPU, two on the CPU; either way the same on every call, which is what lets a
// backward recompute the forward's ReLU mask to the bit.
template <class A>
HD A mul_add(A a, A b, A c) {
#ifdef __CUDA_ARCH__
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace auglocal
