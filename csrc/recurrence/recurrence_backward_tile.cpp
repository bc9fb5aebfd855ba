// The backward pass of whole runs, on tiles of rows; compiled once per instruction set.
//
// A slot walks a row's states on the tape from the last one to the first. A thread has its own part of the
// rows and its own sums, which are added in the order of the threads: the result is the same in every call.
#include "halting/rows.h"
#include "recurrence/gradients.h"
#include "recurrence/waiting.h"

namespace adaptcomp {
namespace AC_ISA {
namespace {

// What all threads read.
template <class C, class Cell, class Gradient>
struct PackedBack {
  explicit PackedBack(const RecurrenceBackward& a)
      : cell(a.run),
        back(a),
        head(cell.width),
        readout(Blocks<C, 2>::backward(static_cast<const C*>(a.run.readout), 1,
                                       a.run.readout ? a.run.width : 0, a.run.dim)) {
    zero_row(head.get(), cell.width);
    if (a.run.head) copy_row(head.get(), static_cast<const C*>(a.run.head), a.run.dim);
  }
  Cell cell;
  typename Gradient::Back back;
  Scratch<C> head;
  Blocks<C, 2> readout;
};

template <class C, class Cell, class Gradient>
class BackwardTile {
  static constexpr int kLeaves = Cell::kLeaves;

 public:
  using Packed = PackedBack<C, Cell, Gradient>;
  // `first`: whether the sums of this tile are the first that are given.
  BackwardTile(const RecurrenceBackward& a, const Packed& packed, int64_t capacity, bool first)
      : a_(a),
        packed_(packed),
        cell_(packed.cell),
        capacity_(capacity),
        width_(cell_.width),
        columns_(cell_.input.columns),
        first_(first),
        gradient_(a, cell_, packed.back, first),
        input_(Gradient::kGates, a.run.cell == CellKind::mlp ? a.run.hidden : a.run.dim, a.run.input,
               columns_, true, first ? a.g_weight_ih : nullptr),
        readout_(1, a.run.readout ? a.run.width : 0, a.run.dim, a.run.readout ? padded<C>(a.run.width) : 0,
                 true, first ? a.g_readout : nullptr),
        waiting_(a.run, cell_, capacity),
        lanes_(capacity * apart<C>(2 * columns_ + (kLeaves + 2) * width_)),
        g_read_(padded<C>(a.run.width)),
        g_head_(width_),
        weighted_(a.run.halt.policy == Policy::act || a.run.expects) {
    zero_row(g_head_.get(), width_);
    zero_row(g_read_.get(), padded<C>(a.run.width));
    C* lane = lanes_.get();
    const auto take = [&](int64_t n) {
      C* taken = lane;
      lane += n;
      return taken;
    };
    for (int64_t i = 0; i < capacity; ++i) {
      given_[i] = take(columns_);
      g_given_[i] = take(columns_);
      for (int l = 0; l < kLeaves; ++l) g_state_[l][i] = take(width_);
      g_output_[i] = take(width_);
      mean_[i] = take(width_);
      take(apart<C>(0));
    }
  }

  // Walks the rows from `begin` to `end`, unless the caller stops it.
  void run(int64_t begin, int64_t end, Pace& pace) {
    int64_t used = 0;
    queue_ = begin;
    end_ = end;
    for (;;) {
      while (used < capacity_ && fill(used)) ++used;
      if (used == 0 || pace.stop()) break;
      const C *from[kRows], *cells[kRows];
      for (int64_t i = 0; i < used; ++i) {
        from[i] = static_cast<const C*>(record_[i]->before->state);
        cells[i] = from[i] + width_;
      }
      Walk<C> walk{{from, cells}, given_, {g_state_[0], g_state_[kLeaves - 1]}, g_given_, used};
      gradient_.step(walk);
      for (int64_t i = 0; i < used;) {
        if (back(i) || fill(i)) {
          ++i;
        } else if (i != --used) {
          move(i, used);
        }
      }
    }
    add_inputs();
    input_.finish();
    readout_.finish();
    gradient_.finish();
  }

  // Writes the thread's sums, or adds them to what is there.
  void give() const {
    const Recurrence& run = a_.run;
    gradient_.give(a_, first_);
    input_.give(first_, a_.g_weight_ih, a_.g_bias_ih);
    if (run.readout) readout_.give(first_, a_.g_readout, a_.g_readout_bias);
    const auto add = [&](void* to, int64_t i, C value) {
      C& at = static_cast<C*>(to)[i];
      at = first_ ? value : at + value;
    };
    for (int64_t j = 0; a_.g_head && j < run.dim; ++j) add(a_.g_head, j, g_head_.get()[j]);
    if (a_.g_head_bias) add(a_.g_head_bias, 0, static_cast<C>(g_head_bias_));
  }

