// Kernels that do what a kernel must not do, and one that does it right: what the emulator has to notice
// (test_emulator.py).
#include <cstring>
#include <string>

#include "common/cuda.cuh"

// Not in a namespace without a name, in which `extern __shared__` would declare a variable of this file
// alone.
namespace adaptcomp {

// What every thread hands to the thread of the same place in the next warp.
__device__ float mine() { return static_cast<float>(threadIdx.x); }
__device__ unsigned next_warp() { return (threadIdx.x + 32) % kThreads; }

template <bool kBarrier>
__global__ void exchange(float* out) {
  __shared__ float slots[kThreads];
  slots[threadIdx.x] = mine();
  if (kBarrier) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = slots[next_warp()];
}

__global__ void exchange_in_warp(float* out) {
  __shared__ float slots[kThreads];
  slots[threadIdx.x] = mine();
  out[threadIdx.x] = slots[threadIdx.x ^ 1];
}

__global__ void leaves_early(float* out) {
  if (threadIdx.x == 77) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void half_a_mask(float* out) { out[threadIdx.x] = __shfl_sync(0xffffu, mine(), 0); }

__global__ void different_calls(float* out) {
  if (threadIdx.x < 128) {
    __syncthreads();
  } else {
    __syncthreads();  // another place: compilers do make two barriers of it
  }
  out[threadIdx.x] = 0;
}

__global__ void different_operations(float* out) {
  int votes = 0;
  if (threadIdx.x % 32 < 16) {
    votes = static_cast<int>(__ballot_sync(~0u, 1));
  } else {
    votes = __all_sync(~0u, 1);
  }
  out[threadIdx.x] = static_cast<float>(votes);
}

__global__ void warp_and_block(float* out) {
  if (threadIdx.x == 3) __syncthreads();
  __syncwarp();
  out[threadIdx.x] = 0;
}

// What a block finds before anybody has written: the second block must not find what the first one left.
__global__ void reads_static(float* out) {
  __shared__ float slots[kThreads];
  out[blockIdx.x * kThreads + threadIdx.x] = slots[threadIdx.x];
  slots[threadIdx.x] = 1;
}
__global__ void reads_dynamic(float* out) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto* slots = reinterpret_cast<float*>(shared_memory);
  out[blockIdx.x * kThreads + threadIdx.x] = slots[threadIdx.x];
  slots[threadIdx.x] = 1;
}

__global__ void writes_past_the_end(float* out) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  reinterpret_cast<float*>(shared_memory)[threadIdx.x + 1] = mine();
  out[threadIdx.x] = 0;
}

struct Case {
  const char* name;
  void (*kernel)(float*);
};
constexpr Case kCases[] = {
    {"exchange", exchange<true>},
    {"exchange without a barrier", exchange<false>},
    {"exchange in a warp", exchange_in_warp},
    {"leaves early", leaves_early},
    {"half a mask", half_a_mask},
    {"different calls", different_calls},
    {"different operations", different_operations},
    {"warp and block", warp_and_block},
    {"reads static", reads_static},
    {"reads dynamic", reads_dynamic},
    {"writes past the end", writes_past_the_end},
};

}  // namespace adaptcomp

// Runs the case of that name in `blocks` blocks with shared memory for one float per thread, in the order of
// that number. Returns what went wrong, empty if nothing did. `out`: float [blocks, kThreads].
extern "C" __attribute__((visibility("default"))) const char* emulator_check(const char* name, int64_t blocks,
                                                                             int order, float* out) {
  static std::string wrong;
  wrong = "no such case";
  emulation::settings().order = static_cast<emulation::Order>(order);
  for (const auto& c : adaptcomp::kCases) {
    if (std::strcmp(c.name, name) != 0) continue;
    wrong.clear();
    try {
      adaptcomp::launch_shared(name, c.kernel, blocks, adaptcomp::kThreads * int64_t{sizeof(float)}, nullptr,
                               out);
    } catch (const std::exception& error) {
      wrong = error.what();
    }
  }
  return wrong.c_str();
}
