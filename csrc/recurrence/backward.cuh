// The cells on a tile of rows in a block's shared memory, backward: gradients.h for the threads of a block.
//
// A pass serves rows that are run forward once more and rows that are walked back: both begin with the
// product of the state before the step.
//
// The gradients in the parameters are sums of outer products. The factors are held in global memory until a
// group of rows is together, so that the sums, which are as large as the parameters, are read and written
// once for a group and not once for a pass.
#pragma once

#include "recurrence/tile.cuh"

namespace adaptcomp {

// The number of a slot among those of a set.
__device__ __forceinline__ int rank_in(unsigned slots, int slot) {
  return __popc(slots & ((1u << slot) - 1));
}
// The set of the first n slots.
__device__ __forceinline__ unsigned first_slots(int n) { return n == 0 ? 0u : ~0u >> (kWarp - n); }

// Sums of outer products of rows `left`, of n numbers, and `right`, of m, and of the rows `left`; a block's
// own. All threads call the functions without a row's number together.
template <class C>
class OuterSums {
 public:
  AC_HD OuterSums(int64_t n, int64_t m, Carver& own, Carver& sums)
      : n_(static_cast<int>(n)),
        m_(static_cast<int>(m)),
        left_(own.take<C>(kRoom * padded<C>(n))),
        right_(own.take<C>(kRoom * padded<C>(m))),
        at_(sums.used() / static_cast<int64_t>(sizeof(C))),
        sums_(sums.take<C>(outer_size<C>(n, m))),
        columns_at_(sums.used() / static_cast<int64_t>(sizeof(C))),
        columns_(sums.take<C>(n)) {}
  __device__ __forceinline__ int left_stride() const { return static_cast<int>(padded<C>(n_)); }
  // The places of row i of those that are held next.
  __device__ __forceinline__ C* left(int i) const { return left_ + (held_ + i) * left_stride(); }
  __device__ __forceinline__ C* right(int i) const {
    return right_ + (held_ + i) * static_cast<int>(padded<C>(m_));
  }
  // Makes room for `rows`, at most kWarp.
  __device__ __forceinline__ void reserve(int rows) {
    if (held_ + rows <= kRoom) return;
    add();
    __syncthreads();
  }
  __device__ __forceinline__ void hold(int rows) { held_ += rows; }
  // Adds what is held; a barrier has to come before and after.
  __device__ __forceinline__ void add() {
    constexpr int P = kPack<C>;
    const int across = static_cast<int>(padded<C>(m_)) / P, down = static_cast<int>(padded<C>(n_)) / P;
#pragma unroll 1
    for (int part = static_cast<int>(threadIdx.x); part < down * across; part += kThreads) {
      const int i = part / across, j = part % across;
      const auto* a = reinterpret_cast<const Pack<C, P>*>(left_) + i;
      const auto* b = reinterpret_cast<const Pack<C, P>*>(right_) + j;
      Pack<C, P> sum[P]{};  // a chain that starts at 0, not at the large sums, keeps more digits
#pragma unroll 2
      for (int row = 0; row < held_; ++row, a += down, b += across) {
        const Pack<C, P> left = *a, right = *b;
#pragma unroll
        for (int r = 0; r < P; ++r)
#pragma unroll
          for (int c = 0; c < P; ++c) sum[r].v[c] = std::fma(left.v[r], right.v[c], sum[r].v[c]);
      }
      auto* to = reinterpret_cast<Pack<C, P>*>(sums_) + i * P * across + j;
#pragma unroll
      for (int r = 0; r < P; ++r, to += across) {
#pragma unroll
        for (int c = 0; c < P; ++c) sum[r].v[c] += to->v[c];
        *to = sum[r];
      }
    }
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < n_; i += kThreads) {
      C sum = 0;
#pragma unroll 4
      for (int row = 0; row < held_; ++row) sum += left_[row * left_stride() + i];
      columns_[i] += sum;
    }
    held_ = 0;
  }
  // Where `rows` rows of the outer products' sum from `first` on go, and the same of the rows' sum.
  void give(ListOf<SumOf>& list, int64_t first, int64_t rows, void* products, void* columns) const {
    const int64_t stride = padded<C>(m_);
    if (products && m_ > 0) list.add({products, at_ + first * stride, rows, m_, stride, false});
    if (columns) list.add({columns, columns_at_ + first, 1, rows, 0, false});
  }

 private:
  static constexpr int kRoom = 128;
  int n_, m_;
  C *left_, *right_;
  int64_t at_;  // places in a block's sums
  C* sums_;
  int64_t columns_at_;
  C* columns_;
  int held_ = 0;
};

