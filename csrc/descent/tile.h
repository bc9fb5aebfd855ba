// Fused descents on the CPU. A tile of rows runs in a core's cache: every pass evaluates the energy and its
// gradient at the points of all slots at once, judges the points, and proposes the next ones. A slot whose
// row has ended takes the next waiting row, so that the tile stays full; when no row waits, the active slots
// are compacted.
#pragma once

#include "common/slots.h"
#include "descent/rows.h"
#include "descent/whole.h"

namespace adaptcomp {
namespace AC_ISA {

template <class C>
AC_INLINE C setting(const void* data, int64_t stride, int64_t row) {
  return static_cast<const C*>(data)[row * stride];
}
template <class C>
AC_INLINE void noise_row(const DescentRule& rule, const int64_t* ids, int64_t row, int64_t step, C* eta,
                         int64_t dim) {
  C four[4];
  const auto sample = static_cast<uint64_t>(ids ? ids[row] : row);
  for (int64_t i = 0; i < dim; i += 4) {
    normals<C>(rule, sample, step, i / 4, four);
    for (int64_t j = 0; j < 4 && i + j < dim; ++j) eta[i + j] = four[j];
  }
}

// p = clamp(y + sigma eta - rate m); a null eta is no noise.
template <class C>
AC_INLINE vec<C> next_point(const DescentRule& rule, const C* y, const C* eta, C sigma, C rate, const C* m,
                            int64_t i) {
  vec<C> x = load_vec(y + i);
  if (eta) x = fma(splat(sigma), load_vec(eta + i), x);
  x = fma(splat(-rate), load_vec(m + i), x);
  return min_vec(splat(C(rule.high)), max_vec(splat(C(rule.low)), x));
}

// The interface of an energy. Points and gradients are [slot, padded(dim)] for at most kSlots slots; scratch
// is padded to whole_blocks.
template <class C>
class TileEnergy {
 public:
  virtual ~TileEnergy() = default;
  // Reads the row's own arguments when the row enters a slot, and moves them with it.
  virtual void fill(int64_t slot, int64_t row) = 0;
  virtual void move(int64_t to, int64_t from) = 0;
  // e = E(y), and its gradient g if `gradient`, for the first `used` slots.
  virtual void evaluate(const C* y, int64_t used, bool gradient, C* g, C* e) = 0;
  // hr = H r and phi = <r, g>; adds the derivatives of phi in the parameters to their sums, and those in the
  // rows' own arguments to the slots' values.
  virtual void gradient_product(const C* y, const C* r, int64_t used, C* hr, C* phi) = 0;
  // Writes the derivatives in the row's own arguments.
  virtual void finish(int64_t slot, int64_t row) = 0;
};

template <class C>
class DescentTile {
  struct Slot {
    int64_t row, step;
    C e, s, alpha, sigma;
    bool velocity, moving;  // m holds a velocity; it took part in the present proposal
    bool finite;            // the present proposal is finite
  };

 public:
  DescentTile(const Descent& a, TileEnergy<C>& energy, int64_t capacity)
      : a_(a),
        capacity_(capacity),
        slots_of_scratch_(whole_blocks(capacity)),
        stride_(padded<C>(a.dim)),
        plain_(a.rule.momentum <= 0 && a.rule.clip <= 0 && !a.rule.noisy && a.rule.backtracking <= 0),
        energy_(energy),
        scratch_((5 * slots_of_scratch_ + 1) * stride_),
        p_(scratch_.get()),
        g_(p_ + slots_of_scratch_ * stride_),
        y_(g_ + slots_of_scratch_ * stride_),
        kept_(y_ + slots_of_scratch_ * stride_),
        m_(kept_ + slots_of_scratch_ * stride_),
        eta_(m_ + slots_of_scratch_ * stride_) {
    zero_row(scratch_.get(), (5 * slots_of_scratch_ + 1) * stride_);
  }

  // Takes rows from `next` until there are no more, or the caller stops it.
  void run(int64_t* next, Pace& pace) {
    int64_t used = 0;
    C e[kSlots];
    for (;;) {
      while (used < capacity_ && fill(used, next)) ++used;
      if (used == 0 || pace.stop()) return;
      bool gradient = a_.rule.on_gradient;
      for (int64_t i = 0; i < used; ++i) gradient |= slots_[i].step < a_.rule.max_steps;
      energy_.evaluate(p_, used, gradient, g_, e);
      for (int64_t i = 0; i < used;) {
        if (advance(i, e[i]) || fill(i, next)) {
          ++i;
        } else if (i != --used) {
          move(i, used);
          e[i] = e[used];
        }
      }
    }
  }

