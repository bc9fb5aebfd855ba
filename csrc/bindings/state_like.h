// The form of a state, and the schedule of compactions that follows from it.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <vector>

#include "bindings/torch.h"
#include "halting/halting.h"
#include "halting/schedule.h"

namespace adaptcomp {

enum class Form : int64_t { tensor = 0, tuple = 1, other = 2 };

// The form that all states of a run must have.
class StateLike {
 public:
  StateLike(const py::list& state, int64_t form) : form_(static_cast<Form>(form)) {
    if (state.size() > static_cast<size_t>(kMaxLeaves))
      throw std::runtime_error("adaptcomp_ext._C: too many tensors in the state");
    for (const py::handle leaf : state) leaves_.emplace_back(leaf.ptr());
  }

  // Returns the leaves of a step's result in a new list; None if it is not a tensor or a plain tuple of
  // contiguous tensors in the form of the state: the caller then checks and converts it.
  py::object take(const py::object& tree, int64_t rows) const {
    if (form_ == Form::other) return py::none();
    if (form_ == Form::tuple && !(PyTuple_CheckExact(tree.ptr()) &&
                                  static_cast<size_t>(PyTuple_GET_SIZE(tree.ptr())) == leaves_.size()))
      return py::none();
    py::list leaves(leaves_.size());
    for (size_t l = 0; l < leaves_.size(); ++l) {
      PyObject* leaf =
          form_ == Form::tensor ? tree.ptr() : PyTuple_GET_ITEM(tree.ptr(), static_cast<Py_ssize_t>(l));
      const void* data = nullptr;
      if (!leaves_[l].fits(leaf, rows, data)) return py::none();
      PyList_SET_ITEM(leaves.ptr(), static_cast<Py_ssize_t>(l),
                      py::reinterpret_borrow<py::object>(leaf).release().ptr());
    }
    return std::move(leaves);
  }

  // The state of these leaves, for a form that `take` reads.
  py::object tree(const py::list& leaves) const {
    return form_ == Form::tensor ? py::object(leaves[0]) : owned(PyList_AsTuple(leaves.ptr()));
  }

  std::vector<Like>& leaves() { return leaves_; }
  Form form() const { return form_; }

 private:
  Form form_;
  std::vector<Like> leaves_;
};

// Calls flops_per_row for a state.
inline double state_flops_per_row(int64_t weights, const py::object& state) {
  Facts facts;
  facts.require(state.ptr());
  return flops_per_row(weights, facts.sizes(), facts.dims());
}

// Makes the schedule of a run from the cost model's prices; `state` and `inputs` are the tensors of a block.
inline Schedule make_schedule(int64_t weights, const py::sequence& state, const py::sequence& inputs,
                              double packing, double per_tensor, double per_byte, double per_flop) {
  int64_t bytes = 0, tensors = 0;
  for (const py::sequence* group : {&state, &inputs}) {
    for (const py::handle tensor : *group) {
      bytes += row_extent(tensor.ptr()).bytes;
      ++tensors;
    }
  }
  const double move = per_byte * static_cast<double>(bytes);
  return {packing + per_tensor * static_cast<double>(tensors), move,
          per_flop * state_flops_per_row(weights, state[0]) + move};
}

}  // namespace adaptcomp