// A cell's backward pass is a class with these members, besides those of the cell:
//   g_given(slot)               the gradient in the input's part of the gates
//   input_down()                the matrix from there to the input
//   steps()                     the sums over steps: the left rows are the gradients in the state's part and,
//   at
//                               last, in the logit of the state before the step; the right ones that state
//   reserve, hold, add, sums    of all sums over steps
//   walk(live, backs, from, next, stride)
//                               computes `next` from `from` for the rows that are not walked back; for the
//                               others, replaces the gradient in the state after the step, `next`, by the one
//                               in the state before it, `from`
// All threads call the last one, which ends with a barrier.

template <class C, template <class> class UnitOf, template <class> class GradOf>
class GatedBack : public GatedTile<C, UnitOf> {
  using Base = GatedTile<C, UnitOf>;
  using Grad = GradOf<ScalarMath<C>>;

 public:
  using Base::kGates, Base::kLeaves;
  using typename Base::Unit;

  AC_HD GatedBack(const RecurrenceBackward& a, const TilePlan& plan, Carver& global, Carver& shared,
                  Carver& own, Carver& sums)
      : Base(a.run, plan, global, shared),
        a_(a),
        dim_(static_cast<int>(a.run.dim)),
        down_(kGates * a.run.dim, a.run.dim, plan.has(kStateDown), global, shared),
        input_down_(kGates * a.run.dim, a.run.input, plan.has(kInputDown), global, shared),
        g_given_(kGates * a.run.dim, 1, plan.slots, shared),
        steps_(kGates * a.run.dim + 1, a.run.dim, own, sums) {}

  void pack(ListOf<Packing>& packings) const {
    Base::pack(packings);
    packings.add(packed_down(down_, a_.run.weight_hh));
    packings.add(packed_down(input_down_, a_.run.weight_ih));
  }
  void sums(ListOf<SumOf>& list) const {
    const int64_t gates = kGates * dim_;
    steps_.give(list, 0, gates, a_.g_weight_hh, a_.g_bias_hh);
    steps_.give(list, gates, 1, a_.g_head, a_.g_head_bias);
  }
  __device__ __forceinline__ void bring() {
    Base::bring();
    down_.bring();
    input_down_.bring();
  }
  __device__ __forceinline__ C* g_given(int slot) const { return g_given_.at(0, slot); }
  __device__ __forceinline__ int g_given_stride() const { return g_given_.stride(); }
  __device__ __forceinline__ const Matrix<C>& input_down() const { return input_down_; }
  __device__ __forceinline__ OuterSums<C>& steps() { return steps_; }
  __device__ __forceinline__ void reserve(int rows) { steps_.reserve(rows); }
  __device__ __forceinline__ void hold(int rows) { steps_.hold(rows); }
  __device__ __forceinline__ void add() { steps_.add(); }

  __device__ __forceinline__ void walk(unsigned live, unsigned backs, const C* const (&from)[kLeaves],
                                       C* const (&next)[kLeaves], int stride) {
    this->units_of(live, from, stride,
                   [&](int slot, int u, const Unit& unit, const C(&sum)[kGates], const C(&before)[kLeaves]) {
                     const int at = slot * stride + u;
                     C after[kLeaves];
                     if ((backs >> slot & 1) == 0) {
                       unit.next(before, after);
                     } else {
#pragma unroll
                       for (int l = 0; l < kLeaves; ++l) after[l] = next[l][at];
                       const Grad grad(unit, sum, before, after);
                       C *left = steps_.left(rank_in(backs, slot)) + u, *given = g_given(slot) + u;
#pragma unroll
                       for (int g = 0; g < kGates; ++g) {
                         left[g * dim_] = grad.own[g];
                         given[g * dim_] += grad.given[g];
                       }
                     }
#pragma unroll
                     for (int l = 0; l < kLeaves; ++l) next[l][at] = after[l];
                   });
    __syncthreads();
    if (backs == 0) return;
    columns_product(first_slots(__popc(backs)), steps_.left(0), steps_.left_stride(), down_,
                    static_cast<const C*>(nullptr),
                    [&](int row, int j, C sum) { next[0][nth_slot(backs, row) * stride + j] += sum; });
    __syncthreads();
  }

