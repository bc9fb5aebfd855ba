// Tensors as the boundary sees them: Python objects with a data_ptr(). No torch header, hence one build for every torch.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "halting/halting.h"

namespace adaptcomp {

namespace py = pybind11;

// What is used of torch, handed over when the package is imported.
struct Torch {
  PyTypeObject* tensor;
  py::object storage_use_count;      // None where torch does not have it: nothing is then known to be ours
  std::array<py::object, 4> dtypes;  // by their codes
  // References to a tensor that one list holds, and to a storage that nobody holds but the one who asks.
  Py_ssize_t one_reference, one_storage;
  int64_t one_use;  // of a tensor that C++ does not hold

  py::str data_ptr{"data_ptr"}, shape{"shape"}, dtype{"dtype"}, device{"device"}, is_cpu{"is_cpu"}, element_size{"element_size"};
  py::str is_contiguous{"is_contiguous"}, contiguous{"contiguous"}, is_inference{"is_inference"};
  py::str is_conj{"is_conj"}, is_neg{"is_neg"}, resolve_conj{"resolve_conj"}, resolve_neg{"resolve_neg"};
  py::str new_empty{"new_empty"}, resize{"resize_"};
  py::str use_count{"_use_count"}, untyped_storage{"untyped_storage"}, resizable{"resizable"}, cdata{"_cdata"};
};
inline Torch* torch = nullptr;  // never freed: it would outlive the interpreter

inline py::object owned(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}
inline py::object attribute(PyObject* of, const py::str& name) { return owned(PyObject_GetAttr(of, name.ptr())); }
inline py::object method(PyObject* of, const py::str& name) { return owned(PyObject_CallMethodNoArgs(of, name.ptr())); }

inline int64_t integer_of(const py::object& value) {
  const int64_t number = PyLong_AsLongLong(value.ptr());
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}
inline void* data_of(PyObject* tensor) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(integer_of(method(tensor, torch->data_ptr))));
}

// The class of tensors, torch.empty, the use count of a storage or None, the dtypes in the order of their codes.
inline void use_torch(const py::object& tensor, const py::object& empty, const py::object& use_count, const py::list& dtypes) {
  auto* t = new Torch{};
  t->tensor = reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr());
  t->storage_use_count = use_count;
  for (size_t code = 0; code < t->dtypes.size(); ++code) t->dtypes[code] = dtypes[code];
  py::list held;
  held.append(empty(0));
  PyObject* probe = PyList_GET_ITEM(held.ptr(), 0);
  t->one_reference = Py_REFCNT(probe);
  t->one_use = integer_of(method(probe, t->use_count));
  t->one_storage = Py_REFCNT(method(probe, t->untyped_storage).ptr());
  torch = t;
}

// False also where the layout is one that is never contiguous and says so by an exception, as sparse ones do.
inline bool is_contiguous(PyObject* tensor) {
  PyObject* answer = PyObject_CallMethodNoArgs(tensor, torch->is_contiguous.ptr());
  if (!answer) PyErr_Clear();
  Py_XDECREF(answer);
  return answer == Py_True;
}

// The code of a tensor's dtype.
inline DType dtype_of(PyObject* tensor) {
  const py::object dtype = attribute(tensor, torch->dtype);
  for (size_t code = 0; code < torch->dtypes.size(); ++code) {
    if (torch->dtypes[code].is(dtype)) return static_cast<DType>(code);
  }
  return DType::opaque;
}

// One row of a tensor. Of an opaque dtype the elements are counted in bytes, as the kernels want it.
struct Extent {
  DType dtype;
  int64_t elements, bytes;
};
inline Extent row_extent(PyObject* tensor) {
  Extent extent{dtype_of(tensor), 1, 0};
  const py::object shape = attribute(tensor, torch->shape);
  for (Py_ssize_t d = 1; d < PyTuple_GET_SIZE(shape.ptr()); ++d)
    extent.elements *= PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), d));
  if (extent.dtype == DType::opaque) extent.elements *= integer_of(method(tensor, torch->element_size));
  extent.bytes = extent.elements * size_of(extent.dtype);
  return extent;
}
inline int64_t rows_of(PyObject* tensor) { return PyLong_AsLongLong(PyTuple_GET_ITEM(attribute(tensor, torch->shape).ptr(), 0)); }

// `rows` rows like those of a tensor, uninitialised; of another dtype if one is given.
inline py::object new_rows(PyObject* like, int64_t rows, const py::object& dtype = py::none()) {
  const py::object shape = attribute(like, torch->shape);
  const Py_ssize_t dims = PyTuple_GET_SIZE(shape.ptr());
  const py::object size = owned(PyTuple_New(dims));
  PyTuple_SET_ITEM(size.ptr(), 0, PyLong_FromLongLong(rows));
  for (Py_ssize_t d = 1; d < dims; ++d) {
    PyObject* extent = PyTuple_GET_ITEM(shape.ptr(), d);
    Py_INCREF(extent);
    PyTuple_SET_ITEM(size.ptr(), d, extent);
  }
  if (dtype.is_none()) {
    PyObject* const arguments[] = {like, size.ptr()};
    return owned(PyObject_VectorcallMethod(torch->new_empty.ptr(), arguments, 2, nullptr));
  }
  return attribute(like, torch->new_empty)(size, py::arg("dtype") = dtype);
}

