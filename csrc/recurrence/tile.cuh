// The cells on a tile of rows in a block's shared memory, forward.
//
// A thread computes all gates of a unit for a few rows, so that the gates stay in registers, and what becomes
// of them is decided there. The rows of a thread's part are those of slots that hold a row, one after the
// other: a product takes time for rows that are there, whatever slots they lie in. Each element is one chain
// of multiply-adds over k, in order, as on the host: a row has the same bits alone and in any batch.
#pragma once

#include "common/scalar_math.h"
#include "common/tile_launch.cuh"
#include "mlp_energy/activated.cuh"
#include "recurrence/recurrence.h"
#include "recurrence/rows.h"

namespace adaptcomp {

// The n-th slot of a set, counted from 0. Sets of slots are the bits of a word.
__device__ __forceinline__ int nth_slot(unsigned slots, int n) {
#pragma unroll 1
  for (; n > 0; --n) slots &= slots - 1;
  return __popc((slots & (0u - slots)) - 1);
}

// Computes kHeight rows and N columns of a product, `apart` from each other, in one thread.
template <int N, class C, class To>
__device__ __forceinline__ void columns_part(unsigned slots, int first, const C* in, int stride,
                                             const Matrix<C>& matrix, const C* start, int column, int apart,
                                             const To& to) {
  constexpr int P = kPack<C>;
  const int count = __popc(slots);
  int slot[kHeight], at[N];
#pragma unroll
  for (int r = 0; r < kHeight; ++r) slot[r] = nth_slot(slots, first + r < count ? first + r : first);
#pragma unroll
  for (int n = 0; n < N; ++n) at[n] = column + n * apart < matrix.columns() ? column + n * apart : column;
  C sum[kHeight][N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const C from = start ? start[at[n]] : C(0);
#pragma unroll
    for (int r = 0; r < kHeight; ++r) sum[r][n] = from;
  }
  const C* w = matrix.data();
  const int whole = matrix.inner() / P * P;
  int k = 0;
#pragma unroll 1
  for (; k < whole; k += P) {
    C b[P][N];
#pragma unroll
    for (int i = 0; i < P; ++i)
#pragma unroll
      for (int n = 0; n < N; ++n) b[i][n] = w[i * matrix.stride() + at[n]];
    w += P * matrix.stride();
#pragma unroll
    for (int r = 0; r < kHeight; ++r) {
      const auto a = *reinterpret_cast<const Pack<C, P>*>(in + slot[r] * stride + k);
#pragma unroll
      for (int i = 0; i < P; ++i)
#pragma unroll
        for (int n = 0; n < N; ++n) sum[r][n] = std::fma(a.v[i], b[i][n], sum[r][n]);
    }
  }
#pragma unroll 1
  for (; k < matrix.inner(); ++k) {
#pragma unroll
    for (int r = 0; r < kHeight; ++r)
#pragma unroll
      for (int n = 0; n < N; ++n) sum[r][n] = std::fma(in[slot[r] * stride + k], w[at[n]], sum[r][n]);
    w += matrix.stride();
  }
#pragma unroll
  for (int r = 0; r < kHeight; ++r)
    if (first + r < count) to(slot[r], column, sum[r]);
}

// Calls to(slot, u, sums) for each slot of a set and each unit u, by all threads, with the G sums
// start[g apart + u] + sum_k in[slot, k] matrix[k, g apart + u]. A null `start` is zero; `in` is aligned to
// 16 bytes. A barrier has to follow before other threads read the results.
template <int G, class C, class To>
__device__ __forceinline__ void units_product(unsigned slots, const C* in, int stride,
                                              const Matrix<C>& matrix, const C* start, int units, int apart,
                                              const To& to) {
  const int parts = (__popc(slots) + kHeight - 1) / kHeight * units;
#pragma unroll 1
  for (int part = static_cast<int>(threadIdx.x); part < parts; part += kThreads)
    columns_part<G>(slots, part / units * kHeight, in, stride, matrix, start, part % units, apart, to);
}
// The same for columns that do not belong together: to(slot, column, sum).
template <class C, class To>
__device__ __forceinline__ void columns_product(unsigned slots, const C* in, int stride,
                                                const Matrix<C>& matrix, const C* start, const To& to) {
  constexpr int kAtOnce = 4;
  const int columns = matrix.columns(), apart = (columns + kAtOnce - 1) / kAtOnce;
  // A thread takes a single column if there are threads enough: the longest chain, not the loads, bounds a
  // small product.
  if ((__popc(slots) + kHeight - 1) / kHeight * columns <= kThreads)
    return units_product<1>(slots, in, stride, matrix, start, columns, 0,
                            [&](int slot, int j, const C(&sum)[1]) { to(slot, j, sum[0]); });
  units_product<kAtOnce>(slots, in, stride, matrix, start, apart, apart,
                         [&](int slot, int j, const C(&sum)[kAtOnce]) {
#pragma unroll
                           for (int n = 0; n < kAtOnce; ++n)
                             if (j + n * apart < columns) to(slot, j + n * apart, sum[n]);
                         });
}

// The same, to rows `to_stride` apart: those of the slots' numbers or, where `number` is given, of the rows
// that it names. It is not inlined: most calls come once for each row, and a dozen copies of a product in
// every kernel would take long to compile.
template <class C>
__device__ __noinline__ void product_into(unsigned slots, const C* in, int stride, const Matrix<C> matrix,
                                          const void* start, C* to, int64_t to_stride,
                                          const int64_t* number) {
  columns_product(slots, in, stride, matrix, static_cast<const C*>(start),
                  [&](int slot, int j, C sum) { to[(number ? number[slot] : slot) * to_stride + j] = sum; });
}

// What packs a layer's weight [columns, inner] for products from its inputs, and as it is, for products from
// its outputs.
template <class C>
Packing packed_up(const Matrix<C>& matrix, const void* weight) {
  return {matrix.packed(), weight, matrix.inner(), matrix.columns(),
          matrix.stride(), 1,      matrix.inner(), false};
}
template <class C>
Packing packed_down(const Matrix<C>& matrix, const void* weight) {
  return {matrix.packed(),  weight, matrix.inner(), matrix.columns(), matrix.stride(),
          matrix.columns(), 1,      false};
}

// The parts of a layout that may be staged, the most useful first; those from kReadout on are of the forward
// pass, or of the backward pass.
enum Part { kStateUp, kSecondUp, kStateDown, kSecondDown, kReadout, kInputUp, kInputDown, kParts };

// A cell is a class with these members:
//   scalar, kLeaves             the type of numbers; number of tensors of the state
//   gates(a)                    number of gates of a row
//   pack(packings), bring()     on the host, the matrices to pack; copies them to shared memory
//   begin(slots, x, stride)     computes the input's part of the gates
//   step(slots, now, next, stride)
//                               computes the state after a step; the tensors from the second on may be in
//                               place
// All threads call the last two; a barrier has to follow.

template <class C, template <class> class UnitOf>
class GatedTile {
 public:
  using scalar = C;
  using Unit = UnitOf<ScalarMath<C>>;
  static constexpr int kGates = Unit::kGates, kLeaves = Unit::kLeaves;
  static AC_HD int64_t gates(const Recurrence& a) { return kGates * a.dim; }