 private:
  C* at(C* of, int64_t slot) const { return of + slot * stride_; }

  bool fill(int64_t slot, int64_t* next) {
    const int64_t row = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    if (row >= a_.rows) return false;
    slots_[slot] = {row,
                    0,
                    C(0),
                    C(1),
                    setting<C>(a_.step_size, a_.step_size_stride, row),
                    a_.rule.noisy ? setting<C>(a_.noise, a_.noise_stride, row) : C(0),
                    false,
                    false,
                    true};
    const C* y0 = static_cast<const C*>(a_.y0) + row * a_.dim;
    copy_row(at(p_, slot), y0, a_.dim);
    copy_row(at(y_, slot), y0, a_.dim);
    for (int64_t i = a_.dim; i < stride_; ++i) at(p_, slot)[i] = C(0);
    vec<C> bad{};
    for (int64_t i = 0; i < stride_; i += kLanes<C>) bad = infinities<C>(load_vec(at(p_, slot) + i), bad);
    slots_[slot].finite = !any_nan(bad);
    zero_row(at(m_, slot), stride_);
    energy_.fill(slot, row);
    return true;
  }

  void move(int64_t to, int64_t from) {
    slots_[to] = slots_[from];
    for (C* of : {p_, g_, y_, kept_, m_}) copy_row(at(of, to), at(of, from), stride_);
    energy_.move(to, from);
  }

  // Judges the slot's point; proposes the next one, or ends the row and returns false.
  bool advance(int64_t slot, C e_new) {
    const DescentRule& rule = a_.rule;
    Slot& s = slots_[slot];
    C *p = at(p_, slot), *y = at(y_, slot), *kept = at(kept_, slot), *m = at(m_, slot);
    const C* g = at(g_, slot);
    const C norm = rule.on_gradient ? std::sqrt(dot(g, g, stride_)) : C(0);
    const Verdict verdict = judge<C>(rule, s.step, s.e, e_new, s.finite && is_finite(e_new), norm, s.moving);
    const C used_scale = s.s;
    if (verdict.accept) {
      s.e = e_new;
      if (!plain_ || verdict.status != kRunning) {  // else the next proposal copies the point
        copy_row(y, p, stride_);
        copy_row(kept, g, stride_);
      }
    } else {
      s.velocity = false;
      zero_row(m, stride_);
      if (rule.backtracking > 0) s.s *= C(rule.backtracking);
    }
    if (s.step > 0) {
      const int64_t at_step = s.row * rule.max_steps + s.step - 1;
      if (a_.path) copy_row(static_cast<C*>(a_.path) + at_step * a_.dim, verdict.accept ? p : y, a_.dim);
      if (a_.scale) static_cast<C*>(a_.scale)[at_step] = verdict.accept ? used_scale : C(0);
    }
    if (verdict.status != kRunning) {
      // A starting point that is not finite reports its own energy.
      copy_row(static_cast<C*>(a_.y) + s.row * a_.dim, y, a_.dim);
      static_cast<C*>(a_.energy)[s.row] = s.step == 0 ? e_new : s.e;
      a_.steps[s.row] = s.step;
      a_.status[s.row] = verdict.status;
      return false;
    }
    ++s.step;
    vec<C> bad{};
    if (plain_) {  // the point was accepted, because a rejection ends the row
      const vec<C> rate = splat(-s.alpha), low = splat(C(rule.low)), high = splat(C(rule.high));
      for (int64_t i = 0; i < stride_; i += kLanes<C>) {
        const vec<C> from = load_vec(p + i);
        const vec<C> x = min_vec(high, max_vec(low, fma(rate, load_vec(g + i), from)));
        bad = infinities<C>(x, bad);
        store_vec(y + i, from);
        store_vec(p + i, x);
      }
    } else {
      propose(s, slot);
      for (int64_t i = 0; i < stride_; i += kLanes<C>) bad = infinities<C>(load_vec(p + i), bad);
    }
    for (int64_t i = a_.dim; i < stride_; ++i) p[i] = C(0);  // a clamp whose range excludes zero changes them
    s.finite = !any_nan(bad);
    return true;
  }

