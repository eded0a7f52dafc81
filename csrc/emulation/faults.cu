// Kernels that do what the machine has to stop, a case each; tests ask for them by number. The first cases are right.
#include <cstring>
#include <exception>

#include "cooperative_groups.h"

namespace {

struct alignas(16) Four {
  float values[4];
};

__global__ void kernel(int fault, float* data, int n, unsigned* counters, int zero) {
  SHARED(shared, 64, float);
  const int thread = threadIdx.x, next = (thread + 1) % 64, block = blockIdx.x;
  const auto neighbour = [&](bool barrier) {
    shared[thread] = float(thread);
    if (barrier) __syncthreads();
    return shared[next];
  };
  // Block 0 tells block 1 a number, with or without what that takes.
  const auto told = [&](bool behind_barrier, bool release, bool acquire, bool past_l1) {
    if (block == 0) {
      if (thread == 1) data[0] = 7;
      if (behind_barrier) __syncthreads();
      if (thread == 0) {
        if (release) __threadfence();
        atomicAdd(&counters[0], 1);
      }
      return 7.0f;
    }
    if (thread == 0) {
      while (*const_cast<volatile unsigned*>(&counters[0]) == 0) __nanosleep(20);
      if (acquire) __threadfence();
    }
    __syncthreads();
    return past_l1 ? __ldcg(&data[0]) : data[0];
  };
  float out = 0;
  switch (fault) {
    case 0: out = neighbour(true); break;
    case 1: out = told(true, true, true, true); break;
    case 2: out = shared[thread]; break;  // what no one wrote: NaN
    case 10: out = neighbour(false); break;
    case 11:
      out = neighbour(true);
      shared[thread] = 0;
      break;
    case 12: data[thread / 2] = 1; break;
    case 13:
      data[block * 64 + thread] = 1;
      out = data[block * 64 + next];
      break;
    case 14: data[thread] = 1; break;  // of both blocks
    case 20: out = data[n]; break;
    case 21: data[n] = 0; break;
    case 22: out = data[-2000000]; break;
    case 23: out = shared[64 + thread]; break;
    case 24: out = reinterpret_cast<Four*>(data + 1)->values[3]; break;
    case 30:
      if (thread == 5)
        __syncthreads_or(1);
      else
        __syncthreads();
      break;
    case 31:
      if (thread < 63) __syncthreads();
      break;
    case 32: out = float(__shfl_xor_sync(~0u, 1.0, thread == 5 ? 2 : 1)); break;
    case 33:
      if (thread != 5) out = float(__shfl_xor_sync(~0u, 1.0, 1));
      break;
    case 34:
      while (*const_cast<volatile unsigned*>(&counters[0]) == 0) __nanosleep(20);
      break;
    case 40: out = told(false, true, true, true); break;
    case 41: out = told(true, false, true, true); break;
    case 42: out = told(true, true, false, true); break;
    case 43: out = told(true, true, true, false); break;
    case 44:
      if (block == 0) counters[0] = 0;
      atomicAdd(&counters[0], 1);
      break;
    case 50: cooperative_groups::this_grid().barrier_arrive(); break;
    case 53: {
      SHARED(large, 4000, float);
      large[thread] = 0;
      break;
    }
    case 60: out = float((0x7fffffff - zero) + thread); break;
    case 61: out = float(thread / zero); break;
    case 62: out = float(1 << (thread + zero)); break;
    default: break;
  }
  if (fault < 10 || out == -1234.5f) data[2 + block * 64 + thread] = out;
}

}  // namespace

// What the machine says of a case, empty if nothing. data: n floats; counters: two, zero.
extern "C" __attribute__((visibility("default"))) void emulation_fault(int fault, float* data, int n,
                                                                       unsigned* counters, char* said, int room) {
  cudaLaunchAttribute together{cudaLaunchAttributeCooperative, {fault != 50}};
  cudaLaunchConfig_t config;
  config.gridDim = dim3(fault == 51 ? 1000 : fault == 54 ? 0 : 2);
  config.blockDim = dim3(fault == 55 ? 2048 : 64);
  config.dynamicSmemBytes = fault == 52 ? 200 << 10 : 0;
  config.attrs = &together;
  config.numAttrs = 1;
  *said = 0;
  try {
    cudaLaunchKernelEx(&config, kernel, fault, data, n, counters, 0);
  } catch (const std::exception& stopped) {
    strncpy(said, stopped.what(), size_t(room) - 1);
  }
}
