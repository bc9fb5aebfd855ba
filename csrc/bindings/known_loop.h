// The setup of a halting loop whose tensors and settings have the form of an earlier one.
//
// What a run needs to know takes longer to find out than a small step takes to run. A KnownLoop remembers it;
// whether it still holds, the caller asks of all but the tensors.
#pragma once

#include <memory>
#include <vector>

#include "bindings/halt_run.h"
#include "bindings/ordinary.h"

namespace adaptcomp {

template <class... Objects>
py::list list_of_all(const Objects&... objects) {
  py::list list(sizeof...(objects));
  size_t at = 0;
  ((list[at++] = objects), ...);
  return list;
}

class KnownLoop {
 public:
  // `inputs` and `readout`: tensors of the form of the step's inputs and of the readout.
  static constexpr std::initializer_list<const char*> kNames{
      "state", "inputs", "schedule", "readout",      "apart",     "weighted",
      "wide",  "policy", "has_head", "reads_logits", "min_steps", "max_steps"};
  explicit KnownLoop(const py::list& arguments)
      : state_(arguments[0].cast<std::shared_ptr<StateLike>>()),
        schedule_(*arguments[2].cast<std::shared_ptr<Schedule>>()),
        readout_(arguments[3].ptr()),
        apart_(arguments[4].cast<bool>()),
        weighted_(arguments[5].cast<bool>()),
        wide_(arguments[6].cast<bool>()),
        policy_(arguments[7]),
        has_head_(arguments[8]),
        reads_logits_(arguments[9]),
        min_steps_(arguments[10]),
        max_steps_(arguments[11]) {
    for (const py::handle input : arguments[1]) inputs_.emplace_back(input.ptr());
  }

  // Runs a batch. `carry`: the policy's, or None where it has neither that nor a cost. `most`: the bytes of
  // the state below which the run is this loop's. Returns the results of the state's leaves, the output or
  // None where it is the first of these, steps, cost or None, status, and whether a row has ended NONFINITE
  // in training; None, and does nothing, if the tensors have another form.
  py::object run(const py::object& steps, const py::object& state, const py::object& inputs,
                 const py::object& read, const py::object& head, const py::object& threshold,
                 const py::object& signal, const py::object& parameter, const py::object& carry,
                 const py::object& inference_mode, const py::object& apply, int64_t most,
                 const py::object& python) const {
    std::vector<Like>& likes = state_->leaves();
    const bool tuple = state_->form() == Form::tuple;
    if (tuple && !(PyTuple_CheckExact(state.ptr()) &&
                   static_cast<size_t>(PyTuple_GET_SIZE(state.ptr())) == likes.size()))
      return py::none();
    int64_t rows = -1, bytes = 0;
    const auto fits = [&](PyObject* tensor, const Like& like) {
      Facts facts;
      if (!is_tensor(tensor) || !find_ordinary(tensor, facts) || facts.dims() == 0) return false;
      if (rows < 0) rows = facts.size(0);
      return like.is_block(rows, facts);
    };
    const auto leaf = [&](size_t l) {
      return tuple ? PyTuple_GET_ITEM(state.ptr(), static_cast<Py_ssize_t>(l)) : state.ptr();
    };
    for (size_t l = 0; l < likes.size(); ++l) {
      if (!fits(leaf(l), likes[l])) return py::none();
      bytes += likes[l].row_bytes() * rows;
    }
    if (bytes >= most || PyTuple_GET_SIZE(inputs.ptr()) != static_cast<Py_ssize_t>(inputs_.size()))
      return py::none();
    py::list packed, results;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      PyObject* input = PyTuple_GET_ITEM(inputs.ptr(), static_cast<Py_ssize_t>(i));
      if (!fits(input, inputs_[i])) return py::none();
      packed.append(py::handle(input));
    }
    for (size_t l = 0; l < likes.size(); ++l) results.append(new_rows(leaf(l), rows));
    const py::object taken = new_numbers(leaf(0), rows, torch->int64),
                     status = new_numbers(leaf(0), rows, torch->int8);
    const py::none none;
    py::object cost = none;
    if (!carry.is_none()) {
      cost = new_numbers(leaf(0), rows, torch->dtypes[wide_ ? 1 : 0]);
      zero(cost.ptr(), rows * static_cast<int64_t>(wide_ ? sizeof(double) : sizeof(float)));
    }
    const py::list arguments =
        list_of_all(py::cast(state_), py::cast(std::make_shared<Schedule>(schedule_)), results, packed,
                    py::int_(rows), none, none, taken, status, py::bool_(wide_), min_steps_, max_steps_,
                    policy_, has_head_, reads_logits_, threshold, signal, parameter, none, carry, cost, none,
                    inference_mode, apply, py::int_(kCpu));
    HaltRun run(arguments);
    run.expect_readout(readout_, apart_, weighted_);
    run.go_on(steps, rows, state, py::reinterpret_borrow<py::tuple>(inputs), read, head, python);
    py::object output = run.output();
    if (!output) output = none;
    return py::make_tuple(results, output, taken, cost, status, run.has_broken);
  }

 private:
  std::shared_ptr<StateLike> state_;
  std::vector<Like> inputs_;
  Schedule schedule_;
  Like readout_;
  bool apart_, weighted_, wide_;
  py::object policy_, has_head_, reads_logits_;
  py::object min_steps_, max_steps_;
};

}  // namespace adaptcomp
