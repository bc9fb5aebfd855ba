// Tensors as the boundary sees them: Python objects with a data_ptr(). No torch header, hence one build for
// every torch.
//
// Every address of a tensor is taken by `data_of`. It refuses, by a TypeError that names the argument,
// whatever has no memory that a kernel could read: fake and meta tensors, the wrappers of torch.func, tensors
// whose storage was released, classes with a
// __torch_dispatch__.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "halting/halting.h"

namespace adaptcomp {

namespace py = pybind11;

// What is used of torch, handed over when the package is imported.
struct Torch {
  PyTypeObject *tensor, *parameter;
  py::object plain;  // plain(name, tensor): the same values as a torch.Tensor with memory, or a TypeError
                     // that says why not
  py::object storage_use_count;      // None where torch does not have it: nothing is then known to be ours
  std::array<py::object, 4> dtypes;  // by their codes
  py::object int64, int8, boolean, uint8;
  // References to a tensor that one list holds, and to a storage that nobody holds but the one who asks.
  Py_ssize_t one_reference, one_storage;
  int64_t one_use;  // of a tensor that C++ does not hold

  py::str data_ptr{"data_ptr"}, shape{"shape"}, dtype{"dtype"}, device{"device"}, is_cpu{"is_cpu"},
      element_size{"element_size"};
  py::str is_contiguous{"is_contiguous"}, contiguous{"contiguous"}, is_inference{"is_inference"},
      requires_grad{"requires_grad"}, numel{"numel"}, nbytes{"nbytes"}, storage_offset{"storage_offset"};
  py::str is_conj{"is_conj"}, is_neg{"is_neg"}, is_nested{"is_nested"}, resolve_conj{"resolve_conj"},
      resolve_neg{"resolve_neg"};
  py::str new_empty{"new_empty"}, resize{"resize_"};
  py::str use_count{"_use_count"}, untyped_storage{"untyped_storage"}, resizable{"resizable"},
      cdata{"_cdata"};
};
inline Torch* torch = nullptr;  // never freed: it would outlive the interpreter

inline py::object owned(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}
inline py::object attribute(PyObject* of, const py::str& name) {
  return owned(PyObject_GetAttr(of, name.ptr()));
}
inline py::object method(PyObject* of, const py::str& name) {
  return owned(PyObject_CallMethodNoArgs(of, name.ptr()));
}
inline bool is_true(PyObject* of, const py::str& name) { return attribute(of, name).ptr() == Py_True; }
inline bool answers(PyObject* of, const py::str& question) { return method(of, question).ptr() == Py_True; }

inline int64_t integer_of(PyObject* value) {
  const int64_t number = PyLong_AsLongLong(value);
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}
inline int64_t integer_of(const py::object& value) { return integer_of(value.ptr()); }

// Clears an ordinary error. One that is none, such as KeyboardInterrupt, goes on.
inline void clear_error() {
  if (!PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();
  PyErr_Clear();
}

// --- the guard
// ----------------------------------------------------------------------------------------------------------------
inline bool is_tensor(PyObject* object) { return PyObject_TypeCheck(object, torch->tensor); }

// Whether the class is torch.Tensor or nn.Parameter. Any other may answer in its own way to what is asked
// below.
inline bool is_plain(PyObject* tensor) {
  return Py_TYPE(tensor) == torch->tensor || Py_TYPE(tensor) == torch->parameter;
}

// The same values as a torch.Tensor with memory of its own.
inline py::object plain_tensor(PyObject* tensor, const char* name) {
  return torch->plain(name, py::reinterpret_borrow<py::object>(tensor));
}

// The address of a plain tensor; false where it has elements and no memory.
inline bool find_data(PyObject* tensor, void*& data) {
  const py::object address =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, torch->data_ptr.ptr()));
  if (!address) {
    clear_error();
    return false;
  }
  data = reinterpret_cast<void*>(static_cast<uintptr_t>(integer_of(address)));
  return data || integer_of(method(tensor, torch->numel)) == 0;
}

// The address of a tensor, which error messages call `name`.
inline void* data_of(PyObject* tensor, const char* name) {
  void* data = nullptr;
  if (is_plain(tensor) && find_data(tensor, data)) return data;
  plain_tensor(tensor,
               name);  // says what is wrong with it, unless it could be unwrapped, which was due before
  throw py::type_error(std::string(name) + ": expected a torch.Tensor, got a subclass of it");
}

