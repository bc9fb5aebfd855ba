// What the kernels use of CUDA's language and runtime, on the host (emulator.h), and nothing more: a kernel
// that uses something new does not compile until it is here.
#pragma once

// Some of the standard library's headers use __noinline__ as the name of an attribute: they come before its
// definition below.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "emulator.h"

// --- words of the language

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
// Every block's own: emulator.cpp finds the variables by this storage class, which nothing else in a CUDA
// file has.
#define __shared__ thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
// Of the running fiber. No two launches run at the same time, so these need not belong to a system thread.
extern dim3 threadIdx, blockIdx, gridDim;

// --- operations of a warp and of a block. The last two arguments are the place of the call.

#define EMULATION_CALL(name) \
  emulation::Call { name, file, line }
#define EMULATION_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_PLACE) { emulation::meet_block(EMULATION_CALL("__syncthreads"), 0); }
inline int __syncthreads_or(int x, EMULATION_PLACE) {
  return emulation::meet_block(EMULATION_CALL("__syncthreads_or"), x != 0) != 0;
}
inline int __syncthreads_count(int x, EMULATION_PLACE) {
  return static_cast<int>(emulation::meet_block(EMULATION_CALL("__syncthreads_count"), x != 0));
}

inline void __syncwarp(unsigned mask = ~0u, EMULATION_PLACE) {
  emulation::meet_warp(EMULATION_CALL("__syncwarp"), mask, nullptr, 0);
}
inline unsigned __ballot_sync(unsigned mask, int x, EMULATION_PLACE) {
  const unsigned char bit = x != 0;
  const auto votes = emulation::meet_warp(EMULATION_CALL("__ballot_sync"), mask, &bit, 1);
  unsigned all = 0;
  for (unsigned l = 0; l < emulation::kWarpSize; ++l) all |= static_cast<unsigned>(votes[l][0]) << l;
  return all;
}
inline int __all_sync(unsigned mask, int x, EMULATION_PLACE) {
  const unsigned char bit = x != 0;
  const auto votes = emulation::meet_warp(EMULATION_CALL("__all_sync"), mask, &bit, 1);
  bool all = true;
  for (unsigned l = 0; l < emulation::kWarpSize; ++l) all &= votes[l][0] != 0;
  return all;
}

namespace emulation {
// The value of another lane; its own where that lane lies outside the segment.
template <class T>
T shuffle(const Call& call, unsigned mask, T x, int from, bool inside) {
  static_assert(sizeof(T) <= 16);
  const LaneValues values = meet_warp(call, mask, &x, sizeof(T));
  if (inside) std::memcpy(&x, values[from], sizeof(T));
  return x;
}
}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T x, int from, int width = 32, EMULATION_PLACE) {
  const int own = static_cast<int>(emulation::lane());
  return emulation::shuffle(EMULATION_CALL("__shfl_sync"), mask, x, own / width * width + from % width, true);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int with, int width = 32, EMULATION_PLACE) {
  const int own = static_cast<int>(emulation::lane()), other = own ^ with;
  return emulation::shuffle(EMULATION_CALL("__shfl_xor_sync"), mask, x, other, other / width <= own / width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32, EMULATION_PLACE) {
  const int own = static_cast<int>(emulation::lane()), other = own + static_cast<int>(by);
  return emulation::shuffle(EMULATION_CALL("__shfl_down_sync"), mask, x, other, other / width == own / width);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline uint32_t __float_as_uint(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline long long __double_as_longlong(double x) {
  long long u;
  std::memcpy(&u, &x, 8);
  return u;
}
// Fibers give way at meetings only, so a plain addition is atomic.
template <class T>
T atomicAdd(T* p, T x) {
  const T before = *p;
  *p += x;
  return before;
}

// --- the runtime

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulation {
// An error of the call that is running, which cudaGetErrorString then describes.
cudaError_t fail(const std::string& what);
}  // namespace emulation

const char* cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device);
template <class K>
cudaError_t cudaFuncSetAttribute(K*, cudaFuncAttribute, int bytes) {
  return bytes <= emulation::settings().shared_memory ? cudaSuccess : cudaErrorInvalidValue;
}
template <class K>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, K*, int, size_t) {
  *blocks = emulation::settings().resident_blocks;
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  const std::tuple<P...> parameters(static_cast<P>(arguments)...);  // copied, as a launch does
  const std::string wrong = emulation::launch(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
                                              [&] { std::apply(kernel, parameters); });
  return wrong.empty() ? cudaSuccess : emulation::fail(wrong);
}
