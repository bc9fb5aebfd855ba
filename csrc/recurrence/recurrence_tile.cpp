// Whole runs of a recurrent cell on tiles of rows; compiled once per instruction set.
//
// A pass makes one step of all rows in the slots: one product with the packed weights, the gates from the
// registers, the halting logit and the readout of the new state, and the policy's decision for each row. A
// slot whose row has ended takes the next waiting row, so that the tile stays full. The input's part of the
// gates is computed when rows begin to wait, for a tile of them at a time.
#include "halting/rows.h"
#include "recurrence/waiting.h"

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
  Layer<C, 2> readout;
  C head_bias;
};

template <class C, class Cell>
class RecurrenceTile {
  static constexpr int kLeaves = Cell::kLeaves;

 public:
  RecurrenceTile(const Recurrence& a, const Packed<C, Cell>& packed, int64_t capacity)
      : a_(a),
        packed_(packed),
        cell_(packed.cell),
        capacity_(capacity),
        width_(cell_.width),
        converges_(a.halt.policy == Policy::given),
        waiting_(a, cell_, capacity),
        states_(a.tape ? 0 : 2 * kLeaves * capacity * apart<C>(width_)),
        given_(capacity * apart<C>(cell_.input.columns)),
        scratch_(capacity * cell_.scratch_columns()),
        readouts_((converges_ ? 2 : 1) * capacity * packed.readout.columns),
        writer_(a.tape, apart<C>(kLeaves * width_), least(a.rows, 8 * capacity)),
        halt_(a.halt),
        weighted_(a.halt.policy == Policy::act || a.expects) {
    for (int64_t i = 0; i < capacity; ++i) {
      given_of_[i] = given_.get() + i * apart<C>(cell_.input.columns);
      readout_of_[i] = readouts_.get() + i * packed.readout.columns;
      if (converges_) last_readout_of_[i] = readout_of_[i] + capacity * packed.readout.columns;
      if (a.tape) continue;
      for (int l = 0; l < kLeaves; ++l) {
        now_[l][i] = states_.get() + (2 * l * capacity + i) * apart<C>(width_);
        next_[l][i] = now_[l][i] + capacity * apart<C>(width_);
      }
    }
    if (a.head) {
      halt_.signal = logits_;
      halt_.signal_dtype = sizeof(C) == 8 ? DType::f64 : DType::f32;
    }
    if (converges_) halt_.signal = converged_;
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
      step(used);
      if (a_.head)
        for (int64_t i = 0; i < used; ++i)
          logits_[i] = dot(packed_.head.get(), now_[0][i], width_) + packed_.head_bias;
      if (converges_)
        for (int64_t i = 0; i < used; ++i) exchange(readout_of_[i], last_readout_of_[i]);
      if (a_.readout) packed_.readout.apply(now_[0], used, readout_of_);
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
  void step(int64_t used) {
    if (a_.tape)
      for (int64_t i = 0; i < used; ++i) {
        C* state = writer_.state();
        record_[i] = writer_.record(record_[i], state);
        for (int l = 0; l < kLeaves; ++l) next_[l][i] = state + l * width_;
      }
    const C* const* from[kLeaves];
    C* const* to[kLeaves];
    for (int l = 0; l < kLeaves; ++l) from[l] = now_[l], to[l] = next_[l];
    cell_.step(from, given_of_, used, scratch_.get(), to);
    for (int l = 0; l < kLeaves; ++l)
      for (int64_t i = 0; i < used; ++i) {
        C* before = now_[l][i];
        now_[l][i] = next_[l][i];
        next_[l][i] = before;
      }
  }

  bool fill(int64_t slot, int64_t* queue) {
    const int64_t row = waiting_.next(queue, a_.rows);
    if (row < 0) return false;
    row_[slot] = row;
    step_[slot] = 0;
    accumulated_[slot] = C(0);
    still_[slot] = 0;
    copy_row(given_of_[slot], waiting_.given(row), cell_.input.columns);
    if (a_.tape) {
      const C* given = static_cast<const C*>(a_.state[0]) + row * a_.dim;
      const bool in_place = stays_in_place<C, kLeaves>(a_, width_);
      C* state = in_place ? const_cast<C*>(given) : writer_.state();
      record_[slot] = writer_.record(nullptr, state);
      for (int l = 0; l < kLeaves; ++l) now_[l][slot] = state + l * width_;
      if (in_place) return true;
    }
    for (int l = 0; l < kLeaves; ++l) {
      copy_row(now_[l][slot], static_cast<const C*>(a_.state[l]) + row * a_.dim, a_.dim);
      zero_row(now_[l][slot] + a_.dim, width_ - a_.dim);
    }
    return true;
  }

  void move(int64_t to, int64_t from) {
    row_[to] = row_[from];
    step_[to] = step_[from];
    accumulated_[to] = accumulated_[from];
    logits_[to] = logits_[from];
    record_[to] = record_[from];
    exchange(given_of_[to], given_of_[from]);
    exchange(readout_of_[to], readout_of_[from]);
    if (converges_) exchange(last_readout_of_[to], last_readout_of_[from]);
    still_[to] = still_[from];
    for (int l = 0; l < kLeaves; ++l) {
      exchange(now_[l][to], now_[l][from]);
      exchange(next_[l][to], next_[l][from]);
    }
  }

  // One step of PonderNet's distribution.
  Decision<C> ponder(int64_t slot) {
    const C logit = logits_[slot], survival = accumulated_[slot];
    const PonderRow<C> row = ponder_row(logit, survival, ponder_params(a_, halt_.step));
    accumulated_[slot] = row.log_survival;
    const Pondered<C> kept{logit, survival};
    std::memcpy(now_[0][slot] + kLeaves * width_, &kept, sizeof kept);
    return {row.weight, row.cost, row.halt, is_logit(logit)};
  }
  // The readout before the last step.
  const C* before(int64_t slot) const {
    if (a_.readout) return last_readout_of_[slot];
    return a_.tape ? static_cast<const C*>(record_[slot]->before->state) : next_[0][slot];
  }
  bool stays(const C* now, const C* last) const {
    Movement<C> movement;
    for (int64_t j = 0; j < a_.width; ++j) movement.add(now[j], last[j]);
    return movement.stays(static_cast<C>(halt_.threshold), a_.relative);
  }

  // Decides for the slot's row after its step; returns false if the row has ended.
  bool advance(int64_t slot) {
    const int64_t row = row_[slot];
    const C* read = a_.readout ? readout_of_[slot] : now_[0][slot];
    halt_.step = ++step_[slot];
    halt_.readout.block = read;
    if (converges_) {
      still_[slot] = halt_.step > 1 && stays(read, before(slot)) ? still_[slot] + 1 : 0;
      converged_[slot] = still_[slot] >= halt_.parameter;
    }
    // The confidence of the row that `block` begins with; the others find their numbers by the slot.
    const Decision<C> v =
        a_.expects ? ponder(slot) : decide<C>(halt_, halt_.policy == Policy::confidence ? 0 : slot, row);
    const bool masked = may_mask(v.weight);
    bool finite = v.finite;
    if (a_.readout) finite = finite && (finite_row(read, a_.width) || (masked && logits_row(read, a_.width)));
    for (int l = 0; l < kLeaves && finite; ++l) {
      const C* leaf = now_[l][slot];
      finite = finite_row(leaf, a_.dim) || (masked && l == halt_.read_leaf && logits_row(leaf, a_.dim));
    }
    const Status status = outcome(v.halt, finite, halt_.step, halt_.min_steps, halt_.max_steps);
    if (weighted_ && v.weight != C(0)) {
      C* out = static_cast<C*>(a_.output) + row * a_.width;
      for (int64_t j = 0; j < a_.width; ++j) accumulate<C>(out[j], v.weight, read[j]);
    }
    if (a_.tape) record_[slot]->weight = static_cast<double>(v.weight);
    if (a_.cost && status != kNonFinite) static_cast<C*>(a_.cost)[row] += v.cost;
    if (status == kRunning) return true;
    a_.halt.steps[row] = halt_.step;
    a_.halt.status[row] = status;
    if (!weighted_ && a_.output) copy_row(static_cast<C*>(a_.output) + row * a_.width, read, a_.width);
    for (int l = 0; l < kLeaves; ++l)
      copy_row(static_cast<C*>(a_.result[l]) + row * a_.dim, now_[l][slot], a_.dim);
    if (a_.tape) a_.tape->last()[row] = record_[slot];
    return false;
  }

  const Recurrence& a_;
  const Packed<C, Cell>& packed_;
  const Cell& cell_;
  int64_t capacity_, width_;
  bool converges_;
  Waiting<C, Cell> waiting_;
  Scratch<C> states_, given_, scratch_, readouts_;
  TapeWriter<C> writer_;
  C *now_[kLeaves][kRows], *next_[kLeaves][kRows];  // with a tape, in it; else two places that take turns
  C *given_of_[kRows], *readout_of_[kRows], *last_readout_of_[kRows];
  Record* record_[kRows];
  int64_t row_[kRows], step_[kRows], still_[kRows];
  uint8_t converged_[kRows];
  C logits_[kRows], accumulated_[kRows];
  HaltStep halt_;  // of the slot that is decided
  bool weighted_;
};

template <class C, class Cell>
void run(const Recurrence& a) {
  const Packed<C, Cell> packed(a);
  const double work = packed.cell.multiply_adds() +
                      static_cast<double>(a.dim) * static_cast<double>(packed.readout.columns + 16);
  int64_t queue = 0;
  paced_team(a.interrupt, work, threads_of(a, work), [&](int64_t, int64_t of, Pace& pace) {
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
