// Where the rows of a block begin on the device, and how wide they may be accessed.
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
// The same for bytes, null for null.
inline __device__ const char* bytes_of(const void* base, int64_t row, int64_t row_bytes) {
  return base ? static_cast<const char*>(base) + row * row_bytes : nullptr;
}

// An address of the compute type, scaled so that it can be or'ed with addresses of T: where T may be accessed
// in packs of E elements, so may the compute type.
template <class T>
__device__ uintptr_t scaled(const compute_t<T>* p) {
  return address(p) / (sizeof(compute_t<T>) / sizeof(T));
}

}  // namespace adaptcomp