  AC_HD GatedTile(const Recurrence& a, const TilePlan& plan, Carver& global, Carver& shared)
      : a_(a),
        dim_(static_cast<int>(a.dim)),
        state_(a.dim, kGates * a.dim, plan.has(kStateUp), global, shared),
        input_(a.input, kGates * a.dim, plan.has(kInputUp), global, shared),
        given_(kGates * a.dim, 1, plan.slots, shared) {}

  void pack(ListOf<Packing>& packings) const {
    packings.add(packed_up(state_, a_.weight_hh));
    packings.add(packed_up(input_, a_.weight_ih));
  }
  __device__ __forceinline__ void bring() {
    state_.bring();
    input_.bring();
  }
  __device__ __forceinline__ void begin(unsigned slots, const C* x, int stride) const {
    product_into(slots, x, stride, input_, a_.bias_ih, given_.all(0), given_.stride(), nullptr);
  }
  __device__ __forceinline__ void step(unsigned slots, const C* const (&now)[kLeaves],
                                       C* const (&next)[kLeaves], int stride) const {
    units_of(slots, now, stride,
             [&](int slot, int u, const Unit& unit, const C(&)[kGates], const C(&before)[kLeaves]) {
               C after[kLeaves];
               unit.next(before, after);
#pragma unroll
               for (int l = 0; l < kLeaves; ++l) next[l][slot * stride + u] = after[l];
             });
  }
  // Calls to(slot, u, unit, sums of the state's part, before) for each slot and unit.
  template <class To>
  __device__ __forceinline__ void units_of(unsigned slots, const C* const (&now)[kLeaves], int stride,
                                           const To& to) const {
    units_product<kGates>(slots, now[0], stride, state_, static_cast<const C*>(a_.bias_hh), dim_, dim_,
                          [&](int slot, int u, const C(&sum)[kGates]) {
                            C given[kGates], before[kLeaves];
#pragma unroll
                            for (int g = 0; g < kGates; ++g) given[g] = given_.at(0, slot)[g * dim_ + u];
#pragma unroll
                            for (int l = 0; l < kLeaves; ++l) before[l] = now[l][slot * stride + u];
                            to(slot, u, Unit(given, sum, before), sum, before);
                          });
  }

