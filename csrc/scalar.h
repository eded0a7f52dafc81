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

// bfloat16 and float16 as raw bits: what is computed is always float, converted once on load and once on store.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
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

// float16 to float and back by whole numbers, as loops over it vectorise on any CPU and no mode that flushes subnormal
// numbers matters. Bits, Float: uint32_t and float, or vectors of them; the float16 is in the low halves.
template <class Float, class Bits>
HD Float from_fp16(Bits bits) {
  const Bits rest = (bits & 0x7fffu) << 13, normal = rest + (112u << 23);
  const Bits raised = normal + (1u << 23);
  Float small;  // of a subnormal number: 2^-14 with its digits behind, less 2^-14
  memcpy(&small, &raised, sizeof(small));
  small = small - 0x1p-14f;
  Bits subnormal;
  memcpy(&subnormal, &small, sizeof(small));
  const Bits finite = rest < (1u << 23) ? subnormal : normal;
  const Bits all = (rest >= (31u << 23) ? normal + (112u << 23) : finite) | (bits & 0x8000u) << 16;
  Float result;
  memcpy(&result, &all, sizeof(result));
  return result;
}
template <class Bits, class Float>
HD Bits to_fp16(Float value) {  // to nearest, ties to even; NaN stays NaN
  Bits bits;
  memcpy(&bits, &value, sizeof(bits));
  const Bits sign = bits & 0x80000000u, rest = bits ^ sign;
  Float small;  // of what becomes subnormal: added to 0.5, whose last digit is the least float16
  memcpy(&small, &rest, sizeof(small));
  small = small + 0.5f;
  Bits subnormal;
  memcpy(&subnormal, &small, sizeof(small));
  const Bits normal = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  const Bits finite = rest < (113u << 23) ? subnormal - (126u << 23) : normal;
  const Bits infinite = rest > (255u << 23) ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  return (rest >= (143u << 23) ? infinite : finite) | sign >> 16;
}

HD float load(float value) { return value; }
HD double load(double value) { return value; }
HD float load(bf16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

HD float load(fp16 value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  return from_fp16<float>(uint32_t(value.bits));
#endif
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

HD void store(fp16* to, float value) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(value));
#else
  to->bits = uint16_t(to_fp16<uint32_t>(value));
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
