// Tensors at the boundary: Python objects with an address. Without torch headers one build serves every
// torch.
//
// `data_of` takes every address of a tensor. It raises a TypeError that names the argument if the tensor has
// no memory that a kernel can read: for fake and meta tensors, wrappers of torch.func, tensors whose storage
// was released, and classes with a __torch_dispatch__.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "bindings/dlpack.h"
#include "common/dtype.h"
#include "halting/halting.h"

namespace adaptcomp {

namespace py = pybind11;

// The objects of torch that are used here; the package passes them at its import.
struct Torch {
  PyTypeObject *tensor, *parameter;
  py::object plain;  // plain(name, tensor): the same values as a torch.Tensor with memory, or a TypeError
                     // that says why not
  py::object storage_use_count;      // None where torch does not have it: nothing is then known to be ours
  dlpack::Read read = nullptr;       // null where torch does not have it: a tensor's attributes are read
  std::array<py::object, 4> dtypes;  // by their codes
  py::object int64, int8, boolean, uint8, int32, int16;
  py::object is_neg;  // the method, which is looked up once
  // References to a tensor that one list holds, and to a storage that nobody holds but the one who asks.
  Py_ssize_t one_reference, one_storage;
  int64_t one_use;  // of a tensor that C++ does not hold

  py::str data_ptr{"data_ptr"}, shape{"shape"}, dtype{"dtype"}, device{"device"}, is_cpu{"is_cpu"},
      element_size{"element_size"};
  py::str is_contiguous{"is_contiguous"}, contiguous{"contiguous"}, is_inference{"is_inference"},
      requires_grad{"requires_grad"}, numel{"numel"}, storage_offset{"storage_offset"};
  py::str is_conj{"is_conj"}, resolve_conj{"resolve_conj"}, resolve_neg{"resolve_neg"}, stride{"stride"};
  py::str new_empty{"new_empty"}, resize{"resize_"};
  py::str use_count{"_use_count"}, untyped_storage{"untyped_storage"}, resizable{"resizable"},
      cdata{"_cdata"};
  // Of the context of a function that torch differentiates, and `to` of a tensor.
  py::str node{"node"}, to_save{"to_save"}, dirty_tensors{"dirty_tensors"},
      non_differentiable{"non_differentiable"}, materialize_grads{"materialize_grads"}, to{"to"};
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

// Clears an ordinary error, and rethrows any other, such as KeyboardInterrupt.
inline void clear_error() {
  if (!PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();
  PyErr_Clear();
}

// --- the guard

inline bool is_tensor(PyObject* object) { return PyObject_TypeCheck(object, torch->tensor); }

// Whether the class is torch.Tensor or nn.Parameter. Other classes may override the methods used below.
inline bool is_plain(PyObject* tensor) {
  return Py_TYPE(tensor) == torch->tensor || Py_TYPE(tensor) == torch->parameter;
}

// Returns the values as a torch.Tensor with memory.
inline py::object plain_tensor(PyObject* tensor, const char* name) {
  return torch->plain(name, py::reinterpret_borrow<py::object>(tensor));
}

// The properties of a plain tensor, read once. If torch has DLPack's interface, sizes and strides are the
// tensor's own memory: the object must be used before any other code can change the tensor.
class Facts {
 public:
  Facts() = default;
  Facts(const Facts&) = delete;

  // Returns false if torch cannot tell them, as for tensors that are not dense or have no memory.
  bool read(PyObject* tensor) {
    if (!torch->read) return read_attributes(tensor) && data_known_;
    dlpack::Tensor t;
    if (torch->read(tensor, &t) != 0) {
      clear_error();
      return false;
    }
    data_ = t.data ? static_cast<char*>(t.data) + t.byte_offset : nullptr;
    dims_ = t.dims;
    sizes_ = t.shape;
    strides_ = t.strides;
    on_cpu_ = t.device.type == dlpack::kCpuDevice;
    place_ = static_cast<uint64_t>(t.device.type) << 32 | static_cast<uint32_t>(t.device.index);
    kind_ = dlpack::kind(t.dtype.code, t.dtype.bits, t.dtype.lanes);
    dtype_ = DType::opaque;
    for (size_t code = 0; code < torch->dtypes.size(); ++code) {
      if (dlpack::kKinds[code] == kind_) dtype_ = static_cast<DType>(code);
    }
    element_bytes_ = (t.dtype.bits * t.dtype.lanes + 7) / 8;
    return true;
  }
  // Reads attributes, also of a tensor without memory; returns false if it has no shape.
  bool read_attributes(PyObject* tensor) {
    const auto integers = [](const py::object& tuple, std::vector<int64_t>& out) {
      out.clear();
      if (!tuple) clear_error();
      if (!tuple || !PyTuple_Check(tuple.ptr())) return false;
      for (Py_ssize_t d = 0; d < PyTuple_GET_SIZE(tuple.ptr()); ++d)
        out.push_back(integer_of(PyTuple_GET_ITEM(tuple.ptr(), d)));
      return true;
    };
    const auto asked = [](PyObject* answer) { return py::reinterpret_steal<py::object>(answer); };
    if (!integers(asked(PyObject_GetAttr(tensor, torch->shape.ptr())), own_sizes_)) return false;
    const bool strided =
        integers(asked(PyObject_CallMethodNoArgs(tensor, torch->stride.ptr())), own_strides_);
    dims_ = static_cast<Py_ssize_t>(own_sizes_.size());
    sizes_ = own_sizes_.data();
    strides_ = own_strides_.data();
    strided_ = strided;
    const py::object address = asked(PyObject_CallMethodNoArgs(tensor, torch->data_ptr.ptr()));
    if (!address) clear_error();
    data_ = address ? reinterpret_cast<void*>(static_cast<uintptr_t>(integer_of(address))) : nullptr;
    data_known_ = strided && address;
    on_cpu_ = is_true(tensor, torch->is_cpu);
    place_ = on_cpu_ ? 0 : static_cast<uint64_t>(PyObject_Hash(attribute(tensor, torch->device).ptr())) + 1;
    const py::object dtype = attribute(tensor, torch->dtype);
    kind_ = reinterpret_cast<uint64_t>(dtype.ptr());
    const auto known = std::find_if(torch->dtypes.begin(), torch->dtypes.end(),
                                    [&](const py::object& each) { return each.is(dtype); });
    dtype_ = static_cast<DType>(known - torch->dtypes.begin());
    element_bytes_ = integer_of(method(tensor, torch->element_size));
    return true;
  }

  // Reads the properties of any tensor with a shape.
  void require(PyObject* tensor) {
    if (!read(tensor) && !read_attributes(tensor)) throw py::type_error("expected a tensor with a shape");
  }

  void* data() const { return data_; }
  Py_ssize_t dims() const { return dims_; }
  int64_t size(Py_ssize_t d) const { return sizes_[d]; }
  const int64_t* sizes() const { return sizes_; }
  DType dtype() const { return dtype_; }
  int64_t element_bytes() const { return element_bytes_; }
  bool on_cpu() const { return on_cpu_; }
  uint64_t kind() const { return kind_; }    // differs between dtypes
  uint64_t place() const { return place_; }  // differs between devices
  int64_t elements() const {
    int64_t n = 1;
    for (Py_ssize_t d = 0; d < dims_; ++d) n *= sizes_[d];
    return n;
  }
  bool has_memory() const { return data_ || elements() == 0; }
  bool is_contiguous() const {
    if (!strided_) return false;
    int64_t expected = 1;
    for (Py_ssize_t d = dims_ - 1; d >= 0; --d) {
      if (sizes_[d] == 0) return true;
      if (sizes_[d] != 1 && strides_[d] != expected) return elements() == 0;
      expected *= sizes_[d];
    }
    return true;
  }
  // Whether a state may have the dtype.
  bool is_real() const {
    if (dtype_ != DType::opaque) return true;
    if (torch->read)
      return std::find(dlpack::kKinds.begin(), dlpack::kKinds.end(), kind_) != dlpack::kKinds.end();
    for (const py::object* dtype :
         {&torch->int64, &torch->int8, &torch->boolean, &torch->uint8, &torch->int32, &torch->int16}) {
      if (kind_ == reinterpret_cast<uint64_t>(dtype->ptr())) return true;
    }
    return false;
  }

 private:
  void* data_ = nullptr;
  Py_ssize_t dims_ = 0;
  const int64_t *sizes_ = nullptr, *strides_ = nullptr;
  uint64_t kind_ = 0, place_ = 0;
  int64_t element_bytes_ = 0;
  DType dtype_ = DType::opaque;
  bool on_cpu_ = false, strided_ = true, data_known_ = false;
  std::vector<int64_t> own_sizes_, own_strides_;
};

// Whether a negation is pending: torch negates lazily, which an address does not show.
inline bool is_lazy(PyObject* tensor) {
  PyObject* const arguments[] = {tensor};
  return owned(PyObject_Vectorcall(torch->is_neg.ptr(), arguments, 1, nullptr)).ptr() == Py_True;
}

// Finds the address of a plain tensor; returns false if it has elements and no memory.
inline bool find_data(PyObject* tensor, void*& data) {
  Facts facts;
  if (facts.read(tensor)) {
    data = facts.data();
    return facts.has_memory();
  }
  // Some tensors have an address, but no strides that DLPack can tell.
  const py::object address =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, torch->data_ptr.ptr()));
  if (!address) {
    clear_error();
    return false;
  }
  data = reinterpret_cast<void*>(static_cast<uintptr_t>(integer_of(address)));
  return data || integer_of(method(tensor, torch->numel)) == 0;
}

// Returns the address of a tensor; `name` is its name in error messages.
inline void* data_of(PyObject* tensor, const char* name) {
  void* data = nullptr;
  if (is_plain(tensor) && find_data(tensor, data)) return data;
  plain_tensor(tensor,
               name);  // says what is wrong with it, unless it could be unwrapped, which was due before
  throw py::type_error(std::string(name) + ": expected a torch.Tensor, got a subclass of it");
}

// --- what is known of a tensor

class Shape {
 public:
  explicit Shape(PyObject* tensor) : Shape(tensor, nullptr) {
    if (!*this) throw py::type_error("expected a tensor with a shape");
  }
  // False if the tensor has no shape, like a nested tensor.
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

// Also false for layouts, such as sparse ones, for which torch raises an exception.
inline bool is_contiguous(PyObject* tensor) {
  const py::object answer =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, torch->is_contiguous.ptr()));
  if (!answer) clear_error();
  return answer.ptr() == Py_True;
}

