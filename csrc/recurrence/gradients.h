// The cells on a tile of rows, backward: the gates are computed again from the states on the tape.
//
// The gradients in the parameters are sums of outer products. These are added in groups of rows, so that the
// sums pass through the caches once for a group and not once for a pass.
#pragma once

#include "recurrence/cells.h"

namespace adaptcomp {
namespace AC_ISA {

// Sums of outer products of rows `left` [n] and `right` [m], and of the rows `left`. A thread has its own.
template <class C>
class OuterSums {
 public:
  static constexpr int64_t kRoom = 3 * kRows;

  // `copies`: whether the right rows are copied, because they do not stay until the group is added.
  OuterSums(int64_t n, int64_t m, bool copies)
      : n_(n),
        m_(padded<C>(m)),
        left_(kRoom * n),
        copies_(copies ? kRoom * m_ : 0),
        sums_(n * m_),
        column_sums_(n) {
    zero_row(sums_.get(), n * m_);
    zero_row(column_sums_.get(), n);
    if (copies)
      for (int64_t i = 0; i < kRoom; ++i) right_[i] = copies_.get() + i * m_;
  }
  // The place of row r of the next rows, of which there are at most kRows.
  C* left(int64_t r) { return left_.get() + (held_ + r) * n_; }
  C* copy(int64_t r) { return copies_.get() + (held_ + r) * m_; }
  void point(int64_t r, const C* right) { right_[held_ + r] = right; }
  void hold(int64_t rows) {
    held_ += rows;
    if (held_ + kRows > kRoom) add();
  }
  void add() {
    if (held_ == 0) return;
    if (m_ > 0) outer(sums_.get(), n_, m_, left_.get(), n_, right_, held_);
    for (int64_t j = 0; j < n_; j += kLanes<C>) {
      vec<C> sum = load_vec(column_sums_.get() + j);
      for (int64_t r = 0; r < held_; ++r) sum = sum + load_vec(left_.get() + r * n_ + j);
      store_vec(column_sums_.get() + j, sum);
    }
    held_ = 0;
  }
  int64_t held() const { return held_; }
  // Writes, or adds if it is not `first`, the sums to a parameter [gates n, m] and its bias; null: not
  // wanted.
  void give(int64_t gates, int64_t n, int64_t m, bool first, void* weight, void* bias) const {
    for (int64_t g = 0; g < gates; ++g)
      for (int64_t u = 0; u < n; ++u) {
        const int64_t place = place_of<C>(gates, g, u);
        if (weight) add_row(static_cast<C*>(weight) + (g * n + u) * m, sums_.get() + place * m_, m, first);
        if (bias) add_row(static_cast<C*>(bias) + g * n + u, column_sums_.get() + place, 1, first);
      }
  }

 private:
  static void add_row(C* to, const C* from, int64_t n, bool first) {
    if (first) return copy_row(to, from, n);
    for (int64_t i = 0; i < n; ++i) to[i] += from[i];
  }

  int64_t n_, m_, held_ = 0;
  Scratch<C> left_, copies_, sums_, column_sums_;
  const C* right_[kRoom];
};

// What a pass of the backward walk takes and gives, for every slot.
template <class C>
struct Walk {
  const C* const* from;        // the state before the step
  const C* const* cells;       // of the LSTM: its second tensor
  RowPointers<const C> given;  // the input's part of the gates
  RowPointers<C> g_state[2];   // in: the gradient in the state after the step; out: in the one before it
  RowPointers<C> g_given;      // the gradient in the input's part is added
  int64_t used;
};

template <class C>
AC_INLINE void add_vec(C* to, vec<C> v) {
  store_vec(to, load_vec(to) + v);
}
template <class C>
AC_INLINE vec<C> sigmoid_slope(vec<C> sigma) {
  return sigma * (C(1) - sigma);
}

// g_state += left matrix, for the rows of the group that is being filled.
template <class C>
AC_INLINE void add_product(const C* const* left, int64_t rows, const Blocks<C, 2>& matrix, int64_t width,
                           RowPointers<C> to) {
  product(left, rows, matrix,
          [&](int64_t r, int64_t b, const vec<C>(&sum)[2]) __attribute__((always_inline)) {
            for (int p = 0; p < 2; ++p) {
              const int64_t j = (b * 2 + p) * kLanes<C>;
              if (j < width) add_vec(to[r] + j, sum[p]);
            }
          });
}

// The matrices of the backward pass, for all threads, and a thread's sums.
template <class C, int kGates>
struct GatedBack {
  explicit GatedBack(const Recurrence& a)
      : state(Blocks<C, 2>::backward(static_cast<const C*>(a.weight_hh), kGates, a.dim, a.dim)),
        input(Blocks<C, 2>::backward(static_cast<const C*>(a.weight_ih), kGates, a.dim, a.input)) {}
  Blocks<C, 2> state, input;
};

template <class C, class Cell, int kGates>
class GatedGradient {
 public:
  static constexpr int64_t kGatesOf = kGates;
  using Back = GatedBack<C, kGates>;
  GatedGradient(const Recurrence& a, const Cell& cell, const Back& back)
      : cell_(cell), back_(back), sums_(cell.state.columns, a.dim, false) {}
  void finish() { sums_.add(); }
  void give(const RecurrenceBackward& a, bool first) const {
    sums_.give(kGates, a.run.dim, a.run.dim, first, a.g_weight_hh, a.g_bias_hh);
  }

