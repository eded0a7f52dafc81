// CUDA on the CPU, for tests: with this folder first among the include paths, the very .cu files compile as C++.
//
// The compiler is told to sanitize threads, alignment, shifts, bounds and integer overflow. That makes it call a
// function before every access to memory; machine.cpp defines these functions itself, and so sees every read and write
// of a kernel without a word in the kernel's source. It runs a fiber for each thread, in an order drawn from a seed,
// and stops at what a GPU would punish or, worse, would not: see there.
#pragma once

#include <math.h>

#include <cstdint>
#include <tuple>

// ---- the language ----------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulation {

struct Index {
  unsigned x, y, z;
};
[[gnu::const]] Index thread_index();
[[gnu::const]] Index block_index();

// A block's memory for one declaration; the address of `site` says for which.
void* shared(const void* site, int64_t bytes);
void* dynamic_shared();

void barrier();
bool barrier_or(bool vote);
double shuffle_xor(double value, int apart);
void fence();
void sleep();
void grid_arrive();
void grid_wait();
unsigned add_atomically(unsigned* to, unsigned value);
void read_past_l1(const void* from, int64_t bytes, void* to);

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())

#define SHARED(name, count, ...)     \
  static const char name##_site = 0; \
  auto* const name = static_cast<__VA_ARGS__*>(emulation::shared(&name##_site, sizeof(__VA_ARGS__) * (count)))
#define DYNAMIC_SHARED(name) auto* const name = static_cast<unsigned char*>(emulation::dynamic_shared())

struct alignas(16) double2 {
  double x, y;
};

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline int64_t min(int64_t a, int64_t b) { return b < a ? b : a; }
inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)a * b >> 64); }

inline void __syncthreads() { emulation::barrier(); }
inline int __syncthreads_or(int vote) { return emulation::barrier_or(vote != 0); }
inline double __shfl_xor_sync(unsigned, double value, int apart) { return emulation::shuffle_xor(value, apart); }
inline void __threadfence() { emulation::fence(); }
inline void __nanosleep(unsigned) { emulation::sleep(); }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return emulation::add_atomically(to, value); }
template <class T>
T __ldcg(const T* from) {
  T value;
  emulation::read_past_l1(from, sizeof(T), &value);
  return value;
}

// ---- the runtime -----------------------------------------------------------------------------------

using cudaError_t = int;
using cudaStream_t = struct Stream*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrCooperativeLaunch,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
constexpr int cudaSharedmemCarveoutMaxShared = 100;
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute name, int value);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, size_t shared);

namespace emulation {
// Calls run(arguments) once for every thread of the grid.
void launch(const cudaLaunchConfig_t& config, const void* kernel, const char* name, void (*run)(const void*),
            const void* arguments, int64_t bytes);
}  // namespace emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Call call{kernel, {arguments...}};
  const auto run = [](const void* given) {
    const Call& call = *static_cast<const Call*>(given);
    std::apply(call.kernel, call.arguments);
  };
  emulation::launch(*config, reinterpret_cast<const void*>(kernel), __PRETTY_FUNCTION__, run, &call, sizeof(call));
  return 0;
}

// ---- torch -----------------------------------------------------------------------------------------

#ifdef TORCH_TARGET_VERSION
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

// There is one emulated device at a time, and nothing to guard.
namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard NoGuard

inline int aoti_torch_get_current_cuda_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}
// What STD_CUDA_CHECK calls: errors have been thrown by then.
inline void torch_c10_cuda_check_msg(int, const char*, const char*, unsigned, bool, char**) {}
inline void torch_c10_cuda_free_error_msg(char*) {}

// The ops are registered for CPU tensors, under a name of their own.
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(auglocal_emulated, CPU, m, C10_UID)
#endif