// Returns the code of a tensor's dtype.
inline DType dtype_of(PyObject* tensor) {
  const py::object dtype = attribute(tensor, torch->dtype);
  for (size_t code = 0; code < torch->dtypes.size(); ++code) {
    if (torch->dtypes[code].is(dtype)) return static_cast<DType>(code);
  }
  return DType::opaque;
}

// The size of one row of a tensor; the kernels count the elements of an opaque dtype in bytes.
struct Extent {
  DType dtype;
  int64_t elements, bytes;
};
inline Extent row_extent(const Facts& facts) {
  Extent extent{facts.dtype(), 1, 0};
  for (Py_ssize_t d = 1; d < facts.dims(); ++d) extent.elements *= facts.size(d);
  if (extent.dtype == DType::opaque) extent.elements *= facts.element_bytes();
  extent.bytes = extent.elements * size_of(extent.dtype);
  return extent;
}
inline Extent row_extent(PyObject* tensor) {
  Facts facts;
  facts.require(tensor);
  return row_extent(facts);
}

// Calls like.new_empty(size, dtype=dtype).
inline py::object new_of_dtype(PyObject* like, const py::object& size, const py::object& dtype) {
  static PyObject* const names = PyTuple_Pack(1, torch->dtype.ptr());
  PyObject* const arguments[] = {like, size.ptr(), dtype.ptr()};
  return owned(PyObject_VectorcallMethod(torch->new_empty.ptr(), arguments, 2, names));
}