 protected:
  // Gathers the rows of the group, makes gates(r, b, sums) write them, and passes them back to the state.
  template <class Gates>
  AC_INLINE void walk(const Walk<C>& w, const Gates& gates) {
    const C* left[kRows];
    for (int64_t r = 0; r < w.used; ++r) {
      left[r] = sums_.left(r);
      sums_.point(r, w.from[r]);
    }
    product(w.from, w.used, cell_.state.blocks, cell_.state.bias.get(), gates);
    add_product<C>(left, w.used, back_.state, cell_.width, w.g_state[0]);
    sums_.hold(w.used);
  }
  const Cell& cell_;
  const Back& back_;
  OuterSums<C> sums_;
};

template <class C>
class GruGradient : public GatedGradient<C, GruCell<C>, 3> {
 public:
  using GatedGradient<C, GruCell<C>, 3>::GatedGradient;
  void step(const Walk<C>& w) {
    const RowPointers<C> g_state = w.g_state[0];
    this->walk(w, [&](int64_t r, int64_t b, const vec<C>(&sum)[3]) __attribute__((always_inline)) {
      const int64_t j = b * kLanes<C>;
      const GruGates<C> s(w.given[r] + 3 * j, sum);
      const vec<C> h = load_vec(w.from[r] + j), g = load_vec(g_state[r] + j);
      const vec<C> g_fresh = g * (C(1) - s.keep) * (C(1) - s.fresh * s.fresh);
      const vec<C> g_keep = g * (h - s.fresh) * sigmoid_slope<C>(s.keep);
      const vec<C> g_reset = g_fresh * sum[2] * sigmoid_slope<C>(s.reset);
      C *to = this->sums_.left(r) + 3 * j, *given = w.g_given[r] + 3 * j;
      store_vec(to, g_reset);
      store_vec(to + kLanes<C>, g_keep);
      store_vec(to + 2 * kLanes<C>, g_fresh * s.reset);  // the reset gate lies between the two layers
      add_vec(given, g_reset);
      add_vec(given + kLanes<C>, g_keep);
      add_vec(given + 2 * kLanes<C>, g_fresh);
      store_vec(g_state[r] + j, g * s.keep);
    });
  }
};

template <class C>
class LstmGradient : public GatedGradient<C, LstmCell<C>, 4> {
 public:
  using GatedGradient<C, LstmCell<C>, 4>::GatedGradient;
  void step(const Walk<C>& w) {
    const RowPointers<C> g_state = w.g_state[0], g_cell = w.g_state[1];
    this->walk(w, [&](int64_t r, int64_t b, const vec<C>(&sum)[4]) __attribute__((always_inline)) {
      const int64_t j = b * kLanes<C>;
      const vec<C> before = load_vec(w.cells[r] + j), g = load_vec(g_state[r] + j);
      const LstmGates<C> s(w.given[r] + 4 * j, sum, before);
      const vec<C> of_cell = fma(g * s.out, C(1) - s.squashed * s.squashed, load_vec(g_cell[r] + j));
      const vec<C> of[4] = {
          of_cell * s.fresh * sigmoid_slope<C>(s.in), of_cell * before * sigmoid_slope<C>(s.forget),
          of_cell * s.in * (C(1) - s.fresh * s.fresh), g * s.squashed * sigmoid_slope<C>(s.out)};
      C *to = this->sums_.left(r) + 4 * j, *given = w.g_given[r] + 4 * j;
      for (int i = 0; i < 4; ++i) {
        store_vec(to + i * kLanes<C>, of[i]);
        add_vec(given + i * kLanes<C>, of[i]);
      }
      store_vec(g_cell[r] + j, of_cell * s.forget);
      store_vec(g_state[r] + j, vec<C>{});  // all of it goes through the gates
    });
  }
};

template <class C>
struct MlpBack {
  explicit MlpBack(const Recurrence& a)
      : down(Blocks<C, 2>::backward(static_cast<const C*>(a.weight2), 1, a.dim, a.hidden)),
        up(Blocks<C, 2>::backward(static_cast<const C*>(a.weight_hh), 1, a.hidden, a.dim)),
        input(Blocks<C, 2>::backward(static_cast<const C*>(a.weight_ih), 1, a.hidden, a.input)) {}
  Blocks<C, 2> down, up, input;
};

template <class C>
class MlpGradient {
 public:
  static constexpr int64_t kGatesOf = 1;
  using Back = MlpBack<C>;
  MlpGradient(const Recurrence& a, const MlpCell<C>& cell, const Back& back)
      : cell_(cell),
        back_(back),
        up_(cell.up.columns, a.dim, false),
        down_(cell.width, cell.up.columns, true),
        slopes_(kRows * cell.up.columns) {}
  void finish() {
    up_.add();
    down_.add();
  }
  void give(const RecurrenceBackward& a, bool first) const {
    up_.give(1, a.run.hidden, a.run.dim, first, a.g_weight_hh, nullptr);
    down_.give(1, a.run.dim, a.run.hidden, first, a.g_weight2, a.g_bias2);
  }
  void step(const Walk<C>& w) {
    const int64_t columns = cell_.up.columns, width = cell_.width;
    const RowPointers<C> g_state = w.g_state[0];
    const C *of_hidden[kRows], *of_state[kRows];
    for (int64_t r = 0; r < w.used; ++r) {
      of_hidden[r] = up_.left(r);
      up_.point(r, w.from[r]);
      of_state[r] = down_.left(r);
      copy_row(down_.left(r), g_state[r], width);
      if (!cell_.residual) zero_row(g_state[r], width);
    }
    product(w.from, w.used, cell_.up.blocks,
            [&](int64_t r, int64_t b, const vec<C>(&sum)[2]) __attribute__((always_inline)) {
              for (int p = 0; p < 2; ++p) {
                const int64_t j = (b * 2 + p) * kLanes<C>;
                store_vec(slopes_.get() + r * columns + j, load_vec(w.given[r] + j) + sum[p]);
              }
            });
    dispatch_activation(cell_.activation, [&](auto a) {
      for (int64_t r = 0; r < w.used; ++r)
        for (int64_t j = 0; j < columns; j += kLanes<C>) {
          C* at = slopes_.get() + r * columns + j;
          const auto v = activate<decltype(a)::value, true, false, VectorMath<C>>(load_vec(at));
          store_vec(down_.copy(r) + j, v.value);
          store_vec(at, v.first);
        }
    });
    product(of_state, w.used, back_.down,
            [&](int64_t r, int64_t b, const vec<C>(&sum)[2]) __attribute__((always_inline)) {
              for (int p = 0; p < 2; ++p) {
                const int64_t j = (b * 2 + p) * kLanes<C>;
                const vec<C> g = sum[p] * load_vec(slopes_.get() + r * columns + j);
                store_vec(up_.left(r) + j, g);
                add_vec(w.g_given[r] + j, g);
              }
            });
    add_product<C>(of_hidden, w.used, back_.up, width, g_state);
    up_.hold(w.used);
    down_.hold(w.used);
  }

 private:
  const MlpCell<C>& cell_;
  const Back& back_;
  OuterSums<C> up_, down_;
  Scratch<C> slopes_;
};

}  // namespace AC_ISA
}  // namespace adaptcomp