 private:
  // Places the next row that passes a gradient back; returns false if there is none.
  bool fill(int64_t slot) {
    const Recurrence& run = a_.run;
    for (;;) {
      const int64_t row = waiting_.next(&queue_, end_);
      if (row < 0) return false;
      const Record* last = run.tape->last()[row];
      if (run.halt.status[row] == kNonFinite) {
        if (a_.g_x) zero_row(static_cast<C*>(a_.g_x) + row * run.input, run.input);
        for (int l = 0; l < kLeaves; ++l)
          if (a_.g_state[l]) zero_row(static_cast<C*>(a_.g_state[l]) + row * run.dim, run.dim);
        continue;
      }
      row_[slot] = row;
      step_[slot] = run.halt.steps[row];
      record_[slot] = last;
      copy_row(given_[slot], waiting_.given(row), columns_);
      zero_row(g_given_[slot], columns_);
      for (int l = 0; l < kLeaves; ++l) load(g_state_[l][slot], a_.g_result[l], row);
      begin(slot, row, static_cast<const C*>(last->state), weighted_ ? static_cast<C>(last->weight) : C(1));
      return true;
    }
  }
  void load(C* to, const void* from, int64_t row) {
    zero_row(to, width_);
    if (from) copy_row(to, static_cast<const C*>(from) + row * a_.run.dim, a_.run.dim);
  }
  // The gradient in the row's mean readout, and its part in the last state.
  void begin(int64_t slot, int64_t row, const C* state, C weight) {
    C* g = g_output_[slot];
    if (!a_.run.readout) {
      load(g, a_.g_output, row);
    } else {
      zero_row(g, width_);
      if (a_.g_output) {
        const C* read[1] = {g_read_.get()};
        copy_row(g_read_.get(), static_cast<const C*>(a_.g_output) + row * a_.run.width, a_.run.width);
        add_product<C>(read, 1, packed_.readout, width_, &g);
      }
    }
    zero_row(mean_[slot], width_);
    if (a_.run.expects) {
      g_survival_[slot] = C(0);
      at_last_[slot] = C(0);
      if (a_.g_output && a_.run.readout_bias)
        for (int64_t j = 0; j < a_.run.width; ++j)
          if (g_read_.get()[j] != C(0))  // the bias of a masked class is minus infinity
            at_last_[slot] += g_read_.get()[j] * static_cast<const C*>(a_.run.readout_bias)[j];
      return account(slot, weight, ponder_logit(slot));
    }
    account(slot, weight, C(0));
    if (weighted_) {
      at_last_[slot] = dot(g, state, width_);
      if (a_.g_cost) at_last_[slot] += static_cast<const C*>(a_.g_cost)[row];
    }
  }
  // Adds a state's part in the output, and in the logit that was computed from it.
  void account(int64_t slot, C weight, C logit) {
    const C *state = static_cast<const C*>(record_[slot]->state), *g = g_output_[slot];
    C *to = g_state_[0][slot], *mean = mean_[slot];
    for (int64_t j = 0; j < width_; j += kLanes<C>) {
      const vec<C> s = load_vec(state + j);
      const vec<C> of_head = load_vec(packed_.head.get() + j) * logit;
      store_vec(to + j, fma(splat(weight), load_vec(g + j), load_vec(to + j) + of_head));
      store_vec(g_head_.get() + j, fma(splat(logit), s, load_vec(g_head_.get() + j)));
      if (a_.run.readout) store_vec(mean + j, fma(splat(weight), s, load_vec(mean + j)));
    }
    g_head_bias_ += static_cast<double>(logit);
  }
  // The gradient in PonderNet's logit of the step; that in the state of the trace is added.
  C ponder_logit(int64_t slot) {
    const Record* record = record_[slot];
    const C* state = static_cast<const C*>(record->state);
    Pondered<C> kept;
    std::memcpy(&kept, state + kLeaves * width_, sizeof kept);
    C of_weight = dot(g_output_[slot], state, width_) + at_last_[slot];
    if (a_.g_weight) of_weight += static_cast<const C*>(a_.g_weight)[record->at];
    if (a_.g_trace) {
      const C* g = static_cast<const C*>(a_.g_trace) + record->at * a_.run.dim;
      for (int64_t j = 0; j < a_.run.dim; ++j) g_state_[0][slot][j] += g[j];
    }
    const C of_cost = a_.g_cost ? static_cast<const C*>(a_.g_cost)[row_[slot]] : C(0);
    const PonderRowGrad<C> grad =
        ponder_row_backward(kept.logit, kept.log_survival, of_weight, g_survival_[slot], of_cost,
                            ponder_params(a_.run, step_[slot]));
    g_survival_[slot] = grad.log_survival;
    return grad.logit;
  }

  // Goes on with the state before; returns false if that is the initial one.
  bool back(int64_t slot) {
    const Record* record = record_[slot] = record_[slot]->before;
    --step_[slot];
    if (!record->before) {
      end(slot);
      return false;
    }
    if (!weighted_) return true;
    const C p = static_cast<C>(record->weight);
    const C logit =
        a_.run.expects
            ? ponder_logit(slot)
            : (dot(g_output_[slot], static_cast<const C*>(record->state), width_) - at_last_[slot]) * p *
                  (C(1) - p);
    account(slot, p, logit);
    return true;
  }

