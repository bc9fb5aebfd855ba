// The reading of argument lists, and the choice between host and device, for all functions of the boundary.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bindings/torch.h"
#include "common/dtype.h"
#include "common/scratch.h"
#include "halting/halting.h"

namespace adaptcomp {

namespace py = pybind11;

// Reads a Python list of integers and tensors from front to back. A tensor stands for its address, None for a
// null pointer.
class Arguments {
 public:
  explicit Arguments(const py::list& list) : items_(list.ptr()), size_(PyList_GET_SIZE(list.ptr())) {}
  int64_t integer() { return integer_of(next()); }
  double number() { return py::handle(next()).cast<double>(); }
  py::object object() { return py::reinterpret_borrow<py::object>(next()); }
  // A tensor that Python has allocated, or made plain and contiguous, to be read or written.
  template <class T>
  T* pointer(const char* name = "a tensor") {
    PyObject* item = next();
    if (item == Py_None) return nullptr;
    if (!is_tensor(item)) throw py::type_error(std::string(name) + ": expected a Tensor or None");
    return static_cast<T*>(data_of(item, name));
  }
  // A contiguous tensor of real numbers that is only read.
  void* values(const char* name) {
    PyObject* item = next();
    if (item == Py_None) return nullptr;
    if (!is_tensor(item)) throw py::type_error(std::string(name) + ": expected a Tensor or None");
    return is_plain(item) && !is_lazy(item) ? data_of(item, name) : data_.real(item, name);
  }
  // A tensor that Python holds longer than this call. It has to be contiguous, with this dtype and at least
  // `elements` elements.
  template <class T>
  T* held(const py::object& dtype, int64_t elements, const char* name) {
    PyObject* item = next();
    if (item == Py_None) return nullptr;
    const auto* data = data_.typed<T>(item, dtype, elements, name);
    if (!is_contiguous(item)) throw py::value_error(std::string(name) + ": expected a contiguous tensor");
    return const_cast<T*>(data);
  }
  // Tensors of any strides that are only read: real numbers; float32 (float64 if `wide`) with at least
  // `elements` elements; int64; bool.
  void* reals(const char* name) { return data_.real(next(), name); }
  void* scalars(bool wide, int64_t elements, const char* name) {
    return data_.typed<void>(next(), torch->dtypes[wide ? 1 : 0], elements, name);
  }
  const int64_t* integers(const char* name) {
    return data_.typed<const int64_t>(next(), torch->int64, 0, name);
  }
  const uint8_t* bools(const char* name) {
    return data_.typed<const uint8_t>(next(), torch->boolean, 0, name);
  }
  void* stream() { return reinterpret_cast<void*>(static_cast<uintptr_t>(integer())); }
  DType dtype() { return static_cast<DType>(integer()); }
  // The length of a table that follows, at most `most`.
  int64_t length(int64_t most) {
    const int64_t n = integer();
    if (n < 0 || n > most)
      throw std::runtime_error("adaptcomp_ext._C: a table of the argument list has a wrong length");
    return n;
  }
  void done() const {
    if (next_ != size_) throw std::runtime_error("adaptcomp_ext._C: the argument list is too long");
  }

 private:
  PyObject* next() {
    if (next_ >= size_) throw std::runtime_error("adaptcomp_ext._C: the argument list is too short");
    return PyList_GET_ITEM(items_, next_++);
  }

  PyObject* items_;
  Py_ssize_t size_, next_ = 0;
  Contiguous data_;
};

constexpr int64_t kCpu = -1;  // the device index that means the host

// The device index and the stream of a call.
struct Place {
  int64_t device;
  void* stream;
  Place(int64_t on, void* with) : device(on), stream(with) {
#if !ADAPTCOMP_WITH_CUDA
    if (!on_cpu())
      throw std::runtime_error(
          "adaptcomp_ext was built without CUDA: rebuild it where nvcc is found to use CUDA tensors");
#endif
  }
  bool on_cpu() const { return device == kCpu; }
};
// Reads the place, the last two integers of a list.
inline Place place(Arguments& in) {
  const int64_t device = in.integer();
  const Place where(device, in.stream());
  in.done();
  return where;
}

// The end of a list: the place and, on CUDA, address and size of the scratch.
struct CallPlace : Place {
  explicit CallPlace(Arguments& in) : CallPlace(in, in.integer()) { in.done(); }
  DeviceScratch scratch;

 private:
  CallPlace(Arguments& in, int64_t on) : Place(on, in.stream()), scratch{} {
    if (on_cpu()) return;
    scratch.data = in.pointer<void>();
    scratch.bytes = in.integer();
  }
};

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
