// The cells on a tile of rows, forward. The parameters are packed once per call, for all threads.
#pragma once

#include "common/simd_math.h"
#include "recurrence/products.h"
#include "recurrence/recurrence.h"
#include "recurrence/rows.h"

namespace adaptcomp {
namespace AC_ISA {

// The most slots of a tile. More than a descent's: each pass reads all weights, which lie in the second-level
// cache.
constexpr int64_t kRows = 32;

// The slots of a tile are given by pointers to their rows, each in whole vectors.
template <class C>
using RowPointers = C* const*;

// A layer of P gates, or of one gate in blocks of P vectors, and its bias. A row of its results has the
// vectors of a block together: [units][gate][lane]. Beyond the units it has the last one again.
template <class C, int P>
struct Layer {
  Layer(const void* weight, const void* bias, int64_t gates, int64_t n, int64_t k)
      : blocks(Blocks<C, P>::transposed(static_cast<const C*>(weight), gates, n, weight ? k : 0)),
        columns(blocks.count() * Blocks<C, P>::kWide),
        bias(columns) {
    zero_row(this->bias.get(), columns);
    for (int64_t g = 0; bias && g < gates; ++g)
      for (int64_t u = 0; u < columns / gates; ++u)
        this->bias.get()[(u / kLanes<C> * gates + g) * kLanes<C> + u % kLanes<C>] =
            static_cast<const C*>(bias)[g * n + least(u, n - 1)];
  }
  // out[r] = bias + weight x[r]; a row of `out` has `columns` numbers.
  __attribute__((noinline)) void apply(RowPointers<const C> x, int64_t rows, RowPointers<C> out) const {
    product(x, rows, blocks, bias.get(),
            [&](int64_t r, int64_t b, const vec<C>(&sum)[P]) __attribute__((always_inline)) {
              for (int p = 0; p < P; ++p) store_vec(out[r] + (b * P + p) * kLanes<C>, sum[p]);
            });
  }
  Blocks<C, P> blocks;
  int64_t columns;  // of a row of the result
  Scratch<C> bias;
};

// A cell computes the next state of `used` slots from the state and the row's part of the gates, which a
// Layer of the input has computed. It may use `scratch`, scratch_columns() numbers for each slot.
template <class C, int kGates>
struct GatedCell {
  explicit GatedCell(const Recurrence& a)
      : width(padded<C>(a.dim)),
        input(a.weight_ih, a.bias_ih, kGates, a.dim, a.input),
        state(a.weight_hh, a.bias_hh, kGates, a.dim, a.dim) {}
  static int64_t scratch_columns() { return 0; }
  double multiply_adds() const { return static_cast<double>(state.columns) * static_cast<double>(width); }
  int64_t width;
  Layer<C, kGates> input, state;
};

// The vectors of a unit's gates at `from`, in the layout of a Layer, and of its numbers in the tensors of the
// state.
template <class C, int G>
AC_INLINE void load_gates(const C* from, vec<C> (&to)[G]) {
  for (int g = 0; g < G; ++g) to[g] = load_vec(from + g * kLanes<C>);
}
template <class C, int L>
AC_INLINE void load_leaves(const RowPointers<const C>* state, int64_t r, int64_t j, vec<C> (&to)[L]) {
  for (int l = 0; l < L; ++l) to[l] = load_vec(state[l][r] + j);
}

template <class C, class U>
struct UnitCell : GatedCell<C, U::kGates> {
  using Unit = U;
  static constexpr int kGates = U::kGates, kLeaves = U::kLeaves;
  using GatedCell<C, kGates>::GatedCell;
  void step(const RowPointers<const C>* from, RowPointers<const C> given, int64_t used, C*,
            const RowPointers<C>* to) const {
    const RowPointers<const C> input = from[0];
    product(input, used, this->state.blocks, this->state.bias.get(),
            [&](int64_t r, int64_t b, const vec<C>(&sum)[kGates]) __attribute__((always_inline)) {
              const int64_t j = b * kLanes<C>;
              vec<C> parts[kGates], before[kLeaves], after[kLeaves];
              load_gates<C>(given[r] + kGates * j, parts);
              load_leaves<C>(from, r, j, before);
              Unit(parts, sum, before).next(before, after);
              for (int l = 0; l < kLeaves; ++l) store_vec(to[l][r] + j, after[l]);
            });
  }
};
template <class C>
using GruCell = UnitCell<C, GruUnit<VectorMath<C>>>;
template <class C>
using LstmCell = UnitCell<C, LstmUnit<VectorMath<C>>>;

template <class C>
struct MlpCell {
  static constexpr int kLeaves = 1;
  explicit MlpCell(const Recurrence& a)
      : width(padded<C>(a.dim)),
        input(a.weight_ih, a.bias_ih, 1, a.hidden, a.input),
        up(a.weight_hh, nullptr, 1, a.hidden, a.dim),
        down(a.weight2, a.bias2, 1, a.dim, a.hidden),
        activation(a.activation),
        residual(a.residual) {}
  int64_t scratch_columns() const { return up.columns; }
  double multiply_adds() const { return 2 * static_cast<double>(up.columns) * static_cast<double>(width); }
  void step(const RowPointers<const C>* from, RowPointers<const C> given, int64_t used, C* scratch,
            const RowPointers<C>* to) const {
    const C* hidden[kRows];
    for (int64_t r = 0; r < used; ++r) hidden[r] = scratch + r * up.columns;
    product(from[0], used, up.blocks,
            [&](int64_t r, int64_t b, const vec<C>(&sum)[2]) __attribute__((always_inline)) {
              for (int p = 0; p < 2; ++p) {
                const int64_t j = (b * 2 + p) * kLanes<C>;
                store_vec(scratch + r * up.columns + j, load_vec(given[r] + j) + sum[p]);
              }
            });
    dispatch_activation(activation, [&](auto a) {
      for (int64_t i = 0; i < used * up.columns; i += kLanes<C>) {
        const vec<C> v = load_vec(scratch + i);
        store_vec(scratch + i, activate<decltype(a)::value, true, false, VectorMath<C>>(v).value);
      }
    });
    const auto before = from[0];
    const auto after = to[0];
    product(hidden, used, down.blocks, down.bias.get(),
            [&](int64_t r, int64_t b, const vec<C>(&sum)[2]) __attribute__((always_inline)) {
              for (int p = 0; p < 2; ++p) {
                const int64_t j = (b * 2 + p) * kLanes<C>;
                if (j < width) store_vec(after[r] + j, residual ? load_vec(before[r] + j) + sum[p] : sum[p]);
              }
            });
  }
  int64_t width;
  Layer<C, 2> input, up, down;
  Activation activation;
  bool residual;
};

}  // namespace AC_ISA
}  // namespace adaptcomp