  // Proposes the next point from y and its gradient, for any rule.
  void propose(Slot& s, int64_t slot) {
    const DescentRule& rule = a_.rule;
    C *p = at(p_, slot), *y = at(y_, slot), *kept = at(kept_, slot), *m = at(m_, slot);
    const C factor = rule.clip > 0 ? clip_factor<C>(rule, std::sqrt(dot(kept, kept, stride_))) : C(1);
    const C* direction = kept;
    if (rule.momentum > 0 || rule.clip > 0) {
      for (int64_t i = 0; i < stride_; i += kLanes<C>)
        store_vec(m + i, fma(splat(C(rule.momentum)), load_vec(m + i), splat(factor) * load_vec(kept + i)));
      direction = m;
      s.moving = rule.momentum > 0 && s.velocity;
      s.velocity = true;
      if (a_.velocity)
        copy_row(static_cast<C*>(a_.velocity) + (s.row * rule.max_steps + s.step - 1) * a_.dim, m, a_.dim);
    }
    if (rule.noisy) noise_row(rule, a_.sample_ids, s.row, s.step, eta_, a_.dim);
    const C* eta = rule.noisy ? eta_ : nullptr;
    for (int64_t i = 0; i < stride_; i += kLanes<C>)
      store_vec(p + i, next_point(rule, y, eta, s.sigma, s.alpha * s.s, direction, i));
  }

  const Descent& a_;
  int64_t capacity_, slots_of_scratch_, stride_;
  bool plain_;  // a step is p = clamp(y - alpha g), and a rejection ends the row
  TileEnergy<C>& energy_;
  Slot slots_[kSlots];
  Scratch<C> scratch_;
  C *p_, *g_, *y_, *kept_, *m_, *eta_;
};

// make(capacity, sums) returns a TileEnergy by value; `work` is the number of multiply-adds of a row's step.
template <class C, class Make>
void descend(const Descent& a, double work, const Make& make) {
  int64_t next = 0;
  const double total = work * static_cast<double>(a.rows) * static_cast<double>(a.rule.max_steps);
  paced_team(a.interrupt, work + 16.0 * static_cast<double>(a.dim), least(a.rows, threads_for(total)),
             [&](int64_t, int64_t of, Pace& pace) {
               // No more slots than a thread's share: otherwise the first thread would take all rows of a
               // small batch.
               const int64_t capacity = least(kSlots, (a.rows + of - 1) / of);
               auto energy = make(capacity, static_cast<C*>(nullptr));
               DescentTile<C>(a, energy, capacity).run(&next, pace);
             });
}

// Sums over many terms, in two stages: a single float accumulator would lose half of its digits.
template <class C>
class Sums {
 public:
  Sums(C* total, int64_t size) : total_(total), size_(size), recent_(size) {
    zero_row(total_, size_);
    zero_row(recent_.get(), size_);
  }
  // The first stage, to which terms are added.
  C* recent() const { return recent_.get(); }
  // Has to be called after each addition.
  void added() {
    if (++additions_ == kTogether) fold();
  }
  void fold() {
    additions_ = 0;
    for (int64_t i = 0; i < size_; ++i) total_[i] += recent_.get()[i];
    zero_row(recent_.get(), size_);
  }

 private:
  static constexpr int kTogether = 32;
  C* total_;
  int64_t size_;
  Scratch<C> recent_;
  int additions_ = 0;
};

// The gradient of a descent: the same tile, backward in time. Every slot goes through its row's steps from
// the last one to the first.
template <class C>
class DescentBackwardTile {
  struct Slot {
    int64_t row, step, passed;  // the batch row; the present step; the number of steps passed through
    C alpha, sigma, g_alpha, g_sigma;
  };

 public:
  DescentBackwardTile(const DescentBackward& a, TileEnergy<C>& energy, Sums<C>& sums, int64_t capacity)
      : a_(a),
        capacity_(capacity),
        slots_of_scratch_(whole_blocks(capacity)),
        stride_(padded<C>(a.dim)),
        limited_(a.rule.clip > 0 || a.rule.low > -HUGE_VAL || a.rule.high < HUGE_VAL),
        energy_(energy),
        sums_(sums),
        scratch_((7 * slots_of_scratch_ + 1) * stride_),
        v_(scratch_.get()),
        y_(v_ + slots_of_scratch_ * stride_),
        r_(y_ + slots_of_scratch_ * stride_),
        hr_(r_ + slots_of_scratch_ * stride_),
        g_(hr_ + slots_of_scratch_ * stride_),
        m_(g_ + slots_of_scratch_ * stride_),
        g_m_(m_ + slots_of_scratch_ * stride_),
        eta_(g_m_ + slots_of_scratch_ * stride_) {
    zero_row(scratch_.get(), (7 * slots_of_scratch_ + 1) * stride_);
  }