  void end(int64_t slot) {
    const Recurrence& run = a_.run;
    const int64_t row = row_[slot];
    for (int l = 0; l < kLeaves; ++l)
      if (a_.g_state[l]) copy_row(static_cast<C*>(a_.g_state[l]) + row * run.dim, g_state_[l][slot], run.dim);
    copy_row(input_.left(0), g_given_[slot], columns_);
    zero_row(input_.copy(0), padded<C>(run.input));
    if (run.x) copy_row(input_.copy(0), static_cast<const C*>(run.x) + row * run.input, run.input);
    of_input_[inputs_] = input_.left(0);
    input_row_[inputs_++] = row;
    input_.hold(1);
    if (inputs_ == kRows) add_inputs();
    if (!run.readout) return;
    zero_row(readout_.left(0), padded<C>(run.width));
    if (a_.g_output)
      copy_row(readout_.left(0), static_cast<const C*>(a_.g_output) + row * run.width, run.width);
    copy_row(readout_.copy(0), mean_[slot], width_);
    readout_.hold(1);
  }
  void add_inputs() {
    if (a_.g_x && inputs_ > 0)
      product(of_input_, inputs_, packed_.back.input,
              [&](int64_t r, int64_t b, const vec<C>(&sum)[2]) __attribute__((always_inline)) {
                C values[2 * kLanes<C>];
                for (int p = 0; p < 2; ++p) store_vec(values + p * kLanes<C>, sum[p]);
                const int64_t j = b * 2 * kLanes<C>;
                copy_row(static_cast<C*>(a_.g_x) + input_row_[r] * a_.run.input + j, values,
                         least(2 * kLanes<C>, a_.run.input - j));
              });
    input_.add();
    inputs_ = 0;
  }

  void move(int64_t to, int64_t from) {
    row_[to] = row_[from];
    record_[to] = record_[from];
    at_last_[to] = at_last_[from];
    step_[to] = step_[from];
    g_survival_[to] = g_survival_[from];
    exchange(given_[to], given_[from]);
    exchange(g_given_[to], g_given_[from]);
    for (int l = 0; l < kLeaves; ++l) exchange(g_state_[l][to], g_state_[l][from]);
    exchange(g_output_[to], g_output_[from]);
    exchange(mean_[to], mean_[from]);
  }

  const RecurrenceBackward& a_;
  const Packed& packed_;
  const Cell& cell_;
  int64_t capacity_, width_, columns_;
  bool first_;
  Gradient gradient_;
  OuterSums<C> input_, readout_;
  Waiting<C, Cell> waiting_;
  Scratch<C> lanes_, g_read_, g_head_;
  double g_head_bias_ = 0;
  bool weighted_;
  int64_t queue_ = 0, end_ = 0, inputs_ = 0;
  C *given_[kRows], *g_given_[kRows], *g_state_[kLeaves][kRows], *g_output_[kRows], *mean_[kRows];
  const C* of_input_[kRows];
  int64_t input_row_[kRows], row_[kRows], step_[kRows];
  const Record* record_[kRows];
  C at_last_[kRows];     // of ACT: what the last state's readout and a step less cost; of PonderNet: g . bias
  C g_survival_[kRows];  // of PonderNet: in the logarithm of the survival after the step
};

// The threads' turns, in their order. A thread that fails passes its turn on, too.
class Turn {
 public:
  Turn(int64_t* next, int64_t own) : next_(next), own_(own) {}
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  ~Turn() {
    wait();
    __atomic_store_n(next_, own_ + 1, __ATOMIC_RELEASE);
  }
  void wait() const {
    while (__atomic_load_n(next_, __ATOMIC_ACQUIRE) != own_) sched_yield();
  }

 private:
  int64_t* next_;
  int64_t own_;
};

template <class C, class Cell, class Gradient>
void run(const RecurrenceBackward& a) {
  using Tile = BackwardTile<C, Cell, Gradient>;
  const typename Tile::Packed packed(a);
  const double work = 3 * packed.cell.multiply_adds();
  int64_t next = 0;
  paced_team(a.run.interrupt, work, threads_of(a.run, work), [&](int64_t t, int64_t of, Pace& pace) {
    const int64_t begin = a.run.rows * t / of, end = a.run.rows * (t + 1) / of;
    const Turn turn(&next, t);
    Tile tile(a, packed, least(kRows, end - begin), t == 0);
    tile.run(begin, end, pace);
    turn.wait();
    tile.give();
  });
}

template <class C>
void run_cell(const RecurrenceBackward& a) {
  switch (a.run.cell) {
    case CellKind::gru: return run<C, GruCell<C>, GruGradient<C>>(a);
    case CellKind::lstm: return run<C, LstmCell<C>, LstmGradient<C>>(a);
    case CellKind::mlp: return run<C, MlpCell<C>, MlpGradient<C>>(a);
  }
}

}  // namespace

void recurrence_backward(const RecurrenceBackward& a) {
  if (a.run.rows > 0) a.run.halt.wide ? run_cell<double>(a) : run_cell<float>(a);
}

}  // namespace AC_ISA
}  // namespace adaptcomp
