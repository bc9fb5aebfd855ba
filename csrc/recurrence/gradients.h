// The cells on a tile of rows, backward: the gates are computed again from the states on the tape.
//
// The gradients in the parameters are sums of outer products. These are added in groups of rows, so that the
// sums pass through the caches once for a group and not once for a pass.
#pragma once

#include "recurrence/cells.h"

namespace adaptcomp {
namespace AC_ISA {

// Sums of outer products of rows `left` and `right`, and of the rows `left`, which are a parameter's gradient
// [gates n, m] and its bias'. A left row has each gate in whole vectors. A thread has its own sums.
template <class C>
class OuterSums {
 public:
  static constexpr int64_t kRoom = 3 * kRows;

  // `columns`: of a left row, at least the gates'. `copies`: whether the right rows are copied, because they
  // do not stay until the group is added. `given`: where the sums go in the end, if they may be made there.
  OuterSums(int64_t gates, int64_t n, int64_t m, int64_t columns, bool copies, void* given)
      : gates_(gates),
        n_(n),
        m_(m),
        width_(padded<C>(m)),
        columns_(columns),
        in_place_(given && m == width_ && columns == gates * n),
        left_(kRoom * apart<C>(columns)),
        copies_(copies ? kRoom * apart<C>(width_) : 0),
        own_(in_place_ ? 0 : columns * width_),
        sums_(in_place_ ? static_cast<C*>(given) : own_.get()),
        column_sums_(columns) {
    if (copies)
      for (int64_t i = 0; i < kRoom; ++i) right_[i] = copies_.get() + i * apart<C>(width_);
  }
  // The place of row r of the next rows, of which there are at most kRows.
  C* left(int64_t r) { return left_.get() + (held_ + r) * apart<C>(columns_); }
  C* copy(int64_t r) { return copies_.get() + (held_ + r) * apart<C>(width_); }
  void point(int64_t r, const C* right) { right_[held_ + r] = right; }
  void hold(int64_t rows) {
    held_ += rows;
    if (held_ + kRows > kRoom) add();
  }
  void add() {
    if (held_ == 0) return;
    if (width_ > 0) outer(sums_, fresh_, columns_, width_, left_.get(), apart<C>(columns_), right_, held_);
    for (int64_t j = 0; j < columns_; j += kLanes<C>) {
      vec<C> sum = fresh_ ? vec<C>{} : load_vec(column_sums_.get() + j);
      for (int64_t r = 0; r < held_; ++r) sum = sum + load_vec(left_.get() + r * apart<C>(columns_) + j);
      store_vec(column_sums_.get() + j, sum);
    }
    held_ = 0;
    fresh_ = false;
  }
  void finish() {
    add();
    if (!fresh_) return;  // there was no row
    zero_row(sums_, columns_ * width_);
    zero_row(column_sums_.get(), columns_);
  }
  // Writes, or adds if it is not `first`, the sums to parameter and bias; null: not wanted.
  void give(bool first, void* weight, void* bias) const {
    const int64_t gate = padded<C>(n_);
    for (int64_t g = 0; g < gates_; ++g) {
      if (bias) add_row(static_cast<C*>(bias) + g * n_, column_sums_.get() + g * gate, n_, first);
      if (!weight || weight == sums_) continue;
      for (int64_t u = 0; u < n_; ++u)
        add_row(static_cast<C*>(weight) + (g * n_ + u) * m_, sums_ + (g * gate + u) * width_, m_, first);
    }
  }

 private:
  static void add_row(C* to, const C* from, int64_t n, bool first) {
    if (first) return copy_row(to, from, n);
    for (int64_t i = 0; i < n; ++i) to[i] += from[i];
  }

  int64_t gates_, n_, m_, width_, columns_;
  bool in_place_, fresh_ = true;
  int64_t held_ = 0;
  Scratch<C> left_, copies_, own_;
  C* sums_;
  Scratch<C> column_sums_;
  const C* right_[kRoom];
};

// What a pass of the backward walk takes and gives, for every slot.
template <class C>
struct Walk {
  RowPointers<const C> from[2];  // the tensors of the state before the step
  RowPointers<const C> given;    // the input's part of the gates
  RowPointers<C> g_state[2];     // in: the gradient in the state after the step; out: in the one before it
  RowPointers<C> g_given;        // the gradient in the input's part is added
  int64_t used;
};

template <class C>
AC_INLINE void add_vec(C* to, vec<C> v) {
  store_vec(to, load_vec(to) + v);
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
  explicit GatedBack(const RecurrenceBackward& a)
      : state(Blocks<C, 2>::backward(static_cast<const C*>(a.run.weight_hh), kGates, a.run.dim, a.run.dim)),
        input(Blocks<C, 2>::backward(static_cast<const C*>(a.run.weight_ih), kGates, a.run.dim,
                                     a.g_x ? a.run.input : 0)) {}
  Blocks<C, 2> state, input;
};

template <class C, class UnitGrad>
class GatedGradient {
 public:
  using Cell = UnitCell<C, typename UnitGrad::Unit>;
  static constexpr int kGates = Cell::kGates, kLeaves = Cell::kLeaves;
  using Back = GatedBack<C, kGates>;
  GatedGradient(const RecurrenceBackward& a, const Cell& cell, const Back& back, bool first)
      : cell_(cell),
        back_(back),
        sums_(kGates, a.run.dim, a.run.dim, cell.state.columns, false, first ? a.g_weight_hh : nullptr) {}
  void finish() { sums_.finish(); }
  void give(const RecurrenceBackward& a, bool first) const { sums_.give(first, a.g_weight_hh, a.g_bias_hh); }