// Allocates `rows` uninitialised rows like those of a tensor, of another dtype if it is given.
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
  if (!dtype.is_none()) return new_of_dtype(like, size, dtype);
  PyObject* const arguments[] = {like, size.ptr()};
  return owned(PyObject_VectorcallMethod(torch->new_empty.ptr(), arguments, 2, nullptr));
}

// Allocates a number for each of `rows` rows on the device of `like`.
inline py::object new_numbers(PyObject* like, int64_t rows, const py::object& dtype) {
  return new_of_dtype(like, py::make_tuple(rows), dtype);
}

// Sets the memory of a new tensor to zero.
inline void zero(PyObject* tensor, int64_t bytes) {
  if (bytes > 0) std::memset(data_of(tensor, "a new tensor"), 0, static_cast<size_t>(bytes));
}

// Addresses of tensors that are read, as plain contiguous tensors with their values in memory. Copies that
// this needs live as long as the object.
class Contiguous {
 public:
  // For integers and bools.
  void* operator()(const py::handle& tensor, const char* name) {
    if (tensor.is_none()) return nullptr;
    PyObject* found = unwrapped(tensor.ptr(), name);
    Facts facts;
    if (facts.read(found) && facts.has_memory() && facts.is_contiguous()) return facts.data();
    return address(is_contiguous(found) ? found : keep(method(found, torch->contiguous)), name);
  }
  // For real numbers: a pending negation is carried out.
  void* real(const py::handle& tensor, const char* name) {
    if (tensor.is_none()) return nullptr;
    PyObject* found = unwrapped(tensor.ptr(), name);
    if (is_lazy(found)) found = keep(method(found, torch->resolve_neg));
    return (*this)(found, name);
  }
  // For any dtype: a pending conjugation is carried out, too.
  void* any(const py::handle& tensor, const char* name) {
    if (tensor.is_none()) return nullptr;
    PyObject* found = unwrapped(tensor.ptr(), name);
    if (answers(found, torch->is_conj)) found = keep(method(found, torch->resolve_conj));
    return real(found, name);
  }
  // For one dtype, with at least `elements` elements.
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
  // Requires at least `elements` elements.
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

// Returns the storage of a tensor; null for a wrapper of a transform and a fake tensor.
inline py::object storage_of(PyObject* tensor) {
  auto storage =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, torch->untyped_storage.ptr()));
  if (!storage) clear_error();
  return storage;
}

