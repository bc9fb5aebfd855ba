// A descent on an energy that PyTorch evaluates, between two evaluations; and the parts of it that have a
// gradient.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "bindings/arguments.h"
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

// A float, or a tensor of the compute type: one number or one for each row.
inline PerRow per_row(const py::handle& numbers) {
  if (!is_tensor(numbers.ptr())) return {nullptr, false, numbers.cast<double>()};
  return {data_of(numbers.ptr(), "step_size or noise"), Shape(numbers.ptr()).dims() > 0, 0.0};
}

class DescentRun {
 public:
  // tensors, all contiguous, None where there is none: y, energy, steps, status, kept, velocity, moving,
  // scale, sample; row, flag, running (CUDA). step_size, sigma: a float or a tensor. integers: the rule's,
  // device. numbers: the rule's.
  DescentRun(py::tuple tensors, py::object step_size, py::object sigma, const py::list& integers,
             const py::list& numbers)
      : tensors_(std::move(tensors)), step_size_(std::move(step_size)), sigma_(std::move(sigma)) {
    Arguments in(integers);
    a_.rule = descent_rule(in, numbers);
    device_ = in.integer();
    in.done();
    const Extent row = row_extent(address(0).ptr());
    a_.elements = row.elements;
    a_.dtype = row.dtype;
    a_.y = data(0);
    a_.energy = data(1);
    a_.steps = static_cast<int64_t*>(data(2));
    a_.status = static_cast<int8_t*>(data(3));
    a_.kept = data(4);
    a_.velocity = data(5);
    a_.moving = static_cast<uint8_t*>(data(6));
    a_.scale = data(7);
    a_.sample = static_cast<const int64_t*>(data(8));
    a_.row = static_cast<int64_t*>(data(9));
    a_.flag = static_cast<int8_t*>(data(10));
    running_on_device_ = static_cast<int64_t*>(data(11));
    a_.step_size = per_row(step_size_);
    a_.sigma = per_row(sigma_);
    if (device_ == kCpu) {
      row_.resize(static_cast<size_t>(rows_of(address(0).ptr())));
      std::iota(row_.begin(), row_.end(), int64_t{0});
      index_.resize(row_.size());
      a_.row = row_.data();
    }
  }

  // Judges the points of step `step`. `gradient`: None after the last step if nothing depends on it.
  // `accepted`: uint8 [rows] out, or None. Returns the next points of the rows that go on, None where none
  // does; on CUDA, where only the device knows, those of all rows.
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

  // On CUDA: `row` of the next block, which was packed into new memory. The caller holds it.
  void set_rows(const py::object& row) { a_.row = static_cast<int64_t*>(data_of(row.ptr(), "row")); }

  // int64 [rows that go on]: the block rows, of the block that was judged last, that the next one is made of.
  // CPU.
  py::object index() const {
    const py::object out = new_rows(address(2).ptr(), counts_.running);
    std::copy_n(index_.data(), counts_.running, static_cast<int64_t*>(data_of(out.ptr(), "index")));
    return out;
  }

  int64_t accepted() const { return counts_.accepted; }  // on the CPU, as the next
  int64_t broken() const { return counts_.broken; }

 private:
  py::object address(size_t i) const { return tensors_[i]; }
  void* data(size_t i) const {
    const py::object tensor = address(i);
    return tensor.is_none() ? nullptr : data_of(tensor.ptr(), "a tensor of the descent");
  }

  py::tuple tensors_;  // held for their memory
  py::object step_size_, sigma_;
  DescentStep a_{};
  DescentCounts counts_{0, 0, 0};
  int64_t* running_on_device_;
  int64_t device_;
  Like like_{address(0).ptr()};
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
