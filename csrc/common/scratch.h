// Device memory of a call on CUDA, which the caller allocates.
#pragma once

#include <cstdint>

namespace adaptcomp {

// Aligned to 16 bytes and uninitialised, of the size that the family's ..._scratch_cuda returns.
struct DeviceScratch {
  void* data;
  int64_t bytes;
};

}  // namespace adaptcomp