// Whether the storage of a contiguous tensor has all of its elements: a user can shrink the storage and leave
// the shape unchanged.
inline bool is_in_storage(PyObject* tensor, const Facts& facts, const py::object& storage) {
  if (!storage) return true;
  const int64_t end = integer_of(method(tensor, torch->storage_offset)) + facts.elements();
  const Py_ssize_t bytes = PyObject_Size(storage.ptr());
  if (bytes < 0) throw py::error_already_set();
  return bytes >= end * facts.element_bytes();
}

inline std::string shape_text(PyObject* tensor) { return py::str(py::list(attribute(tensor, torch->shape))); }

// Requires a block of `rows` rows in memory before its rows are moved, because the user's functions may have
// resized it.
inline void check_block(PyObject* tensor, int64_t rows, const char* name) {
  Facts facts;
  const bool has_shape = facts.read(tensor) || facts.read_attributes(tensor);
  if (!has_shape || facts.dims() == 0 || facts.size(0) != rows)
    throw py::value_error(
        std::string(name) + ": expected the " + std::to_string(rows) +
        " rows that the step was called with, got a tensor that was resized or replaced since, of shape " +
        (has_shape ? shape_text(tensor) : "unknown"));
  if (is_plain(tensor) && facts.is_contiguous() && !is_in_storage(tensor, facts, storage_of(tensor)))
    throw py::value_error(std::string(name) + ": expected memory for all of its elements, got a tensor of " +
                          std::to_string(facts.elements() * facts.element_bytes()) +
                          " bytes whose storage was made smaller than that");
}

// The memory of a block of rows.
struct Block {
  void* data;
  py::object storage;
};

// The form that a block of rows of one tensor must have, apart from their number.
class Like {
 public:
  explicit Like(PyObject* tensor) {
    Facts facts;
    facts.require(tensor);
    if (facts.dims() == 0)
      throw py::value_error("expected a batch dimension first, got a tensor without dimensions");
    kind_ = facts.kind();
    place_ = facts.place();
    row_ = row_extent(facts);
    tail_.assign(facts.sizes() + 1, facts.sizes() + facts.dims());
  }

  // Finds the address of a plain contiguous block of `rows` such rows; returns false if `tensor` is not one.
  bool find(PyObject* tensor, int64_t rows, const void*& data) const {
    Facts facts;
    if (!is_block(tensor, rows, facts)) return false;
    data = facts.data();
    return true;
  }
  // Whether it is such a block, with its values in memory.
  bool fits(PyObject* tensor, int64_t rows, const void*& data) const {
    return find(tensor, rows, data) && !is_lazy(tensor);
  }
  // Requires a block that fits, and whose storage has all of its elements, before its rows are moved.
  // `untouched`: it has been tested to fit, and no other code could change it since.
  Block require_block(PyObject* tensor, int64_t rows, const char* name, bool untouched = false) const {
    Facts facts;
    if (is_block(tensor, rows, facts) && (untouched || !is_lazy(tensor))) {
      py::object storage = storage_of(tensor);
      if (is_in_storage(tensor, facts, storage)) return {facts.data(), std::move(storage)};
    }
    check_block(tensor, rows, name);
    throw py::value_error(std::string(name) + ": expected the tensor that the step was called with, got " +
                          "one that was changed to shape " + shape_text(tensor) + ", " +
                          std::string(py::str(attribute(tensor, torch->dtype))));
  }
  bool is_beside(const Facts& facts) const { return facts.place() == place_; }
  // Whether these are the properties of one such row without a batch dimension.
  bool is_row(const Facts& facts) const {
    return facts.dims() == static_cast<Py_ssize_t>(tail_.size()) &&
           std::equal(tail_.begin(), tail_.end(), facts.sizes()) && facts.kind() == kind_ &&
           facts.place() == place_ && facts.is_contiguous() && facts.has_memory();
  }
  // Whether `tensor` is a block of `rows` such rows.
  bool is_full(PyObject* tensor, int64_t rows) const {
    Facts facts;
    return is_block(tensor, rows, facts);
  }

