// What the CUDA kernels around BatchNorm share: vectors of values, launches.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <initializer_list>
#include <type_traits>

#include "../ops/op.h"

namespace auglocal {
namespace {

constexpr int kThreads = 256;  // of a block, in every kernel

// A block's arrays, by name; the tests' emulation of CUDA brings its own.
#ifndef SHARED
#define SHARED(name, count, ...) __shared__ __VA_ARGS__ name[count]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// V neighbouring values, moved by one instruction.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T values[V];
  HD T get(int i) const { return values[i]; }
  HD void set(int i, T value) { values[i] = value; }
};

// Narrow values stay in words until they are computed with: single ones would take a register each.
template <class T, class Bits, int V>
struct Words {
  static constexpr int kBits = 8 * sizeof(T), kInWord = 32 / kBits;
  uint32_t words[V / kInWord];
  HD T get(int i) const { return {Bits(words[i / kInWord] >> (i % kInWord * kBits))}; }
  HD void set(int i, T value) {
    Bits bits;
    memcpy(&bits, &value, sizeof(bits));
    const int shift = i % kInWord * kBits;
    const uint32_t others = words[i / kInWord] & ~(uint32_t(Bits(~0u)) << shift);
    words[i / kInWord] = others | uint32_t(bits) << shift;
  }
};
template <>
struct alignas(8) Vector<bf16, 4> : Words<bf16, uint16_t, 4> {};
template <>
struct alignas(16) Vector<bf16, 8> : Words<bf16, uint16_t, 8> {};
template <>
struct alignas(8) Vector<fp16, 4> : Words<fp16, uint16_t, 4> {};
template <>
struct alignas(16) Vector<fp16, 8> : Words<fp16, uint16_t, 8> {};
template <>
struct alignas(4) Vector<uint8_t, 4> : Words<uint8_t, uint8_t, 4> {};
template <>
struct alignas(8) Vector<uint8_t, 8> : Words<uint8_t, uint8_t, 8> {};

template <class A, class T, int V>
__device__ __forceinline__ A get(const Vector<T, V>& vector, int i) {
  return load(vector.get(i));
}
template <class A, class T, int V>
__device__ __forceinline__ void set(Vector<T, V>& vector, int i, A value) {
  T rounded;
  store(&rounded, value);
  vector.set(i, rounded);
}

template <int V, class T>
__device__ __forceinline__ Vector<T, V> read(const T* from) {
  return *reinterpret_cast<const Vector<T, V>*>(from);
}
template <int V, class T>
__device__ __forceinline__ void write(T* to, const Vector<T, V>& vector) {
  *reinterpret_cast<Vector<T, V>*>(to) = vector;
}

__device__ __forceinline__ void add(double2& to, const double2& value) {
  to.x += value.x;
  to.y += value.y;
}

// What is known of the activation when a backward is compiled: most networks have ReLUs, or nothing.
enum class Mask {
  none,
  from_input,   // a ReLU's, recomputed from x
  from_output,  // a ReLU's, read from y
  activation    // no mask, but the derivative of another activation, recomputed from x
};

// Division by a number known at the launch: a multiplication. Right while dividend times divisor stay below
// 2^64, as the pixels of a tensor times those of an image do.
struct WideDivisor {
  uint64_t magic;
  explicit WideDivisor(int64_t by) : magic(by > 1 ? ~uint64_t(0) / by + 1 : 0) {}
  __device__ int64_t quotient(int64_t value) const { return magic ? int64_t(__umul64hi(value, magic)) : value; }
};

inline bool aligned(std::initializer_list<const void*> tensors, size_t bytes) {
  bool all = true;
  for (const void* tensor : tensors) all &= reinterpret_cast<uintptr_t>(tensor) % bytes == 0;
  return all;
}

// The widest vector. float64 is there for checking and does without.
template <class T>
constexpr int kWide = sizeof(T) == 8 ? 1 : 16 / sizeof(T);

// Calls run(vector width) as a constant: the widest vector, of kMost values at most, that divides `extent` and at whose
// multiples all tensors begin.
template <class T, int kMost = kWide<T>, class Run>
void with_width(int64_t extent, std::initializer_list<const void*> tensors, const Run& run) {
  const auto fits = [&](int width) { return extent % width == 0 && aligned(tensors, width * sizeof(T)); };
  constexpr int kHalf = kWide<T> == 8 ? 4 : 1;
  if (fits(kMost)) return run(std::integral_constant<int, kMost>{});
  if (fits(kHalf)) return run(std::integral_constant<int, kHalf>{});
  run(std::integral_constant<int, 1>{});
}

// What a call of an op needs besides kernels: see ops/op.h. Kernels run on the device of x.
class Cuda {
 public:
  explicit Cuda(const Tensor& x) : x_(x), guard_(x.get_device_index()) {}

  // x where vectors of any width may read it.
  static Tensor for_any_vector(const Tensor& x) {
    return aligned({x.const_data_ptr()}, 16) ? x : torch::stable::clone(x);
  }
  Tensor workspace(int64_t bytes) const {
    return torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, x_.device());
  }
  // Launches blocks of kThreads.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, const Arguments&... arguments) const {
    cudaLaunchConfig_t config = launch_config(blocks);
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
  }
  cudaLaunchConfig_t launch_config(int64_t blocks) const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x_.get_device_index(), &stream));
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(kThreads);
    config.stream = static_cast<cudaStream_t>(stream);
    return config;
  }

 private:
  const Tensor& x_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace
}  // namespace auglocal