// --- what is known of a tensor
// ------------------------------------------------------------------------------------------------
class Shape {
 public:
  explicit Shape(PyObject* tensor) : Shape(tensor, nullptr) {
    if (!*this) throw py::type_error("expected a tensor with a shape");
  }
  // False where there is none, as nested tensors have none.
  Shape(PyObject* tensor, std::nullptr_t)
      : sizes_(py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, torch->shape.ptr()))) {
    if (!sizes_) clear_error();
  }
  explicit operator bool() const { return sizes_ && PyTuple_Check(sizes_.ptr()); }
  Py_ssize_t dims() const { return PyTuple_GET_SIZE(sizes_.ptr()); }
  PyObject* item(Py_ssize_t d) const { return PyTuple_GET_ITEM(sizes_.ptr(), d); }
  int64_t operator[](Py_ssize_t d) const { return integer_of(item(d)); }
  int64_t rows() const {
    if (dims() == 0)
      throw py::value_error("expected a batch dimension first, got a tensor without dimensions");
    return (*this)[0];
  }

 private:
  py::object sizes_;
};
inline int64_t rows_of(PyObject* tensor) { return Shape(tensor).rows(); }

// False also where the layout is one that is never contiguous and says so by an exception, as sparse ones do.
inline bool is_contiguous(PyObject* tensor) {
  const py::object answer =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, torch->is_contiguous.ptr()));
  if (!answer) clear_error();
  return answer.ptr() == Py_True;
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
  const Shape shape(tensor);
  for (Py_ssize_t d = 1; d < shape.dims(); ++d) extent.elements *= shape[d];
  if (extent.dtype == DType::opaque) extent.elements *= integer_of(method(tensor, torch->element_size));
  extent.bytes = extent.elements * size_of(extent.dtype);
  return extent;
}

// `rows` rows like those of a tensor, uninitialised; of another dtype if one is given.
inline py::object new_rows(PyObject* like, int64_t rows, const py::object& dtype = py::none()) {
  const Shape shape(like);
  shape.rows();
  const py::object size = owned(PyTuple_New(shape.dims()));
  PyTuple_SET_ITEM(size.ptr(), 0, owned(PyLong_FromLongLong(rows)).release().ptr());
  for (Py_ssize_t d = 1; d < shape.dims(); ++d) {
    PyObject* extent = shape.item(d);
    Py_INCREF(extent);
    PyTuple_SET_ITEM(size.ptr(), d, extent);
  }
  if (dtype.is_none()) {
    PyObject* const arguments[] = {like, size.ptr()};
    return owned(PyObject_VectorcallMethod(torch->new_empty.ptr(), arguments, 2, nullptr));
  }
  return attribute(like, torch->new_empty)(size, py::arg("dtype") = dtype);
}

// Addresses of tensors that are read: as plain contiguous tensors with their values in memory. The copies
// that this takes live as long as this object.
class Contiguous {
 public:
  // Of integers and bools.
  void* operator()(const py::handle& tensor, const char* name) {
    if (tensor.is_none()) return nullptr;
    PyObject* found = unwrapped(tensor.ptr(), name);
    return address(is_contiguous(found) ? found : keep(method(found, torch->contiguous)), name);
  }
  // Of real numbers: torch negates lazily, which an address does not show.
  void* real(const py::handle& tensor, const char* name) {
    if (tensor.is_none()) return nullptr;
    PyObject* found = unwrapped(tensor.ptr(), name);
    if (answers(found, torch->is_neg)) found = keep(method(found, torch->resolve_neg));
    return (*this)(found, name);
  }
  // Of anything: it conjugates lazily, too.
  void* any(const py::handle& tensor, const char* name) {
    if (tensor.is_none()) return nullptr;
    PyObject* found = unwrapped(tensor.ptr(), name);
    if (answers(found, torch->is_conj)) found = keep(method(found, torch->resolve_conj));
    return real(found, name);
  }
  // Of one dtype, with at least `elements` elements.
  template <class T>
  T* typed(const py::handle& tensor, const py::object& dtype, int64_t elements, const char* name) {
    if (tensor.is_none()) return nullptr;
    PyObject* found = unwrapped(tensor.ptr(), name);
    const py::object came = attribute(found, torch->dtype);
    if (!came.is(dtype))
      throw py::type_error(std::string(name) + ": expected " + text(dtype) + ", got " + text(came));
    if (elements > 0) require(found, elements, name);
    return static_cast<T*>((*this)(found, name));
  }
  // That there are at least so many elements.
  static void require(PyObject* tensor, int64_t elements, const char* name) {
    const int64_t came = integer_of(method(tensor, torch->numel));
    if (came < elements)
      throw py::value_error(std::string(name) + ": expected " + std::to_string(elements) + " elements, got " +
                            std::to_string(came));
  }

