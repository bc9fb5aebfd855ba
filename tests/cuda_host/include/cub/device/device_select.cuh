// CUB's selection, in order, on the host.
#pragma once

#include <cuda_runtime.h>

namespace cub {

struct DeviceSelect {
  // With null scratch it says how much it wants.
  template <class In, class Flag, class Out, class Count>
  static cudaError_t Flagged(void* scratch, size_t& bytes, In in, const Flag* flags, Out* out, Count* count,
                             int64_t n, cudaStream_t) {
    const size_t wanted = 256 + static_cast<size_t>(n);
    if (!scratch) {
      bytes = wanted;
      return cudaSuccess;
    }
    if (bytes < wanted) return emulation::fail("DeviceSelect::Flagged has too little scratch");
    std::memset(scratch, 0xff, wanted);  // it is used, so that scratch which is not there is noticed
    emulation::settings().launches += 2;
    Count kept = 0;
    for (int64_t i = 0; i < n; ++i)
      if (flags[i]) out[kept++] = in[i];
    *count = kept;
    return cudaSuccess;
  }
};

}  // namespace cub