 private:
  const Recurrence& a_;
  int dim_;
  Matrix<C> state_, input_;
  TileRows<C> given_;  // the input's part: [gate][unit]
};
template <class C>
using GruTile = GatedTile<C, GruUnit>;
template <class C>
using LstmTile = GatedTile<C, LstmUnit>;

template <class C>
class MlpCellTile {
 public:
  using scalar = C;
  static constexpr int kLeaves = 1;
  static AC_HD int64_t gates(const Recurrence& a) { return a.hidden; }

  AC_HD MlpCellTile(const Recurrence& a, const TilePlan& plan, Carver& global, Carver& shared)
      : a_(a),
        up_(a.dim, a.hidden, plan.has(kStateUp), global, shared),
        down_(a.hidden, a.dim, plan.has(kSecondUp), global, shared),
        input_(a.input, a.hidden, plan.has(kInputUp), global, shared),
        rows_(a.hidden, kKinds, plan.slots, shared) {}

  void pack(ListOf<Packing>& packings) const {
    packings.add(packed_up(up_, a_.weight_hh));
    packings.add(packed_up(down_, a_.weight2));
    packings.add(packed_up(input_, a_.weight_ih));
  }
  __device__ __forceinline__ void bring() {
    up_.bring();
    down_.bring();
    input_.bring();
  }
  __device__ __forceinline__ void begin(unsigned slots, const C* x, int stride) const {
    product_into(slots, x, stride, input_, a_.bias_ih, rows_.all(kGiven), rows_.stride(), nullptr);
  }
  __device__ __forceinline__ void step(unsigned slots, const C* const (&now)[1], C* const (&next)[1],
                                       int stride) const {
    into_hidden(slots, now[0], stride, [&](int slot, int j, C x) {
      rows_.at(kHidden, slot)[j] = activated<true, false>(a_.activation, x).value;
    });
    __syncthreads();
    out_of_hidden(slots, now[0], next[0], stride);
  }
  // Calls to(slot, j, what the activation of hidden unit j takes).
  template <class To>
  __device__ __forceinline__ void into_hidden(unsigned slots, const C* now, int stride, const To& to) const {
    columns_product(slots, now, stride, up_, static_cast<const C*>(nullptr),
                    [&](int slot, int j, C sum) { to(slot, j, rows_.at(kGiven, slot)[j] + sum); });
  }
  // The next state, from the hidden layer's values.
  __device__ __forceinline__ void out_of_hidden(unsigned slots, const C* now, C* next, int stride) const {
    columns_product(slots, rows_.all(kHidden), rows_.stride(), down_, static_cast<const C*>(a_.bias2),
                    [&](int slot, int j, C sum) {
                      const int at = slot * stride + j;
                      next[at] = a_.residual ? now[at] + sum : sum;
                    });
  }
  __device__ __forceinline__ C* hidden(int slot) const { return rows_.at(kHidden, slot); }

 private:
  enum Kind { kGiven, kHidden, kKinds };
  const Recurrence& a_;
  Matrix<C> up_, down_, input_;
  TileRows<C> rows_;
};

// Calls f with a null pointer to the cell's class out of these three.
template <template <class> class Gru, template <class> class Lstm, template <class> class Mlp, class F>
auto dispatch_cell(const Recurrence& a, const F& f) {
  const auto of = [&](auto number) {
    using C = decltype(number);
    switch (a.cell) {
      case CellKind::gru: return f(static_cast<Gru<C>*>(nullptr));
      case CellKind::lstm: return f(static_cast<Lstm<C>*>(nullptr));
      default: return f(static_cast<Mlp<C>*>(nullptr));
    }
  };
  return a.halt.wide ? of(0.0) : of(0.0f);
}

// Raises unless the layout and its scratch are there.
inline void check_plan(const char* name, const TilePlan& plan, const DeviceScratch& scratch) {
  if (plan.slots == 0)
    throw std::runtime_error(std::string("adaptcomp_ext: ") + name +
                             ": a row does not fit on this CUDA device");
  if (scratch.bytes < plan.scratch)
    throw std::runtime_error(std::string("adaptcomp_ext: ") + name + " needs " +
                             std::to_string(plan.scratch) + " bytes of scratch on the CUDA device, not " +
                             std::to_string(scratch.bytes));
}

// Whether all lengths are short enough for the tile's indices, which have 32 bits.
inline bool has_short_rows(const Recurrence& a) {
  constexpr int64_t kLongest = int64_t{1} << 18;  // numbers; no block has shared memory for as many
  return std::max({a.input, a.dim, a.hidden, a.width}) <= kLongest;
}

}  // namespace adaptcomp