 private:
  static std::string text(const py::object& object) { return py::str(object); }
  void* address(PyObject* tensor, const char* name) {
    void* data = nullptr;
    if (find_data(tensor, data)) return data;
    return data_of(keep(plain_tensor(tensor, name)), name);
  }
  PyObject* unwrapped(PyObject* tensor, const char* name) {
    return is_plain(tensor) ? tensor : keep(plain_tensor(tensor, name));
  }
  PyObject* keep(py::object tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back().ptr();
  }
  std::vector<py::object> kept_;
};

// Whether the storage of a tensor has all of its elements, taken for contiguous: the user can make a storage
// smaller and leave the shape as it is.
inline bool is_in_storage(PyObject* tensor) {
  const int64_t bytes = integer_of(attribute(tensor, torch->nbytes));
  const int64_t skipped =
      integer_of(method(tensor, torch->storage_offset)) * integer_of(method(tensor, torch->element_size));
  const auto storage =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, torch->untyped_storage.ptr()));
  if (!storage) {  // a wrapper of a transform or a fake tensor, which torch looks after
    clear_error();
    return true;
  }
  return integer_of(method(storage.ptr(), torch->nbytes)) >= skipped + bytes;
}

inline std::string shape_text(PyObject* tensor) { return py::str(py::list(attribute(tensor, torch->shape))); }

// Requires a block of `rows` rows in memory, before its rows are moved: the user's functions, which had it,
// may have resized it.
inline void check_block(PyObject* tensor, int64_t rows, const char* name) {
  const Shape shape(tensor, nullptr);
  if (!shape || shape.dims() == 0 || shape[0] != rows)
    throw py::value_error(
        std::string(name) + ": expected the " + std::to_string(rows) +
        " rows that the step was called with, got a tensor that was resized or replaced since, of shape " +
        (shape ? shape_text(tensor) : "unknown"));
  if (is_plain(tensor) && is_contiguous(tensor) && !is_in_storage(tensor))
    throw py::value_error(std::string(name) + ": expected memory for all of its elements, got a tensor of " +
                          std::to_string(integer_of(attribute(tensor, torch->nbytes))) +
                          " bytes whose storage was made smaller than that");
}

// What a block of rows of one tensor has to look like: everything but their number.
class Like {
 public:
  explicit Like(PyObject* tensor)
      : dtype_(attribute(tensor, torch->dtype)),
        device_(attribute(tensor, torch->device)),
        on_cpu_(is_true(tensor, torch->is_cpu)),
        row_(row_extent(tensor)) {
    const Shape shape(tensor);
    shape.rows();
    for (Py_ssize_t d = 1; d < shape.dims(); ++d) {
      tail_.push_back(py::reinterpret_borrow<py::object>(shape.item(d)));
      extents_.push_back(integer_of(tail_.back()));
    }
  }

  // Whether `tensor` is a plain contiguous block of `rows` such rows, with its values in memory.
  bool fits(PyObject* tensor, int64_t rows) const {
    if (!is_plain(tensor)) return false;
    const Shape shape(tensor, nullptr);
    if (!shape) return false;
    const auto dims = static_cast<Py_ssize_t>(extents_.size());
    if (shape.dims() != dims + 1 || shape[0] != rows) return false;
    for (Py_ssize_t d = 0; d < dims; ++d) {
      if (shape[d + 1] != extents_[static_cast<size_t>(d)]) return false;
    }
    return attribute(tensor, torch->dtype).is(dtype_) && is_beside(tensor) && is_contiguous(tensor) &&
           !is_lazy(tensor);
  }
  // Whether a tensor that did fit can still be read as `rows` such rows. For a check at every step.
  bool is_still_readable(PyObject* tensor, int64_t rows) const {
    return integer_of(attribute(tensor, torch->nbytes)) == rows * row_.bytes && is_contiguous(tensor);
  }
  // That it fits, and that its storage has all of its elements, before rows are moved in its memory.
  void require_block(PyObject* tensor, int64_t rows, const char* name) const {
    check_block(tensor, rows, name);
    if (!fits(tensor, rows))
      throw py::value_error(std::string(name) + ": expected the tensor that the step was called with, of " +
                            std::string(py::str(dtype_)) + ", got one that was changed to shape " +
                            shape_text(tensor) + ", " +
                            std::string(py::str(attribute(tensor, torch->dtype))));
  }
  bool is_beside(PyObject* tensor) const {
    if (on_cpu_) return is_true(tensor, torch->is_cpu);
    return attribute(tensor, torch->device).equal(device_);
  }
  // Whether it is still to be negated, which of contiguous tensors only those of one element can be.
  static bool is_lazy(PyObject* tensor) { return answers(tensor, torch->is_neg); }

