// The autograd node of a step of the halting loop in training: torch's own node of a function written in
// Python, whose two functions are compiled.
//
// A class derived from torch::autograd::Node would need torch's headers, and the layout of that class differs
// between releases. Torch's node of a Python function reaches the same engine through attributes that have
// stayed the same, and the interpreter has little to do in it.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <utility>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/functions.h"
#include "bindings/torch.h"
#include "halting/halting.h"

namespace adaptcomp {

// What a node keeps of its step. Its tensors, and the gradients of its results, are in this order: with ACT,
// logits and accumulated probability; the readout if it is apart; the output; the cost; the leaves; their
// results; the inputs. The node has the leaves and inputs with a gradient only. Its own results are the
// output, the cost, the results of the leaves, then the leaves and inputs of the next block and, with ACT,
// the accumulated probability after the step.
struct HaltNode {
  int64_t rows = 0;
  std::vector<int64_t> row;    // batch row of each row of the block
  std::vector<int64_t> place;  // of each row in the next block; empty if no row has moved
  std::vector<int8_t> flag;
  std::vector<char> weight;  // with ACT, in the scalar type
  bool wide = false, act = false;
  ActParams params{};
  bool has_readout = false;  // there is an output apart from the state
  bool shared = false;       // the readout is the first of the leaves
  py::object readout_dtype = py::none();
  int64_t totals = 0, leaves = 0, inputs = 0;
  bool has_results = false;  // the results of the leaves are among the tensors
  bool has_next = false;     // there is a next block

  // For `forward`, which takes them away.
  py::object saved, written, fixed, outputs;
};

template <class T>
py::list list_of(const std::vector<T>& numbers) {
  py::list list;
  for (const T number : numbers) list.append(py::int_(static_cast<int64_t>(number)));
  return list;
}

// Sets what torch's context of a function takes by save_for_backward and its other methods.
inline void set_context(PyObject* context, const py::str& name, const py::handle& value) {
  if (PyObject_SetAttr(context, name.ptr(), value.ptr()) != 0) throw py::error_already_set();
}

// halt_node_forward(context, node, *tensors): the kernels have already run, and this declares what they did.
inline PyObject* halt_node_forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    if (count < 2) throw py::type_error("halt_node_forward: expected a context, a node and tensors");
    auto& node = *py::handle(arguments[1]).cast<HaltNode*>();
    PyObject* context = arguments[0];
    set_context(context, torch->node, arguments[1]);
    set_context(context, torch->materialize_grads, Py_False);
    if (node.saved) set_context(context, torch->to_save, node.saved);
    if (node.written) set_context(context, torch->dirty_tensors, node.written);
    if (node.fixed) set_context(context, torch->non_differentiable, node.fixed);
    node.saved = node.written = node.fixed = py::object();
    return std::exchange(node.outputs, py::object()).release().ptr();
  });
}