  // tensor = tensor[:rows], without a new object, for memory that no other object sees.
  void shrink(PyObject* tensor, int64_t rows) {
    const py::int_ count(rows);
    if (sizes_.empty())
      for (const int64_t extent : tail_) sizes_.emplace_back(py::int_(extent));
    std::vector<PyObject*> arguments{tensor, count.ptr()};
    for (const py::object& size : sizes_) arguments.push_back(size.ptr());
    owned(PyObject_VectorcallMethod(torch->resize.ptr(), arguments.data(), arguments.size(), nullptr));
  }

  Leaf leaf(PyObject* result, const char* name) const {
    return {nullptr, data_of(result, name), row_.elements, row_.dtype};
  }
  int64_t row_bytes() const { return row_.bytes; }

  // Whether these are the properties of a block of `rows` such rows.
  bool is_block(int64_t rows, const Facts& facts) const {
    return facts.dims() == static_cast<Py_ssize_t>(tail_.size()) + 1 && facts.size(0) == rows &&
           std::equal(tail_.begin(), tail_.end(), facts.sizes() + 1) && facts.kind() == kind_ &&
           facts.place() == place_ && facts.is_contiguous() && facts.has_memory();
  }

 private:
  bool is_block(PyObject* tensor, int64_t rows, Facts& facts) const {
    return is_plain(tensor) && facts.read(tensor) && is_block(rows, facts);
  }

  uint64_t kind_, place_;
  Extent row_;
  std::vector<int64_t> tail_;
  std::vector<py::object> sizes_;  // tail_ in Python's objects, for compaction in place
};

// --- whose memory it is

// Whether only `references` Python objects of the loop can see the memory of `tensor`.
//
// It counts the references to the tensor and to its storage, to which other views, a view's base, and
// references from C++ add. Memory that torch did not allocate, such as an array's, is not resizable, and
// other objects may see it. An inference tensor must not be written outside of inference mode; and a tensor
// that needs a gradient, from a step that differentiates under no_grad, cannot be made smaller. `storage` is
// the tensor's storage, and the caller's only reference to it.
inline bool sole_owner(PyObject* tensor, const py::object& storage, Py_ssize_t references,
                       bool inference_mode) {
  if (torch->storage_use_count.is_none() || Py_TYPE(tensor) != torch->tensor) return false;
  if (Py_REFCNT(tensor) > torch->one_reference + references - 1) return false;
  if (integer_of(method(tensor, torch->use_count)) > torch->one_use) return false;
  if (!inference_mode && method(tensor, torch->is_inference).ptr() != Py_False) return false;
  if (attribute(tensor, torch->requires_grad).ptr() != Py_False) return false;
  if (!storage || Py_REFCNT(storage.ptr()) > torch->one_storage) return false;
  if (!answers(storage.ptr(), torch->resizable)) return false;
  // `storage` is one more reference, unless another one has the same object.
  const py::object address = attribute(storage.ptr(), torch->cdata);
  return integer_of(owned(PyObject_CallOneArg(torch->storage_use_count.ptr(), address.ptr()))) <= 2;
}

// The class of tensors, that of parameters, `plain` (see above), an empty tensor that nobody else holds, the
// use count of a storage or None, DLPack's interface or None, the dtypes in the order of their codes; int64,
// int8, bool, uint8, int32, int16.
inline void use_torch(const py::object& tensor, const py::object& parameter, const py::object& plain,
                      const py::object& empty, const py::object& use_count, const py::object& exchange,
                      const py::list& dtypes) {
  auto* t = new Torch{};
  t->tensor = reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr());
  t->parameter = reinterpret_cast<PyTypeObject*>(py::object(parameter).release().ptr());
  t->plain = plain;
  for (size_t code = 0; code < t->dtypes.size(); ++code) t->dtypes[code] = dtypes[code];
  t->int64 = dtypes[4];
  t->int8 = dtypes[5];
  t->boolean = dtypes[6];
  t->uint8 = dtypes[7];
  t->int32 = dtypes[8];
  t->int16 = dtypes[9];
  t->is_neg = tensor.attr("is_neg");
  if (!exchange.is_none()) {
    auto* table = static_cast<dlpack::Exchange*>(PyCapsule_GetPointer(exchange.ptr(), dlpack::kCapsule));
    if (!table) throw py::error_already_set();
    if (table->major == dlpack::kMajor) t->read = table->read;
  }
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