  // tensor = tensor[:rows], without a new object. For memory that nobody else sees.
  void shrink(PyObject* tensor, int64_t rows) const {
    const py::int_ count(rows);
    std::vector<PyObject*> arguments{tensor, count.ptr()};
    for (const py::object& extent : tail_) arguments.push_back(extent.ptr());
    owned(PyObject_VectorcallMethod(torch->resize.ptr(), arguments.data(), arguments.size(), nullptr));
  }

  Leaf leaf(PyObject* result, const char* name) const {
    return {nullptr, data_of(result, name), row_.elements, row_.dtype};
  }
  int64_t row_bytes() const { return row_.bytes; }

 private:
  py::object dtype_, device_;
  bool on_cpu_;
  Extent row_;
  std::vector<py::object> tail_;
  std::vector<int64_t> extents_;
};

// --- whose memory it is
// -------------------------------------------------------------------------------------------------------
// Whether nothing but `references` Python objects of the loop can see the memory of `tensor`.
//
// Python's references are counted, and those to the storage: every other view, a view's base, and every hold
// from C++ would be one more. Memory that torch did not allocate, such as an array's, is not resizable, and
// may be seen by anyone. A tensor of inference mode must not be written to outside it; and one that needs a
// gradient, of a step that differentiates under no_grad, cannot be made smaller.
inline bool sole_owner(PyObject* tensor, Py_ssize_t references, bool inference_mode) {
  if (torch->storage_use_count.is_none() || Py_TYPE(tensor) != torch->tensor) return false;
  if (Py_REFCNT(tensor) > torch->one_reference + references - 1) return false;
  if (integer_of(method(tensor, torch->use_count)) > torch->one_use) return false;
  if (!inference_mode && method(tensor, torch->is_inference).ptr() != Py_False) return false;
  if (attribute(tensor, torch->requires_grad).ptr() != Py_False) return false;
  const py::object storage =
      method(tensor, torch->untyped_storage);  // a holder more, unless somebody has the same object
  if (Py_REFCNT(storage.ptr()) > torch->one_storage) return false;
  if (!answers(storage.ptr(), torch->resizable)) return false;
  return integer_of(torch->storage_use_count(attribute(storage.ptr(), torch->cdata))) <= 2;
}

// The class of tensors, that of parameters, `plain` (see above), an empty tensor that nobody else holds, the
// use count of a storage or None, the dtypes in the order of their codes; int64, int8, bool, uint8.
inline void use_torch(const py::object& tensor, const py::object& parameter, const py::object& plain,
                      const py::object& empty, const py::object& use_count, const py::list& dtypes) {
  auto* t = new Torch{};
  t->tensor = reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr());
  t->parameter = reinterpret_cast<PyTypeObject*>(py::object(parameter).release().ptr());
  t->plain = plain;
  for (size_t code = 0; code < t->dtypes.size(); ++code) t->dtypes[code] = dtypes[code];
  t->int64 = dtypes[4];
  t->int8 = dtypes[5];
  t->boolean = dtypes[6];
  t->uint8 = dtypes[7];
  py::list held;
  held.append(empty(0, py::arg("device") = "cpu"));
  PyObject* probe = PyList_GET_ITEM(held.ptr(), 0);
  t->storage_use_count = Py_TYPE(probe) == t->tensor ? use_count : py::none();
  t->one_reference = Py_REFCNT(probe);
  t->one_use = integer_of(method(probe, t->use_count));
  t->one_storage = Py_REFCNT(method(probe, t->untyped_storage).ptr());
  torch = t;
}

}  // namespace adaptcomp
