// The cells on a tile of rows. The parameters are packed once per call, for all threads. A gate begins at a
// whole vector, so that the gates of a unit are found at the same place of each.
#pragma once

#include "common/simd_math.h"
#include "common/slots.h"
#include "recurrence/recurrence.h"

namespace adaptcomp {
namespace AC_ISA {

// A layer [gates n, k] as panels with padded gates, and its bias.
template <class C>
struct GateLayer {
  GateLayer(const void* weight, const void* bias, int64_t gates, int64_t n, int64_t k)
      : width(padded<C>(n)), columns(gates * width), bias(columns) {
    zero_row(this->bias.get(), columns);
    for (int64_t g = 0; bias && g < gates; ++g)
      copy_row(this->bias.get() + g * width, static_cast<const C*>(bias) + g * n, n);
    if (!weight) return;
    if (width == n) {
      panels = Panels<C>(static_cast<const C*>(weight), k, columns, 1, k);
      return;
    }
    Scratch<C> spread(columns * k);
    zero_row(spread.get(), columns * k);
    for (int64_t g = 0; g < gates; ++g)
      copy_row(spread.get() + g * width * k, static_cast<const C*>(weight) + g * n * k, n * k);
    panels = Panels<C>(spread.get(), k, columns, 1, k);
  }
  // out[r, j] = bias[j] + sum_i x[r, i] weight[j, i]
  __attribute__((noinline)) void apply(const C* x, int64_t stride, int64_t rows, C* out) const {
    if (panels.inner() == 0) {
      for (int64_t r = 0; r < rows; ++r) copy_row(out + r * columns, bias.get(), columns);
      return;
    }
    product(x, stride, rows, panels, {bias.get(), 0},
            [&](int64_t r, int64_t j, vec<C> v)
                __attribute__((always_inline)) { store_vec(out + r * columns + j, v); });
  }

  int64_t width, columns;  // of a gate; of all gates
  Scratch<C> bias;
  Panels<C> panels;
};

template <class C>
AC_INLINE vec<C> sigmoid_vec(vec<C> x) {
  return reciprocal(exp_vec(-x) + C(1));
}

// A cell computes, for the first `used` slots, the next state from the state and the row's part of the gates.
// It has room for scratch_columns() numbers for each slot. Here its gates add a layer of the input and a
// layer of the state.
template <class C, int kGates>
class GatedCell {
 public:
  explicit GatedCell(const Recurrence& a)
      : input(a.weight_ih, a.bias_ih, kGates, a.dim, a.input),
        state_(a.weight_hh, a.bias_hh, kGates, a.dim, a.dim) {}
  int64_t scratch_columns() const { return state_.columns; }
  GateLayer<C> input;

 protected:
  GateLayer<C> state_;
};

template <class C>
class GruCell : public GatedCell<C, 3> {
 public:
  static constexpr int kLeaves = 1;
  using GatedCell<C, 3>::GatedCell, GatedCell<C, 3>::input;
  void step(C* const* from, const C* given, int64_t used, C* gates, C* const* to) const {
    const int64_t width = state_.width;
    state_.apply(from[0], width, used, gates);
    for (int64_t r = 0; r < used; ++r) {
      const C *gi = given + r * input.columns, *gh = gates + r * state_.columns, *h = from[0] + r * width;
      C* out = to[0] + r * width;
      for (int64_t j = 0; j < width; j += kLanes<C>) {
        const vec<C> reset = sigmoid_vec<C>(load_vec(gi + j) + load_vec(gh + j));
        const vec<C> keep = sigmoid_vec<C>(load_vec(gi + width + j) + load_vec(gh + width + j));
        const vec<C> fresh = tanh_vec(fma(reset, load_vec(gh + 2 * width + j), load_vec(gi + 2 * width + j)));
        store_vec(out + j, fma(keep, load_vec(h + j) - fresh, fresh));
      }
    }
  }

 private:
  using GatedCell<C, 3>::state_;
};

template <class C>
class LstmCell : public GatedCell<C, 4> {
 public:
  static constexpr int kLeaves = 2;
  using GatedCell<C, 4>::GatedCell, GatedCell<C, 4>::input;
  void step(C* const* from, const C* given, int64_t used, C* gates, C* const* to) const {
    const int64_t width = state_.width;
    state_.apply(from[0], width, used, gates);
    for (int64_t r = 0; r < used; ++r) {
      const C *gi = given + r * input.columns, *gh = gates + r * state_.columns, *c = from[1] + r * width;
      C *h_out = to[0] + r * width, *c_out = to[1] + r * width;
      const auto gate = [&](int64_t g, int64_t j) __attribute__((always_inline)) {
        return load_vec(gi + g * width + j) + load_vec(gh + g * width + j);
      };
      for (int64_t j = 0; j < width; j += kLanes<C>) {
        const vec<C> in = sigmoid_vec<C>(gate(0, j)), forget = sigmoid_vec<C>(gate(1, j));
        const vec<C> cell = fma(forget, load_vec(c + j), in * tanh_vec(gate(2, j)));
        store_vec(c_out + j, cell);
        store_vec(h_out + j, sigmoid_vec<C>(gate(3, j)) * tanh_vec(cell));
      }
    }
  }

 private:
  using GatedCell<C, 4>::state_;
};

template <class C>
class MlpCell {
 public:
  static constexpr int kLeaves = 1;
  explicit MlpCell(const Recurrence& a)
      : input(a.weight_ih, a.bias_ih, 1, a.hidden, a.input),
        up_(a.weight_hh, nullptr, 1, a.hidden, a.dim),
        down_(a.weight2, a.bias2, 1, a.dim, a.hidden),
        activation_(a.activation),
        residual_(a.residual) {}
  int64_t scratch_columns() const { return up_.columns; }
  void step(C* const* from, const C* given, int64_t used, C* hidden, C* const* to) const {
    const int64_t width = down_.width;
    product(from[0], width, used, up_.panels, {given, input.columns},
            [&](int64_t r, int64_t j, vec<C> v)
                __attribute__((always_inline)) { store_vec(hidden + r * up_.columns + j, v); });
    dispatch_activation(activation_, [&](auto activation) {
      for (int64_t i = 0; i < used * up_.columns; i += kLanes<C>) {
        const vec<C> v = load_vec(hidden + i);
        store_vec(hidden + i, activate<decltype(activation)::value, true, false, VectorMath<C>>(v).value);
      }
    });
    down_.apply(hidden, up_.columns, used, to[0]);
    if (!residual_) return;
    for (int64_t r = 0; r < used; ++r) {
      const C* s = from[0] + r * width;
      C* out = to[0] + r * width;
      for (int64_t j = 0; j < width; j += kLanes<C>) store_vec(out + j, load_vec(s + j) + load_vec(out + j));
    }
  }
  GateLayer<C> input;

 private:
  GateLayer<C> up_, down_;
  Activation activation_;
  bool residual_;
};

}  // namespace AC_ISA
}  // namespace adaptcomp