 private:
  const RecurrenceBackward& a_;
  int dim_;
  Matrix<C> down_, input_down_;
  TileRows<C> g_given_;
  OuterSums<C> steps_;
};
template <class C>
using GruBack = GatedBack<C, GruUnit, GruUnitGrad>;
template <class C>
using LstmBack = GatedBack<C, LstmUnit, LstmUnitGrad>;

template <class C>
class MlpBack : public MlpCellTile<C> {
  using Base = MlpCellTile<C>;

 public:
  using Base::kLeaves;

  AC_HD MlpBack(const RecurrenceBackward& a, const TilePlan& plan, Carver& global, Carver& shared,
                Carver& own, Carver& sums)
      : Base(a.run, plan, global, shared),
        a_(a),
        dim_(static_cast<int>(a.run.dim)),
        hidden_(static_cast<int>(a.run.hidden)),
        up_down_(a.run.hidden, a.run.dim, plan.has(kStateDown), global, shared),
        second_down_(a.run.dim, a.run.hidden, plan.has(kSecondDown), global, shared),
        input_down_(a.run.hidden, a.run.input, plan.has(kInputDown), global, shared),
        rows_(a.run.hidden, kKinds, plan.slots, shared),
        steps_(a.run.hidden + 1, a.run.dim, own, sums),
        second_(a.run.dim, a.run.hidden, own, sums) {}

  void pack(ListOf<Packing>& packings) const {
    Base::pack(packings);
    packings.add(packed_down(up_down_, a_.run.weight_hh));
    packings.add(packed_down(second_down_, a_.run.weight2));
    packings.add(packed_down(input_down_, a_.run.weight_ih));
  }
  void sums(ListOf<SumOf>& list) const {
    steps_.give(list, 0, hidden_, a_.g_weight_hh, nullptr);
    steps_.give(list, hidden_, 1, a_.g_head, a_.g_head_bias);
    second_.give(list, 0, dim_, a_.g_weight2, a_.g_bias2);
  }
  __device__ __forceinline__ void bring() {
    Base::bring();
    up_down_.bring();
    second_down_.bring();
    input_down_.bring();
  }
  __device__ __forceinline__ C* g_given(int slot) const { return rows_.at(kGGiven, slot); }
  __device__ __forceinline__ int g_given_stride() const { return rows_.stride(); }
  __device__ __forceinline__ const Matrix<C>& input_down() const { return input_down_; }
  __device__ __forceinline__ OuterSums<C>& steps() { return steps_; }
  __device__ __forceinline__ void reserve(int rows) {
    steps_.reserve(rows);
    second_.reserve(rows);
  }
  __device__ __forceinline__ void hold(int rows) {
    steps_.hold(rows);
    second_.hold(rows);
  }
  __device__ __forceinline__ void add() {
    steps_.add();
    second_.add();
  }

  __device__ __forceinline__ void walk(unsigned live, unsigned backs, const C* const (&from)[1],
                                       C* const (&next)[1], int stride) {
    this->into_hidden(live, from[0], stride, [&](int slot, int j, C x) {
      const auto act = activated<true, false>(a_.run.activation, x);
      this->hidden(slot)[j] = act.value;
      if ((backs >> slot & 1) != 0) rows_.at(kSlope, slot)[j] = act.first;
    });
    __syncthreads();
    this->out_of_hidden(live & ~backs, from[0], next[0], stride);
    Slots{kWarp, backs, nullptr}.each([&](int slot) {
      const int row = rank_in(backs, slot);
      Warp::copy(second_.left(row), next[0] + slot * stride, dim_);
      Warp::copy(second_.right(row), this->hidden(slot), hidden_);
    });
    columns_product(backs, next[0], stride, second_down_, static_cast<const C*>(nullptr),
                    [&](int slot, int j, C sum) {
                      const C g = sum * rows_.at(kSlope, slot)[j];
                      steps_.left(rank_in(backs, slot))[j] = g;
                      g_given(slot)[j] += g;
                    });
    __syncthreads();
    if (backs == 0) return;
    columns_product(first_slots(__popc(backs)), steps_.left(0), steps_.left_stride(), up_down_,
                    static_cast<const C*>(nullptr), [&](int row, int j, C sum) {
                      C& g = next[0][nth_slot(backs, row) * stride + j];
                      g = a_.run.residual ? g + sum : sum;
                    });
    __syncthreads();
  }

 private:
  enum Kind { kGGiven, kSlope, kKinds };
  const RecurrenceBackward& a_;
  int dim_, hidden_;
  Matrix<C> up_down_, second_down_, input_down_;
  TileRows<C> rows_;
  OuterSums<C> steps_, second_;
};

}  // namespace adaptcomp
