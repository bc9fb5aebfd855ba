// What the tiles of both passes share: the rows that wait for a slot, and the tape's memory.
#pragma once

#include "recurrence/cells.h"

namespace adaptcomp {
namespace AC_ISA {

// The number of threads that is worth waking. The number of steps is not known; half of the most is a guess
// that wakes no thread for little.
inline int64_t threads_of(const Recurrence& a, double work) {
  return least(a.rows, threads_for(work * static_cast<double>(a.rows) *
                                   (static_cast<double>(a.halt.max_steps) + 1) / 2));
}

template <class C>
AC_INLINE void exchange(C*& a, C*& b) {
  C* before = a;
  a = b;
  b = before;
}

// PonderNet's numbers of a step.
inline PonderParams ponder_params(const Recurrence& a, int64_t step) {
  const double prior = static_cast<double>(step - a.halt.min_steps) * a.log_decay - a.log_total;
  return {step, a.halt.min_steps, a.halt.max_steps, prior, a.halt.threshold};
}
// What PonderNet keeps of a step, behind the state on the tape.
template <class C>
struct Pondered {
  C logit, log_survival;  // log_survival: before the step
};

// Whether the tape may point to the initial states that the caller keeps.
template <class C, int kLeaves>
bool stays_in_place(const Recurrence& a, int64_t width) {
  return kLeaves == 1 && a.dim == width;
}

// The rows that are next, and the input's part of their gates.
template <class C, class Cell>
class Waiting {
 public:
  Waiting(const Recurrence& a, const Cell& cell, int64_t capacity)
      : a_(a), cell_(cell), capacity_(capacity), given_(capacity * cell.input.columns) {}
  // The next row, or -1. When none waits, `capacity` rows or those before `end` are taken from the queue.
  int64_t next(int64_t* queue, int64_t end) {
    if (next_ == end_) {
      const int64_t begin = __atomic_fetch_add(queue, capacity_, __ATOMIC_RELAXED);
      if (begin >= end) return -1;
      first_ = next_ = begin;
      end_ = least(end, begin + capacity_);
      const C* x[kRows];
      C* given[kRows];
      for (int64_t i = 0; i < end_ - begin; ++i) {
        x[i] = static_cast<const C*>(a_.x) + (a_.x ? (begin + i) * a_.input : 0);
        given[i] = given_.get() + i * cell_.input.columns;
      }
      cell_.input.apply(x, end_ - begin, given);
    }
    return next_++;
  }
  const C* given(int64_t row) const { return given_.get() + (row - first_) * cell_.input.columns; }

 private:
  const Recurrence& a_;
  const Cell& cell_;
  int64_t capacity_;
  Scratch<C> given_;
  int64_t first_ = 0, next_ = 0, end_ = 0;
};

// A thread's place in the tape.
template <class C>
class TapeWriter {
 public:
  // `chunk`: about how many records are taken at once; `numbers`: of a state.
  TapeWriter(Tape* tape, int64_t numbers, int64_t chunk)
      : tape_(tape), numbers_(numbers), chunk_(chunk < kLeast ? kLeast : chunk) {}
  C* state() {
    if (states_ == 0) {
      state_ = static_cast<C*>(tape_->take(chunk_ * numbers_ * static_cast<int64_t>(sizeof(C))));
      states_ = chunk_;
    }
    --states_;
    C* taken = state_;
    state_ += numbers_;
    return taken;
  }
  Record* record(const Record* before, const C* state) {
    if (records_ == 0) {
      record_ = static_cast<Record*>(tape_->take(chunk_ * static_cast<int64_t>(sizeof(Record))));
      records_ = chunk_;
    }
    --records_;
    *record_ = {before, state, 0.0, 0};
    return record_++;
  }

 private:
  static constexpr int64_t kLeast = 16;
  Tape* tape_;
  int64_t numbers_, chunk_, states_ = 0, records_ = 0;
  C* state_ = nullptr;
  Record* record_ = nullptr;
};

}  // namespace AC_ISA
}  // namespace adaptcomp
