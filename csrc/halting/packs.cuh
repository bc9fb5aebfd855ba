// The addresses of a block's rows on the device, and the widths of accesses to them.
#pragma once

#include "common/cuda.cuh"

namespace adaptcomp {

template <class T>
__device__ const T* row_of(const void* base, int64_t row, int64_t n) {
  return static_cast<const T*>(base) + row * n;
}
template <class T>
__device__ T* row_of(void* base, int64_t row, int64_t n) {
  return static_cast<T*>(base) + row * n;
}
// The address of a row of bytes; null for a null base.
inline __device__ const char* bytes_of(const void* base, int64_t row, int64_t row_bytes) {
  return base ? static_cast<const char*>(base) + row * row_bytes : nullptr;
}

// An address of the compute type, scaled so that it can be or'ed with addresses of T: if T can be accessed in
// packs of E elements, so can the compute type.
template <class T>
__device__ uintptr_t scaled(const compute_t<T>* p) {
  return address(p) / (sizeof(compute_t<T>) / sizeof(T));
}

}  // namespace adaptcomp