  // Gathers the rows of the group, writes their gradients, and passes them back to the state.
  void step(const Walk<C>& w) {
    const C* left[kRows];
    for (int64_t r = 0; r < w.used; ++r) {
      left[r] = sums_.left(r);
      sums_.point(r, w.from[0][r]);
    }
    product(w.from[0], w.used, cell_.state.blocks, cell_.state.bias.get(),
            [&](int64_t r, int64_t b, const vec<C>(&sum)[kGates]) __attribute__((always_inline)) {
              const int64_t j = b * kLanes<C>, width = cell_.width;
              vec<C> parts[kGates], before[kLeaves], g[kLeaves];
              load_gates<C>(w.given[r] + kGates * j, parts);
              load_leaves<C>(w.from, r, j, before);
              for (int l = 0; l < kLeaves; ++l) g[l] = load_vec(w.g_state[l][r] + j);
              const UnitGrad grad(typename Cell::Unit(parts, sum, before), sum, before, g);
              C *to = sums_.left(r) + j, *given = w.g_given[r] + j;
              for (int i = 0; i < kGates; ++i) {
                store_vec(to + i * width, grad.own[i]);
                add_vec(given + i * width, grad.given[i]);
              }
              for (int l = 0; l < kLeaves; ++l) store_vec(w.g_state[l][r] + j, g[l]);
            });
    add_product<C>(left, w.used, back_.state, cell_.width, w.g_state[0]);
    sums_.hold(w.used);
  }

 private:
  const Cell& cell_;
  const Back& back_;
  OuterSums<C> sums_;
};
template <class C>
using GruGradient = GatedGradient<C, GruUnitGrad<VectorMath<C>>>;
template <class C>
using LstmGradient = GatedGradient<C, LstmUnitGrad<VectorMath<C>>>;

template <class C>
struct MlpBack {
  explicit MlpBack(const RecurrenceBackward& a)
      : down(Blocks<C, 2>::backward(static_cast<const C*>(a.run.weight2), 1, a.run.dim, a.run.hidden)),
        up(Blocks<C, 2>::backward(static_cast<const C*>(a.run.weight_hh), 1, a.run.hidden, a.run.dim)),
        input(Blocks<C, 2>::backward(static_cast<const C*>(a.run.weight_ih), 1, a.run.hidden,
                                     a.g_x ? a.run.input : 0)) {}
  Blocks<C, 2> down, up, input;
};

template <class C>
class MlpGradient {
 public:
  static constexpr int64_t kGates = 1;
  using Back = MlpBack<C>;
  MlpGradient(const RecurrenceBackward& a, const MlpCell<C>& cell, const Back& back, bool first)
      : cell_(cell),
        back_(back),
        up_(1, a.run.hidden, a.run.dim, cell.up.columns, false, first ? a.g_weight_hh : nullptr),
        down_(1, a.run.dim, a.run.hidden, cell.width, true, first ? a.g_weight2 : nullptr),
        slopes_(kRows * cell.up.columns) {}
  void finish() {
    up_.finish();
    down_.finish();
  }
  void give(const RecurrenceBackward& a, bool first) const {
    up_.give(first, a.g_weight_hh, nullptr);
    down_.give(first, a.g_weight2, a.g_bias2);
  }
  void step(const Walk<C>& w) {
    const int64_t columns = cell_.up.columns, width = cell_.width;
    const RowPointers<C> g_state = w.g_state[0];
    const C *of_hidden[kRows], *of_state[kRows];
    for (int64_t r = 0; r < w.used; ++r) {
      of_hidden[r] = up_.left(r);
      up_.point(r, w.from[0][r]);
      of_state[r] = down_.left(r);
      copy_row(down_.left(r), g_state[r], width);
      if (!cell_.residual) zero_row(g_state[r], width);
    }
    product(w.from[0], w.used, cell_.up.blocks,
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
