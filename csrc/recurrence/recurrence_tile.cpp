// Whole runs of a recurrent cell on tiles of rows; compiled once per instruction set.
//
// A pass makes one step of all rows in the slots: one product with the packed weights, the gates from the
// registers and the first-level cache, the halting logit and the readout of the new state, and the policy's
// decision for each row. A slot whose row has ended takes the next waiting row, so that the tile stays full.
// The input's part of the gates is computed when rows begin to wait, for a tile of them at a time.
#include "halting/rows.h"
#include "recurrence/cells.h"

namespace adaptcomp {
namespace AC_ISA {
namespace {

// What all threads read.
template <class C, class Cell>
struct Packed {
  explicit Packed(const Recurrence& a)
      : cell(a),
        head(padded<C>(a.dim)),
        readout(a.readout, a.readout_bias, 1, a.readout ? a.width : 0, a.dim),
        head_bias(a.head_bias ? static_cast<const C*>(a.head_bias)[0] : C(0)) {
    zero_row(head.get(), padded<C>(a.dim));
    if (a.head) copy_row(head.get(), static_cast<const C*>(a.head), a.dim);
  }
  Cell cell;
  Scratch<C> head;
  GateLayer<C> readout;
  C head_bias;
};

// More than a descent's: each pass reads all weights, which lie in the second-level cache.
constexpr int64_t kRows = 32;

template <class C, class Cell>
class RecurrenceTile {
  struct Slot {
    int64_t row, step;
  };

 public:
  RecurrenceTile(const Recurrence& a, const Packed<C, Cell>& packed, int64_t capacity)
      : a_(a),
        packed_(packed),
        cell_(packed.cell),
        capacity_(capacity),
        room_(whole_blocks(capacity)),
        width_(padded<C>(a.dim)),
        given_columns_(cell_.input.columns),
        states_(2 * Cell::kLeaves * room_ * width_),
        given_(2 * room_ * given_columns_),
        inputs_(room_ * (a.input + 1)),
        scratch_(room_ * cell_.scratch_columns()),
        readout_(room_ * (packed.readout.columns + 1)),
        halt_(a.halt),
        weighted_(a.halt.policy == Policy::act) {
    zero_row(states_.get(), 2 * Cell::kLeaves * room_ * width_);
    zero_row(given_.get(), 2 * room_ * given_columns_);
    zero_row(inputs_.get(), room_ * (a.input + 1));
    for (int l = 0; l < Cell::kLeaves; ++l) {
      now_[l] = states_.get() + 2 * l * room_ * width_;
      next_[l] = now_[l] + room_ * width_;
    }
    waiting_ = given_.get() + room_ * given_columns_;
    if (a.head) {
      halt_.signal = logits_;
      halt_.signal_dtype = sizeof(C) == 8 ? DType::f64 : DType::f32;
    }
    halt_.carry = accumulated_;
    halt_.readout.dtype = sizeof(C) == 8 ? DType::f64 : DType::f32;
    halt_.readout.row_elements = a.width;
  }

  // Takes rows from `queue` until there are no more, or the caller stops it.
  void run(int64_t* queue, Pace& pace) {
    int64_t used = 0;
    for (;;) {
      while (used < capacity_ && fill(used, queue)) ++used;
      if (used == 0 || pace.stop()) return;
      cell_.step(now_, given_.get(), used, scratch_.get(), next_);
      for (int l = 0; l < Cell::kLeaves; ++l) {
        C* before = now_[l];
        now_[l] = next_[l];
        next_[l] = before;
      }
      if (a_.head)
        for (int64_t i = 0; i < used; ++i)
          logits_[i] = dot(packed_.head.get(), state(0, i), width_) + packed_.head_bias;
      if (a_.readout) packed_.readout.apply(now_[0], width_, used, readout_.get());
      for (int64_t i = 0; i < used;) {
        if (advance(i) || fill(i, queue)) {
          ++i;
        } else if (i != --used) {
          move(i, used);
        }
      }
    }
  }

 private:
  C* state(int leaf, int64_t slot) const { return now_[leaf] + slot * width_; }

  // Computes the input's part of the gates for the next rows that wait; returns false if there are none.
  bool wait(int64_t* queue) {
    const int64_t begin = __atomic_fetch_add(queue, capacity_, __ATOMIC_RELAXED);
    if (begin >= a_.rows) return false;
    first_ = begin;
    end_ = least(a_.rows, begin + capacity_);
    const int64_t rows = end_ - begin;
    if (a_.x) copy_row(inputs_.get(), static_cast<const C*>(a_.x) + begin * a_.input, rows * a_.input);
    cell_.input.apply(inputs_.get(), a_.input, rows, waiting_);
    waits_ = begin;
    return true;
  }

