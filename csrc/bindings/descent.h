// The work of a descent between two evaluations of an energy by PyTorch, and its parts with a gradient.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/functions.h"
#include "bindings/torch.h"
#include "descent/descent.h"

namespace adaptcomp {

// max_steps, on_gradient, if_lower, noisy, seed; tol, momentum, clip, low, high, backtracking
inline DescentRule descent_rule(Arguments& in, const py::list& numbers) {
  const auto number = [&](size_t i) { return numbers[i].cast<double>(); };
  DescentRule rule{};
  rule.max_steps = in.integer();
  rule.on_gradient = in.integer() != 0;
  rule.if_lower = in.integer() != 0;
  rule.noisy = in.integer() != 0;
  rule.seed = static_cast<uint64_t>(in.integer());
  rule.tol = number(0);
  rule.momentum = number(1);
  rule.clip = number(2);
  rule.low = number(3);
  rule.high = number(4);
  rule.backtracking = number(5);
  return rule;
}

// Reads a float, or a tensor of the compute type with one number or one for each row.
inline PerRow per_row(const py::handle& numbers) {
  if (!is_tensor(numbers.ptr())) return {nullptr, false, numbers.cast<double>()};
  return {data_of(numbers.ptr(), "step_size or noise"), Shape(numbers.ptr()).dims() > 0, 0.0};
}

class DescentRun {
 public:
  // Tensors are contiguous, or None; `row`, `flag` and `running` are for CUDA. `step_size` and `sigma` are
  // floats or tensors. `rule` has the two lists of `descent_rule`.
  static constexpr std::initializer_list<const char*> kNames{
      "y",          "energy", "steps", "status",  "kept",      "velocity", "moving", "scale",
      "sample_ids", "row",    "flag",  "running", "step_size", "sigma",    "rule",   "device"};
  explicit DescentRun(py::list arguments) : values_(std::move(arguments)) {
    Arguments in(values_);
    const Extent row = row_extent(y().ptr());
    a_.elements = row.elements;
    a_.dtype = row.dtype;
    a_.y = in.pointer<void>("y");
    a_.energy = in.pointer<void>("energy");
    a_.steps = in.pointer<int64_t>("steps");
    a_.status = in.pointer<int8_t>("status");
    a_.kept = in.pointer<void>("kept");
    a_.velocity = in.pointer<void>("velocity");
    a_.moving = in.pointer<uint8_t>("moving");
    a_.scale = in.pointer<void>("scale");
    a_.sample = in.pointer<const int64_t>("sample_ids");
    a_.row = in.pointer<int64_t>("row");
    a_.flag = in.pointer<int8_t>("flag");
    running_on_device_ = in.pointer<int64_t>("running");
    a_.step_size = per_row(in.object());
    a_.sigma = per_row(in.object());
    const auto rule = in.object().cast<std::pair<py::list, py::list>>();
    Arguments integers(rule.first);
    a_.rule = descent_rule(integers, rule.second);
    integers.done();
    device_ = in.integer();
    in.done();
    if (device_ == kCpu) {
      row_.resize(static_cast<size_t>(rows_of(y().ptr())));
      std::iota(row_.begin(), row_.end(), int64_t{0});
      index_.resize(row_.size());
      a_.row = row_.data();
    }
  }

  // Judges the points of step `step`. `gradient` may be None after the last step if the rule does not read
  // it. `accepted`: uint8 [rows] out, or None. Returns the next points of the active rows, None if there is
  // none; on CUDA, where only the device knows them, those of all rows.
  py::object advance(const py::object& point, const py::object& value, const py::object& gradient,
                     const py::object& accepted, int64_t step, int64_t stream) {
    Contiguous plain;
    a_.rows = rows_of(point.ptr());
    a_.step = step;
    a_.point = data_of(point.ptr(), "y");
    a_.value = plain.real(value, "energy");
    a_.value_dtype = dtype_of(value.ptr());
    a_.gradient = plain.real(gradient, "the energy's gradient");
    a_.accepted = accepted.is_none() ? nullptr : static_cast<uint8_t*>(data_of(accepted.ptr(), "accepted"));
    py::object next = py::none();
    a_.next = nullptr;
    if (step < a_.rule.max_steps) {
      next = new_rows(point.ptr(), a_.rows);
      a_.next = data_of(next.ptr(), "y");
    }
    const Place where(device_, reinterpret_cast<void*>(static_cast<uintptr_t>(stream)));
    AC_RUN(where, counts_ = descent_step_cpu(a_, index_.data()),
           descent_step_cuda(a_, running_on_device_, where.device, where.stream));
    if (!where.on_cpu()) return next;
    if (counts_.running == 0) return py::none();
    if (counts_.running < a_.rows) {
      like_.shrink(next.ptr(), counts_.running);
    }
    return next;
  }

  // Sets `row` of the next block after a compaction on CUDA; the caller holds it.
  void set_rows(const py::object& row) { a_.row = static_cast<int64_t*>(data_of(row.ptr(), "row")); }

  // int64 [active rows]: the rows of the last judged block that the next block has; on the CPU.
  py::object index() const {
    const py::object out = new_rows(steps().ptr(), counts_.running);
    std::copy_n(index_.data(), counts_.running, static_cast<int64_t*>(data_of(out.ptr(), "index")));
    return out;
  }

  int64_t accepted() const { return counts_.accepted; }  // on the CPU, like the next
  int64_t broken() const { return counts_.broken; }

 private:
  py::object y() const { return values_[0]; }
  py::object steps() const { return values_[2]; }

  py::list values_;  // held for the tensors' memory
  DescentStep a_{};
  DescentCounts counts_{0, 0, 0};
  int64_t* running_on_device_;
  int64_t device_;
  Like like_{y().ptr()};
  std::vector<int64_t> row_, index_;  // on the CPU
};

// y, gradient, velocity, noise, next, next_velocity: contiguous, or None. integers: the rule's, place.
// numbers: the rule's.
inline void descent_update(const py::tuple& tensors, const py::object& step_size, const py::list& integers,
                           const py::list& numbers) {
  const auto data = [&](size_t i) -> void* {
    const py::object tensor = tensors[i];
    return tensor.is_none() ? nullptr : data_of(tensor.ptr(), "a tensor of the descent");
  };
  Arguments in(integers);
  DescentUpdate a{};
  a.rule = descent_rule(in, numbers);
  const Place where = place(in);
  const py::object y = tensors[0];
  const Extent row = row_extent(y.ptr());
  a.rows = rows_of(y.ptr());
  a.elements = row.elements;
  a.dtype = row.dtype;
  a.y = data(0);
  a.gradient = data(1);
  a.velocity = data(2);
  a.noise = data(3);
  a.next = data(4);
  a.next_velocity = data(5);
  a.step_size = per_row(step_size);
  AC_RUN(where, descent_update_cpu(a), descent_update_cuda(a, where.device, where.stream));
}

// rows, elements, step, wide, sample, out, seed, place
inline void descent_normals(const py::list& integers) {
  Arguments in(integers);
  DescentNormals a{};
  a.rows = in.integer();
  a.elements = in.integer();
  a.step = in.integer();
  a.wide = in.integer() != 0;
  a.sample = in.integers("sample");
  a.out = in.pointer<void>();
  a.rule.seed = static_cast<uint64_t>(in.integer());
  const Place where = place(in);
  AC_RUN(where, descent_normals_cpu(a), descent_normals_cuda(a, where.device, where.stream));
}

}  // namespace adaptcomp