  // Runs the rows begin, ..., end - 1, in this order, so that sums over rows are the same in every run.
  void run(int64_t begin, int64_t end, Pace& pace) {
    next_ = begin;
    end_ = end;
    int64_t used = 0;
    C phi[kSlots], unused[kSlots];
    for (;;) {
      while (used < capacity_ && fill(used)) ++used;
      if (used == 0 || pace.stop()) return sums_.fold();
      if (limited_) energy_.evaluate(y_, used, true, g_, unused);
      for (int64_t i = 0; i < used; ++i) into_gradient(i);
      energy_.gradient_product(y_, r_, used, hr_, phi);
      sums_.added();
      for (int64_t i = 0; i < used;) {
        if (retreat(i, phi[i]) || fill(i)) {
          ++i;
        } else if (i != --used) {
          move(i, used);
          phi[i] = phi[used];
        }
      }
    }
  }

 private:
  C* at(C* of, int64_t slot) const { return of + slot * stride_; }
  int64_t at_step(const Slot& s) const { return s.row * a_.rule.max_steps + s.step - 1; }

  bool fill(int64_t slot) {
    while (next_ < end_) {
      Slot& s = slots_[slot];
      s = {next_,
           a_.steps[next_],
           0,
           setting<C>(a_.step_size, a_.step_size_stride, next_),
           a_.rule.noisy ? setting<C>(a_.noise, a_.noise_stride, next_) : C(0),
           C(0),
           C(0)};
      ++next_;
      C* v = at(v_, slot);
      zero_row(v, stride_);
      zero_row(at(g_m_, slot), stride_);
      if (a_.g_y) copy_row(v, static_cast<const C*>(a_.g_y) + s.row * a_.dim, a_.dim);
      energy_.fill(slot, s.row);
      if (find_step(slot)) return true;
    }
    return false;
  }

  void move(int64_t to, int64_t from) {
    slots_[to] = slots_[from];
    for (C* of : {v_, y_, r_, hr_, g_, m_, g_m_}) copy_row(at(of, to), at(of, from), stride_);
    energy_.move(to, from);
  }

  // Adds the loss's gradient in y after the present step, and skips rejected steps, which changed nothing.
  // Writes the row's results and returns false if no step is left.
  bool find_step(int64_t slot) {
    Slot& s = slots_[slot];
    C* v = at(v_, slot);
    for (; s.step > 0; --s.step) {
      if (a_.last_steps > 0 && s.passed == a_.last_steps) break;
      if (a_.g_path) {
        const C* g_path = static_cast<const C*>(a_.g_path) + at_step(s) * a_.dim;
        for (int64_t i = 0; i < a_.dim; ++i) v[i] += g_path[i];
      }
      if (static_cast<const C*>(a_.scale)[at_step(s)] != C(0)) {
        const C* y = s.step > 1 ? static_cast<const C*>(a_.path) + (at_step(s) - 1) * a_.dim
                                : static_cast<const C*>(a_.y0) + s.row * a_.dim;
        copy_row(at(y_, slot), y, a_.dim);
        return true;
      }
      zero_row(at(g_m_, slot), stride_);  // a rejection set the velocity to zero
      ++s.passed;
    }
    if (a_.last_steps > 0 && s.passed == a_.last_steps) zero_row(v, stride_);
    copy_row(static_cast<C*>(a_.g_y0) + s.row * a_.dim, v, a_.dim);
    static_cast<C*>(a_.g_step_size)[s.row] = s.g_alpha;
    if (a_.g_noise) static_cast<C*>(a_.g_noise)[s.row] = s.g_sigma;
    energy_.finish(slot, s.row);
    return false;
  }

