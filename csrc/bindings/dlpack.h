// DLPack's exchange interface, version 1 (https://dmlc.github.io/dlpack): what a tensor is, in one call of C
// and without a header of torch. torch offers it from 2.10 on.
#pragma once

#include <array>
#include <cstdint>

namespace adaptcomp::dlpack {

enum Code : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };
constexpr int32_t kCpuDevice = 1;

struct Device {
  int32_t type, index;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  const int64_t *shape, *strides;  // of the tensor's own: valid while it is left alone
  uint64_t byte_offset;
};

// Describes a Python tensor. Returns -1 with a Python error set where it cannot.
using Read = int (*)(void* tensor, Tensor* out);

// The table of functions, up to the one that is used here.
struct Exchange {
  uint32_t major, minor;
  Exchange* previous;
  void *allocate, *from_python, *to_python;
  Read read;
};
constexpr uint32_t kMajor = 1;
constexpr const char* kCapsule = "dlpack_exchange_api";

// A dtype as one number.
constexpr uint64_t kind(uint8_t code, uint8_t bits, uint16_t lanes = 1) {
  return code | static_cast<uint64_t>(bits) << 8 | static_cast<uint64_t>(lanes) << 16;
}
// The dtypes that the kernels compute with, by their codes, and those that they only copy.
constexpr std::array<uint64_t, 10> kKinds{
    kind(kFloat, 32), kind(kFloat, 64), kind(kBfloat, 16), kind(kFloat, 16), kind(kInt, 64),
    kind(kInt, 8),    kind(kBool, 8),   kind(kUInt, 8),    kind(kInt, 32),   kind(kInt, 16)};

}  // namespace adaptcomp::dlpack