// halt_node_backward(node, saved, gradients): the gradients of the node's arguments; `saved` are, with ACT,
// the logits, the accumulated probability and the readout.
inline PyObject* halt_node_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    if (count != 3 || !PyTuple_Check(arguments[1]) || !PyTuple_Check(arguments[2]))
      throw py::type_error("halt_node_backward: expected a node and two tuples");
    const auto& node = *py::handle(arguments[0]).cast<HaltNode*>();
    PyObject *saved = arguments[1], *gradients = arguments[2];
    Py_ssize_t next = 0;
    const auto gradient = [&](bool exists, bool passed_on = false) -> py::object {
      if (!exists) return py::none();
      if (next >= PyTuple_GET_SIZE(gradients))
        throw std::runtime_error("adaptcomp_ext._C: a gradient is missing");
      PyObject* g = PyTuple_GET_ITEM(gradients, next++);
      // The nodes of all steps get this gradient: it is made contiguous once, not in each of them.
      Facts facts;
      if (passed_on && is_plain(g) && facts.read(g) && !facts.is_contiguous())
        return method(g, torch->contiguous);
      return py::reinterpret_borrow<py::object>(g);
    };
    Contiguous data;
    HaltBackward a{};
    a.rows = node.rows;
    a.row = node.row.data();
    a.flag = node.flag.data();
    a.place = node.place.empty() ? nullptr : node.place.data();
    a.wide = node.wide;
    a.weight = node.act ? node.weight.data() : nullptr;

    const py::object g_output = gradient(node.has_readout, true);
    const py::object g_total = gradient(node.totals > 0, true);
    std::vector<py::object> g_results, g_next;
    for (int64_t l = 0; l < node.leaves; ++l) g_results.push_back(gradient(node.has_results, true));
    for (int64_t l = 0; l < node.leaves + node.inputs; ++l) g_next.push_back(gradient(node.has_next));
    const py::object g_carry = gradient(node.act && node.has_next);
    a.g_output = data.real(g_output, "the gradient of output");

    py::object g_readout = py::none();
    if (!g_output.is_none()) {
      if (!node.shared) {
        g_readout = new_rows(g_output.ptr(), node.rows, node.readout_dtype);
        a.g_readout = data_of(g_readout.ptr(), "the gradient of readout");
      }
      for (size_t code = 0; code < torch->dtypes.size(); ++code) {
        if (torch->dtypes[code].is(node.readout_dtype)) a.readout_dtype = static_cast<DType>(code);
      }
      a.readout_elements = row_extent(g_output.ptr()).elements;
    }

    std::vector<py::object> g_moved;
    std::vector<LeafGrad> table;
    for (size_t l = 0; l < g_next.size(); ++l) {
      const py::object result = l < g_results.size() ? g_results[l] : py::none();
      const bool read = node.shared && l == 0 && !g_output.is_none();
      if (result.is_none() && g_next[l].is_none() && !read) {
        g_moved.push_back(py::none());
        continue;
      }
      const py::object& like = !result.is_none() ? result : !g_next[l].is_none() ? g_next[l] : g_output;
      py::object g = new_rows(like.ptr(), node.rows, read ? node.readout_dtype : py::none());
      const Extent extent = row_extent(g.ptr());
      table.push_back({data.real(result, "the gradient of state"),
                       data.real(g_next[l], "the gradient of state"),
                       data_of(g.ptr(), "the gradient of state"), extent.elements, extent.dtype});
      g_moved.push_back(std::move(g));
    }

    py::object g_logits, g_before;
    if (node.act) {
      PyObject *logits = PyTuple_GET_ITEM(saved, 0), *before = PyTuple_GET_ITEM(saved, 1);
      a.act = node.params;
      a.readout = data.real(PyTuple_GET_ITEM(saved, 2), "readout");
      a.logits = data.real(logits, "logits");
      a.logits_dtype = dtype_of(logits);
      a.accumulated = data(before, "accumulated");
      a.g_next = data.real(g_carry, "the gradient of accumulated");
      a.g_cost = data.real(g_total, "the gradient of cost");
      g_logits = new_rows(logits, node.rows, torch->dtypes[node.wide ? 1 : 0]);
      g_before = new_rows(before, node.rows);
      a.g_logits = data_of(g_logits.ptr(), "the gradient of logits");
      a.g_accumulated = data_of(g_before.ptr(), "the gradient of accumulated");
    }

    // More leaves than one call takes go in several calls; all other tensors go with the first.
    size_t begin = 0;
    {
      py::gil_scoped_release unlocked;
      do {
        a.n_leaves = 0;
        while (begin < table.size() && a.n_leaves < kMaxLeaves) a.leaves[a.n_leaves++] = table[begin++];
        halt_backward_cpu(a);
        a.readout_elements = 0;
        a.logits = nullptr;
      } while (begin < table.size());
    }

    std::vector<py::object> out{py::none()};
    if (node.act) {
      const py::object dtype = attribute(PyTuple_GET_ITEM(saved, 0), torch->dtype);
      if (!dtype.is(torch->dtypes[node.wide ? 1 : 0])) g_logits = attribute(g_logits.ptr(), torch->to)(dtype);
      out.push_back(g_logits);
      out.push_back(g_before);
    }
    if (node.has_readout) {
      if (!node.shared) out.push_back(g_readout);
      out.push_back(g_output);
    }
    if (node.totals > 0) out.push_back(g_total);
    const auto leaves = static_cast<std::ptrdiff_t>(node.leaves);
    out.insert(out.end(), g_moved.begin(), g_moved.begin() + leaves);
    if (node.has_results) out.insert(out.end(), g_results.begin(), g_results.end());
    out.insert(out.end(), g_moved.begin() + leaves, g_moved.end());
    const py::object all = owned(PyTuple_New(static_cast<Py_ssize_t>(out.size())));
    for (size_t i = 0; i < out.size(); ++i)
      PyTuple_SET_ITEM(all.ptr(), static_cast<Py_ssize_t>(i), out[i].release().ptr());
    return py::object(all).release().ptr();
  });
}

}  // namespace adaptcomp
