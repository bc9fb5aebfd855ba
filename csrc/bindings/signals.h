// Python's signals, such as Ctrl-C, while a kernel runs without the interpreter's lock.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>

#include "common/interrupt.h"

namespace adaptcomp {

namespace py = pybind11;

// Looks for signals every 50 ms.
class Signals {
 public:
  Interrupt* interrupt() { return &interrupt_; }
  // Raises the exception of a signal handler; to be called with the lock.
  void raise() const {
    if (interrupt_.stopped) throw py::error_already_set();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static bool look(void* self) {
    auto* of = static_cast<Signals*>(self);
    const auto now = Clock::now();
    if (of->interrupt_.stopped || now - of->last_ < std::chrono::milliseconds(50)) return false;
    of->last_ = now;
    py::gil_scoped_acquire locked;
    return PyErr_CheckSignals() != 0;
  }
  Interrupt interrupt_{look, this, 0};
  Clock::time_point last_ = Clock::now();
};

}  // namespace adaptcomp