  // Computes r, the gradient in g, from v, the gradient in the new point, through clamp, step and clip.
  void into_gradient(int64_t slot) {
    const DescentRule& rule = a_.rule;
    Slot& s = slots_[slot];
    C *v = at(v_, slot), *r = at(r_, slot), *m = at(m_, slot), *g_m = at(g_m_, slot);
    const C *g = at(g_, slot), *y = at(y_, slot);
    const C rate = s.alpha * static_cast<const C*>(a_.scale)[at_step(s)];
    if (rule.noisy) noise_row(rule, a_.sample_ids, s.row, s.step, eta_, a_.dim);
    C factor = C(1), norm = C(0);
    if (rule.clip > 0) {
      norm = std::sqrt(dot(g, g, stride_));
      factor = clip_factor<C>(rule, norm);
    }
    if (limited_) {
      if (rule.momentum > 0) {
        copy_row(m, static_cast<const C*>(a_.velocity) + at_step(s) * a_.dim, a_.dim);
      } else {
        for (int64_t i = 0; i < stride_; i += kLanes<C>) store_vec(m + i, splat(factor) * load_vec(g + i));
      }
      // A clamped element passes no gradient.
      const C low = C(rule.low), high = C(rule.high), sigma = s.sigma;
      for (int64_t i = 0; i < stride_; i += kLanes<C>) {
        vec<C> x = load_vec(y + i);
        if (rule.noisy) x = fma(splat(sigma), load_vec(eta_ + i), x);
        x = fma(splat(-rate), load_vec(m + i), x);
        const vec<C> passed = load_vec(v + i);
        store_vec(v + i, x < low ? vec<C>{} : (x > high ? vec<C>{} : passed));
      }
    }
    if (rule.noisy) s.g_sigma += dot(eta_, v, stride_);
    for (int64_t i = 0; i < stride_; i += kLanes<C>)
      store_vec(r + i, fma(splat(-rate), load_vec(v + i), load_vec(g_m + i)));
    if (rule.momentum > 0) {
      if (!limited_) copy_row(m, static_cast<const C*>(a_.velocity) + at_step(s) * a_.dim, a_.dim);
      for (int64_t i = 0; i < stride_; i += kLanes<C>)
        store_vec(g_m + i, splat(C(rule.momentum)) * load_vec(r + i));
    }
    if (rule.clip > 0 && factor != C(1)) {
      // clip(g) = c g / |g| passes no gradient along g.
      const C along = dot(g, r, stride_) / (norm * norm);
      for (int64_t i = 0; i < stride_; i += kLanes<C>)
        store_vec(r + i, splat(factor) * fma(splat(-along), load_vec(g + i), load_vec(r + i)));
    }
    if (limited_ || rule.momentum > 0)
      s.g_alpha -= dot(m, v, stride_) * static_cast<const C*>(a_.scale)[at_step(s)];
  }

  // Computes v of the step before, and goes to that step; returns false if no step is left.
  bool retreat(int64_t slot, C phi) {
    Slot& s = slots_[slot];
    C* v = at(v_, slot);
    const C* hr = at(hr_, slot);
    if (!limited_ && a_.rule.momentum <= 0)
      s.g_alpha += phi / s.alpha;  // r = -alpha s v, so <r, g> = -alpha s <v, g>
    if (a_.last_steps == 0 && s.step > 1) {
      zero_row(v, stride_);
      zero_row(at(g_m_, slot), stride_);
    } else {
      for (int64_t i = 0; i < stride_; i += kLanes<C>) store_vec(v + i, load_vec(v + i) + load_vec(hr + i));
    }
    --s.step;
    ++s.passed;
    return find_step(slot);
  }

  const DescentBackward& a_;
  int64_t capacity_, slots_of_scratch_, stride_;
  bool limited_;  // the backward step needs g itself, not only its product with a vector
  TileEnergy<C>& energy_;
  Sums<C>& sums_;
  Slot slots_[kSlots];
  int64_t next_ = 0, end_ = 0;
  Scratch<C> scratch_;
  C *v_, *y_, *r_, *hr_, *g_, *m_, *g_m_, *eta_;
};

// `sums` gets the derivatives in the parameters, `size` values. Every thread adds up its rows in order, and
// the threads' sums are added in order, so that the result depends on the number of threads, but on no race.
template <class C, class Make>
void descend_backward(const DescentBackward& a, double work, C* sums, int64_t size, const Make& make) {
  int64_t total = 0;
  for (int64_t row = 0; row < a.rows; ++row) total += a.steps[row];
  const int64_t most = least(a.rows, threads_for(3.5 * work * static_cast<double>(total))),
                wanted = most > 0 ? most : 1;
  Scratch<C> others((wanted - 1) * size);
  int64_t threads = 1;
  paced_team(a.interrupt, 3.5 * work + 16.0 * static_cast<double>(a.dim), wanted,
             [&](int64_t t, int64_t of, Pace& pace) {
               if (t == 0) threads = of;
               // Each thread gets contiguous rows with about the same number of steps.
               int64_t begin = a.rows, end = a.rows, before = 0;
               for (int64_t row = 0; row < a.rows; ++row) {
                 if (begin == a.rows && before * of >= total * t) begin = row;
                 if (end == a.rows && before * of >= total * (t + 1)) end = row;
                 before += a.steps[row];
               }
               if (t + 1 == of) end = a.rows;
               Sums<C> own(t == 0 ? sums : others.get() + (t - 1) * size, size);
               if (begin >= end) return;
               const int64_t capacity = least(kSlots, end - begin);
               auto energy = make(capacity, own.recent());
               DescentBackwardTile<C>(a, energy, own, capacity).run(begin, end, pace);
             });
  for (int64_t t = 1; t < threads; ++t)
    for (int64_t i = 0; i < size; ++i) sums[i] += others.get()[(t - 1) * size + i];
}

}  // namespace AC_ISA
}  // namespace adaptcomp