// Addresses of tensors; of contiguous copies where they are needed, which live as long as this object.
class Contiguous {
 public:
  void* operator()(const py::handle& tensor) {
    if (tensor.is_none()) return nullptr;
    if (method(tensor.ptr(), torch->is_contiguous).ptr() == Py_True) return data_of(tensor.ptr());
    return keep(method(tensor.ptr(), torch->contiguous));
  }
  // With its values in memory, too: torch conjugates and negates lazily, which an address does not show.
  void* plain(const py::handle& tensor) {
    if (tensor.is_none()) return nullptr;
    const bool conjugated = method(tensor.ptr(), torch->is_conj).ptr() == Py_True;
    if (!conjugated && method(tensor.ptr(), torch->is_neg).ptr() != Py_True) return (*this)(tensor);
    const py::object resolved = method(method(tensor.ptr(), torch->resolve_conj).ptr(), torch->resolve_neg);
    return keep(method(resolved.ptr(), torch->contiguous));
  }

 private:
  void* keep(py::object tensor) {
    kept_.push_back(std::move(tensor));
    return data_of(kept_.back().ptr());
  }
  std::vector<py::object> kept_;
};

// What a block of rows of one tensor has to look like: everything but their number.
class Like {
 public:
  explicit Like(PyObject* tensor)
      : dtype_(attribute(tensor, torch->dtype)),
        device_(attribute(tensor, torch->device)),
        on_cpu_(attribute(tensor, torch->is_cpu).ptr() == Py_True),
        row_(row_extent(tensor)) {
    const py::object shape = attribute(tensor, torch->shape);
    for (Py_ssize_t d = 1; d < PyTuple_GET_SIZE(shape.ptr()); ++d) {
      tail_.push_back(py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(shape.ptr(), d)));
      extents_.push_back(integer_of(tail_.back()));
    }
  }

  // Whether `tensor` is a contiguous block of `rows` such rows.
  bool fits(PyObject* tensor, int64_t rows) const {
    if (!PyObject_TypeCheck(tensor, torch->tensor)) return false;
    const py::object shape = attribute(tensor, torch->shape);
    const auto dims = static_cast<Py_ssize_t>(extents_.size());
    if (PyTuple_GET_SIZE(shape.ptr()) != dims + 1) return false;
    if (PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), 0)) != rows) return false;
    for (Py_ssize_t d = 0; d < dims; ++d) {
      if (PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), d + 1)) != extents_[static_cast<size_t>(d)]) return false;
    }
    return attribute(tensor, torch->dtype).is(dtype_) && is_beside(tensor) && is_contiguous(tensor);
  }
  bool is_beside(PyObject* tensor) const {
    if (on_cpu_) return attribute(tensor, torch->is_cpu).ptr() == Py_True;
    return attribute(tensor, torch->device).equal(device_);
  }

  // tensor = tensor[:rows], without a new object. For memory that nobody else sees.
  void shrink(PyObject* tensor, int64_t rows) const {
    const py::int_ count(rows);
    std::vector<PyObject*> arguments{tensor, count.ptr()};
    for (const py::object& extent : tail_) arguments.push_back(extent.ptr());
    owned(PyObject_VectorcallMethod(torch->resize.ptr(), arguments.data(), arguments.size(), nullptr));
  }

  Leaf leaf(PyObject* result) const { return {nullptr, data_of(result), row_.elements, row_.dtype}; }
  int64_t row_bytes() const { return row_.bytes; }

 private:
  py::object dtype_, device_;
  bool on_cpu_;
  Extent row_;
  std::vector<py::object> tail_;
  std::vector<int64_t> extents_;
};

// Whether nothing but `references` Python objects of the loop can see the memory of `tensor`.
//
// Python's references are counted, and those to the storage: every other view, a view's base, and every hold from C++ would be
// one more. Memory that torch did not allocate, such as an array's, is not resizable, and may be seen by anyone. A tensor of
// inference mode must not be written to outside it.
inline bool sole_owner(PyObject* tensor, Py_ssize_t references, bool inference_mode) {
  if (torch->storage_use_count.is_none() || Py_TYPE(tensor) != torch->tensor) return false;
  if (Py_REFCNT(tensor) > torch->one_reference + references - 1) return false;
  if (integer_of(method(tensor, torch->use_count)) > torch->one_use) return false;
  if (!inference_mode && method(tensor, torch->is_inference).ptr() != Py_False) return false;
  const py::object storage = method(tensor, torch->untyped_storage);  // a holder more, unless somebody has the same object
  if (Py_REFCNT(storage.ptr()) > torch->one_storage) return false;
  if (method(storage.ptr(), torch->resizable).ptr() != Py_True) return false;
  return integer_of(torch->storage_use_count(attribute(storage.ptr(), torch->cdata))) <= 2;
}

}  // namespace adaptcomp
