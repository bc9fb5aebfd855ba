// What tiles of slots share: a slot holds a row until the row has ended, and then takes the next waiting row.
#pragma once

#include <sched.h>

#include "common/interrupt.h"
#include "common/parallel.h"
#include "common/tiles.h"

namespace adaptcomp {
namespace AC_ISA {

constexpr int64_t kSlots = 16;

AC_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class C>
AC_INLINE void copy_row(C* to, const C* from, int64_t n) {
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof(C));
}
template <class C>
AC_INLINE void zero_row(C* to, int64_t n) {
  std::memset(to, 0, static_cast<size_t>(n) * sizeof(C));
}
template <class C>
AC_INLINE C dot(const C* a, const C* b, int64_t n) {
  vec<C> sum{};
  for (int64_t i = 0; i < n; i += kLanes<C>) sum = fma(load_vec(a + i), load_vec(b + i), sum);
  return sum_lanes<C>(sum);
}
// `before` plus zero, or NaN in lanes where x is infinite or NaN.
template <class C>
AC_INLINE vec<C> infinities(vec<C> x, vec<C> before) {
  return fma(x, vec<C>{}, before);
}
// The number of threads that is worth waking for this number of multiply-adds.
AC_INLINE int64_t threads_for(double multiply_adds) {
  constexpr double kPerThread = 5e5;
  constexpr double kMost = 1024;
  return 1 + static_cast<int64_t>(multiply_adds < kMost * kPerThread ? multiply_adds / kPerThread : kMost);
}

// Asks the caller about every million multiply-adds, which take less than a millisecond, whether to stop.
class Pace {
 public:
  // `work`: multiply-adds of a pass for one slot.
  Pace(Interrupt* interrupt, double work, bool caller)
      : interrupt_(interrupt),
        caller_(caller),
        every_(1 + static_cast<int64_t>(1e6 / (kSlots * work))),
        left_(every_) {}
  // Whether to stop; called at every pass over the slots.
  bool stop() {
    if (--left_ > 0) return false;
    left_ = every_;
    return ask();
  }
  bool ask() const {
    if (!interrupt_) return false;
    if (caller_ && interrupt_->asked(interrupt_->self))
      __atomic_store_n(&interrupt_->stopped, 1, __ATOMIC_RELAXED);
    return __atomic_load_n(&interrupt_->stopped, __ATOMIC_RELAXED) != 0;
  }

 private:
  Interrupt* interrupt_;
  bool caller_;
  int64_t every_, left_;
};

// Runs body(t, of, pace) on a team. Its first thread, the caller's, keeps asking while it waits for the
// others. The only exception of a body is that of missing memory, which must not leave its thread.
template <class Body>
void paced_team(Interrupt* interrupt, double work, int64_t wanted, const Body& body) {
  int64_t done = 0;
  int failed = 0;
  parallel_team(wanted, [&](int64_t t, int64_t of) {
    Pace pace(interrupt, work, t == 0);
    try {
      body(t, of, pace);
    } catch (...) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    }
    if (t > 0) {
      __atomic_fetch_add(&done, 1, __ATOMIC_RELEASE);
    } else {
      while (__atomic_load_n(&done, __ATOMIC_ACQUIRE) < of - 1) {
        pace.ask();
        sched_yield();
      }
    }
  });
  if (failed) throw_out_of_memory();
}

}  // namespace AC_ISA
}  // namespace adaptcomp
