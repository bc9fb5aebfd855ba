// Helpers of all CUDA files: launches that report their errors, a device guard, wide memory accesses, and the
// group of threads that works on one row.
//
// One group of G threads works on one row, so that no group waits for another, and a row's arithmetic never
// reads its neighbours. The distribution of a row's elements over the threads depends on the row's length
// only, not on its place in the batch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/dtype.h"

namespace adaptcomp {

inline void cuda_check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // cleared, so that no later check reports the error again
  throw std::runtime_error(std::string("adaptcomp_ext: ") + what +
                           " failed on the CUDA device: " + cudaGetErrorString(error));
}

// Makes `device` current for its lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int64_t device) : device_(static_cast<int>(device)) {
    cuda_check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device_) cuda_check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, previous_ = 0;
};

constexpr int kThreads = 256;  // per block

// Starts `kernel` on `blocks` blocks of kThreads, each with `shared` bytes of dynamic shared memory. The
// checked error is that of the launch, not one that an earlier call has left.
template <class... P, class... A>
void launch_shared(const char* name, void (*kernel)(P...), int64_t blocks, int64_t shared, void* stream,
                   const A&... args) {
  if (blocks <= 0) return;
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string("adaptcomp_ext: ") + name + " has more rows than one launch takes");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cuda_check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...), name);
}
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), int64_t blocks, void* stream, const A&... args) {
  launch_shared(name, kernel, blocks, 0, stream, args...);
}

inline int64_t blocks_for(int64_t items, int64_t per_block) { return (items + per_block - 1) / per_block; }

// `dispatch` of common/dtype.h, on the device.
template <class F>
__device__ __forceinline__ void device_dispatch(DType t, const F& f) {
  switch (t) {
    case DType::f32: f(static_cast<float*>(nullptr)); break;
    case DType::f64: f(static_cast<double*>(nullptr)); break;
    case DType::bf16: f(static_cast<bfloat16*>(nullptr)); break;
    case DType::f16: f(static_cast<float16*>(nullptr)); break;
    case DType::opaque: break;
  }
}

// --- memory

// E neighbouring elements that are read and written in accesses of up to 16 bytes.
template <class T, int E>
struct alignas(E * sizeof(T) < 16 ? E * sizeof(T) : 16) Pack {
  T v[E];
};

inline __host__ __device__ uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// The widest access, 1 to 16 bytes, to which all addresses and lengths or'ed into `bits` are aligned.
inline __host__ __device__ int access_bytes(uintptr_t bits) {
  bits |= 16;
  return static_cast<int>(bits & (~bits + 1));
}

// Calls f with a null pointer to the unsigned word of `bytes` bytes, 1 to 16.
template <class F>
__device__ __forceinline__ void dispatch_word(int bytes, const F& f) {
  switch (bytes) {
    case 16: f(static_cast<uint4*>(nullptr)); break;
    case 8: f(static_cast<uint2*>(nullptr)); break;
    case 4: f(static_cast<uint32_t*>(nullptr)); break;
    case 2: f(static_cast<uint16_t*>(nullptr)); break;
    default: f(static_cast<uint8_t*>(nullptr)); break;
  }
}

// Calls f with the number of elements of T per access, as a constant: those of 16 bytes, of 4 bytes, or one.
template <class T, class F>
__device__ __forceinline__ void dispatch_elements(int bytes, const F& f) {
  constexpr int size = sizeof(T);
  if (bytes == 16) {
    f(std::integral_constant<int, 16 / size>());
  } else if (size < 4 && bytes >= 4) {
    f(std::integral_constant<int, (size < 4 ? 4 / size : 1)>());
  } else {
    f(std::integral_constant<int, 1>());
  }
}

// to[0..bytes) = from[0..bytes), or zero if `from` is null, by the G threads of a row. It is not inlined: a
// call per row costs little beside the memory traffic, and its ten loops would bloat every kernel.
template <int G>
__device__ __noinline__ void move_row(void* to, const void* from, int64_t bytes, int lane) {
  dispatch_word(access_bytes(address(to) | address(from) | static_cast<uintptr_t>(bytes)), [&](auto* word) {
    using Word = std::remove_pointer_t<decltype(word)>;
    const int64_t n = bytes / static_cast<int64_t>(sizeof(Word));
    auto* __restrict__ out = static_cast<Word*>(to);
    if (from) {
      const auto* __restrict__ in = static_cast<const Word*>(from);
#pragma unroll 4
      for (int64_t k = lane; k < n; k += G) out[k] = in[k];
    } else {
#pragma unroll 4
      for (int64_t k = lane; k < n; k += G) out[k] = Word{};
    }
  });
}

// --- the threads of a row

// G threads: a part of a warp, a warp, or a block. Every thread of the block has to reach each collective
// call.
template <int G>
struct Group {
  static_assert(G <= 32 ? 32 % G == 0 : G == kThreads);
  static constexpr int64_t kRows = kThreads / G;  // per block

  static __device__ int lane() { return static_cast<int>(threadIdx.x) % G; }
  static __device__ int64_t row() { return static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / G; }

  // Whether x holds in any thread of the group.
  static __device__ bool any(bool x) {
    if constexpr (G > 32) {
      return __syncthreads_or(x);
    } else {
      const unsigned votes = __ballot_sync(~0u, x);
      const unsigned own = (~0u >> (32 - G)) << (threadIdx.x % 32 / G * G);
      return (votes & own) != 0;
    }
  }

  // The value of lane 0.
  template <class T>
  static __device__ T broadcast(T x) {
    if constexpr (G > 32) {
      __shared__ T slot;
      if (threadIdx.x == 0) slot = x;
      __syncthreads();
      x = slot;
      __syncthreads();
      return x;
    } else {
      return __shfl_sync(~0u, x, 0, G);
    }
  }

  // The sum over the group, in lane 0, by a tree in fixed order.
  template <class T>
  static __device__ T sum(T x) {
    constexpr int width = G < 32 ? G : 32;
#pragma unroll
    for (int d = width / 2; d > 0; d /= 2) x += __shfl_down_sync(~0u, x, d, width);
    if constexpr (G > 32) {
      __shared__ T slots[G / 32];
      if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
      __syncthreads();
      if (threadIdx.x == 0)
        for (int w = 1; w < G / 32; ++w) x += slots[w];
      __syncthreads();
    }
    return x;
  }
};

// Calls f with the group size, as a constant, for rows of at most `bytes` bytes: 8 lanes for rows that one or
// two accesses per lane cover, a warp up to 4 KB, a block for longer rows.
template <class F>
void dispatch_group(int64_t bytes, const F& f) {
  if (bytes <= 128) {
    f(std::integral_constant<int, 8>());
  } else if (bytes <= 4096) {
    f(std::integral_constant<int, 32>());
  } else {
    f(std::integral_constant<int, kThreads>());
  }
}

}  // namespace adaptcomp
