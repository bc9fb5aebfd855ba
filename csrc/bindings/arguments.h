// What the functions of the boundary share: reading their lists of integers, and running on the host or on a device.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "common/dtype.h"
#include "halting/halting.h"

namespace adaptcomp {

namespace py = pybind11;

// Reads a Python list of integers from front to back.
class Arguments {
 public:
  explicit Arguments(const py::list& list) : items_(list.ptr()), size_(PyList_GET_SIZE(list.ptr())) {}
  int64_t integer() {
    if (next_ >= size_) throw std::runtime_error("adaptcomp_ext._C: the argument list is too short");
    const int64_t value = PyLong_AsLongLong(PyList_GET_ITEM(items_, next_++));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(integer()));
  }
  DType dtype() { return static_cast<DType>(integer()); }
  // The length of a table that follows, refused beyond `most`.
  int64_t length(int64_t most) {
    const int64_t n = integer();
    if (n < 0 || n > most) throw std::runtime_error("adaptcomp_ext._C: a table of the argument list has a wrong length");
    return n;
  }
  Leaf leaf() { return {pointer<void>(), pointer<void>(), integer(), dtype()}; }
  void done() const {
    if (next_ != size_) throw std::runtime_error("adaptcomp_ext._C: the argument list is too long");
  }

 private:
  PyObject* items_;
  Py_ssize_t size_, next_ = 0;
};

constexpr int64_t kCpu = -1;  // the device index that means the host

// Where a call runs: a device index and a stream.
struct Place {
  int64_t device;
  void* stream;
  Place(int64_t on, void* with) : device(on), stream(with) {
#if !ADAPTCOMP_WITH_CUDA
    if (!on_cpu())
      throw std::runtime_error("adaptcomp_ext was built without CUDA: rebuild it where nvcc is found to use CUDA tensors");
#endif
  }
  bool on_cpu() const { return device == kCpu; }
};
// The last two integers of a list.
inline Place place(Arguments& in) {
  const int64_t device = in.integer();
  const Place where(device, in.pointer<void>());
  in.done();
  return where;
}

#if ADAPTCOMP_WITH_CUDA
#define AC_RUN(where, cpu_call, cuda_call) \
  do {                                     \
    py::gil_scoped_release unlocked;       \
    if ((where).on_cpu()) {                \
      cpu_call;                            \
    } else {                               \
      cuda_call;                           \
    }                                      \
  } while (false)
#else
#define AC_RUN(where, cpu_call, cuda_call) \
  do {                                     \
    static_cast<void>(where);              \
    py::gil_scoped_release unlocked;       \
    cpu_call;                              \
  } while (false)
#endif

}  // namespace adaptcomp