  bool fill(int64_t slot, int64_t* queue) {
    if (waits_ == end_ && !wait(queue)) return false;
    const int64_t row = waits_++;
    slots_[slot] = {row, 0};
    accumulated_[slot] = C(0);
    copy_row(given_.get() + slot * given_columns_, waiting_ + (row - first_) * given_columns_,
             given_columns_);
    for (int l = 0; l < Cell::kLeaves; ++l) {
      copy_row(state(l, slot), static_cast<const C*>(a_.state[l]) + row * a_.dim, a_.dim);
      zero_row(state(l, slot) + a_.dim, width_ - a_.dim);
    }
    return true;
  }

  void move(int64_t to, int64_t from) {
    slots_[to] = slots_[from];
    accumulated_[to] = accumulated_[from];
    logits_[to] = logits_[from];
    copy_row(given_.get() + to * given_columns_, given_.get() + from * given_columns_, given_columns_);
    for (int l = 0; l < Cell::kLeaves; ++l) copy_row(state(l, to), state(l, from), width_);
    if (a_.readout)
      copy_row(readout_.get() + to * packed_.readout.columns, readout_.get() + from * packed_.readout.columns,
               packed_.readout.columns);
  }

  // Decides for the slot's row after its step; returns false if the row has ended.
  bool advance(int64_t slot) {
    Slot& s = slots_[slot];
    ++s.step;
    const C* read = a_.readout ? readout_.get() + slot * packed_.readout.columns : state(0, slot);
    halt_.step = s.step;
    halt_.readout.block = read;
    // The confidence of the row that `block` begins with; the others find their numbers by the slot.
    const Decision<C> v = decide<C>(halt_, halt_.policy == Policy::confidence ? 0 : slot, s.row);
    const bool masked = may_mask(v.weight);
    bool finite = v.finite;
    if (a_.readout) finite = finite && (finite_row(read, a_.width) || (masked && logits_row(read, a_.width)));
    for (int l = 0; l < Cell::kLeaves && finite; ++l) {
      const C* leaf = state(l, slot);
      finite = finite_row(leaf, a_.dim) || (masked && l == halt_.read_leaf && logits_row(leaf, a_.dim));
    }
    const Status status = outcome(v.halt, finite, s.step, halt_.min_steps, halt_.max_steps);
    if (weighted_ && v.weight != C(0)) {
      C* out = static_cast<C*>(a_.output) + s.row * a_.width;
      for (int64_t j = 0; j < a_.width; ++j) accumulate<C>(out[j], v.weight, read[j]);
    }
    if (a_.cost && status != kNonFinite) static_cast<C*>(a_.cost)[s.row] += v.cost;
    if (status == kRunning) return true;
    a_.halt.steps[s.row] = s.step;
    a_.halt.status[s.row] = status;
    if (!weighted_ && a_.output) copy_row(static_cast<C*>(a_.output) + s.row * a_.width, read, a_.width);
    for (int l = 0; l < Cell::kLeaves; ++l)
      copy_row(static_cast<C*>(a_.result[l]) + s.row * a_.dim, state(l, slot), a_.dim);
    return false;
  }

  const Recurrence& a_;
  const Packed<C, Cell>& packed_;
  const Cell& cell_;
  int64_t capacity_, room_, width_, given_columns_;
  Scratch<C> states_, given_, inputs_, scratch_, readout_;
  C *now_[Cell::kLeaves], *next_[Cell::kLeaves];
  C* waiting_;                               // the input's part of the rows that wait
  int64_t first_ = 0, waits_ = 0, end_ = 0;  // those rows: the first of them, the next, and the end
  Slot slots_[kRows];
  C logits_[kRows], accumulated_[kRows];
  HaltStep halt_;  // of the slot that is decided
  bool weighted_;
};

template <class C, class Cell>
void run(const Recurrence& a) {
  const Packed<C, Cell> packed(a);
  const auto& cell = packed.cell;
  const double dim = static_cast<double>(a.dim);
  const double work = dim * static_cast<double>(cell.scratch_columns()) * (a.cell == CellKind::mlp ? 2 : 1) +
                      dim * static_cast<double>(packed.readout.columns + 16);
  // The number of steps is not known; half of the most is a guess that wakes no thread for little.
  const double total = work * static_cast<double>(a.rows) * (static_cast<double>(a.halt.max_steps) + 1) / 2;
  int64_t queue = 0;
  paced_team(a.interrupt, work, least(a.rows, threads_for(total)), [&](int64_t, int64_t of, Pace& pace) {
    const int64_t capacity = least(kRows, (a.rows + of - 1) / of);
    RecurrenceTile<C, Cell>(a, packed, capacity).run(&queue, pace);
  });
}

template <class C>
void run_cell(const Recurrence& a) {
  switch (a.cell) {
    case CellKind::gru: return run<C, GruCell<C>>(a);
    case CellKind::lstm: return run<C, LstmCell<C>>(a);
    case CellKind::mlp: return run<C, MlpCell<C>>(a);
  }
}

}  // namespace

void recurrence(const Recurrence& a) {
  if (a.rows > 0) a.halt.wide ? run_cell<double>(a) : run_cell<float>(a);
}

}  // namespace AC_ISA
}  // namespace adaptcomp
