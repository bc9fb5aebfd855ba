// The backward pass of whole runs on CUDA: one launch for all rows, after one that packs the weights, and one
// that adds up the blocks' sums.
//
// The forward pass keeps nothing but each row's number of steps and its status, because how many states there
// are only the device knows. Here every row is run forward once more, to states in a scratch of its slot, and
// then walked back. The scratch grows with the number of blocks, not with the batch. The slots of a tile are
// in different phases, and a slot whose row has ended takes the next one.
//
// Rows go to blocks and slots by their numbers and steps alone, and the blocks' sums are added in the order
// of the blocks: a device gives the same bits in every run.
#include "halting/rows.h"
#include "recurrence/backward.cuh"

namespace adaptcomp {
namespace {

template <class Cell>
class BackwardTile {
  using C = typename Cell::scalar;
  static constexpr int kLeaves = Cell::kLeaves;
  static constexpr int64_t kNone = -1;
  struct State {
    int64_t step, last;  // of the state that the slot has reached; of the row's last state
    C accumulated;       // ACT's halting probability
    C at_last;           // of ACT: what the last state's readout and a step less cost
    bool back, ended;    // whether the row is walked back; whether it has arrived
  };
  // The tensors of the state before the step; those after it or, walking back, the gradient in them; the
  // gradient in the row's output as one in the state; with a readout, the mean of the states by their
  // weights.
  enum Kind { kFrom, kNext = kLeaves, kOutput = 2 * kLeaves, kMean, kKinds };

 public:
  AC_HD BackwardTile(const RecurrenceBackward& a, const TilePlan& plan, Carver& global, Carver& shared,
                     Carver& own, Carver& sums)
      : a_(a),
        dim_(static_cast<int>(a.run.dim)),
        input_(static_cast<int>(a.run.input)),
        width_(a.run.readout ? static_cast<int>(a.run.width) : 0),
        count_(plan.slots),
        row_(shared.take<int64_t>(plan.slots)),
        state_(shared.take<State>(plan.slots)),
        rows_(a.run.dim, a.run.readout ? kKinds : kMean, plan.slots, shared),
        x_(a.run.input, 1, plan.slots, shared),
        g_read_(a.run.readout ? a.run.width : 0, 1, plan.slots, shared),
        cell_(a, plan, global, shared, own, sums),
        readout_down_(a.run.readout ? a.run.width : 0, a.run.readout ? a.run.dim : 0, plan.has(kReadout),
                      global, shared),
        inputs_(Cell::gates(a.run), a.run.input, own, sums),
        readouts_(a.run.readout ? a.run.width : 0, a.run.readout ? a.run.dim : 0, own, sums),
        states_(own.take<C>(plan.slots * a.run.halt.max_steps * kLeaves * a.run.dim)),
        weights_(own.take<C>(plan.slots * a.run.halt.max_steps)) {}

  void pack(ListOf<Packing>& packings) const {
    cell_.pack(packings);
    if (a_.run.readout) packings.add(packed_down(readout_down_, a_.run.readout));
  }
  void sums(ListOf<SumOf>& list) const {
    cell_.sums(list);
    inputs_.give(list, 0, Cell::gates(a_.run), a_.g_weight_ih, a_.g_bias_ih);
    if (a_.run.readout) readouts_.give(list, 0, a_.run.width, a_.g_readout, a_.g_readout_bias);
  }

  // Runs the rows first, first + apart, ... in this order.
  __device__ __forceinline__ void run(int64_t first, int64_t apart) {
    cell_.bring();
    readout_down_.bring();
    int64_t next = first;
    const unsigned full = first_slots(count_);
    Slots{count_, full, row_}.each([&](int slot) { Warp::once([&] { row_[slot] = kNone; }); });
    __syncthreads();
    for (;;) {
      unsigned live = holding();
      while (next < a_.run.rows && live != full) {
        // The waiting rows go to the empty slots in order, whichever warp comes first.
        const unsigned empty = full & ~live;
        __syncthreads();
        Slots{count_, empty, row_}.each([&](int slot) {
          const int64_t row = next + apart * rank_in(empty, slot);
          if (row < a_.run.rows) fill(slot, row);
        });
        __syncthreads();
        next += apart * __popc(empty);
        live = holding();
      }
      if (live == 0) break;
      const unsigned fresh = where(live, [](const State& s) { return s.step == 0 && !s.back; });
      if (fresh != 0) begin(fresh);
      const unsigned backs = where(live, [](const State& s) { return s.back; });
      cell_.reserve(__popc(backs));
      const C* from[kLeaves];
      C* after[kLeaves];
      for (int l = 0; l < kLeaves; ++l) {
        from[l] = rows_.all(kFrom + l);
        after[l] = rows_.all(kNext + l);
      }
      cell_.walk(live, backs, from, after, rows_.stride());
      Slots{count_, live, row_}.each([&](int slot) {
        if ((backs >> slot & 1) != 0) {
          retreat(slot, rank_in(backs, slot));
        } else {
          advance(slot);
        }
      });
      __syncthreads();
      cell_.hold(__popc(backs));
      const unsigned ended = where(live, [](const State& s) { return s.ended; });
      if (ended != 0) finish(ended);
    }
    cell_.add();
    inputs_.add();
    readouts_.add();
  }

 private:
  AC_HD bool weights() const { return a_.run.halt.policy == Policy::act; }
  __device__ __forceinline__ unsigned holding() const {
    return slots_where(count_, [&](int slot) { return row_[slot] != kNone; });
  }
  template <class F>
  __device__ __forceinline__ unsigned where(unsigned live, const F& f) const {
    return slots_where(count_, [&](int slot) { return (live >> slot & 1) != 0 && f(state_[slot]); });
  }
  static __device__ __forceinline__ const C* row_of(const void* rows, int64_t row, int n) {
    return static_cast<const C*>(rows) + row * n;
  }
  static __device__ __forceinline__ C* row_of(void* rows, int64_t row, int n) {
    return static_cast<C*>(rows) + row * n;
  }
  // Where the states after each step of a slot's row lie, and the weights of their readouts.
  __device__ __forceinline__ C* state_at(int slot, int64_t step, int l) const {
    return states_ + ((slot * a_.run.halt.max_steps + step - 1) * kLeaves + l) * dim_;
  }
  __device__ __forceinline__ C& weight_at(int slot, int64_t step) const {
    return weights_[slot * a_.run.halt.max_steps + step - 1];
  }

  // Places a row in the slot, unless it passes nothing back.
  __device__ __forceinline__ void fill(int slot, int64_t row) {
    if (a_.run.halt.status[row] == kNonFinite) {
      if (a_.g_x) Warp::zero(row_of(a_.g_x, row, input_), input_);
      for (int l = 0; l < kLeaves; ++l)
        if (a_.g_state[l]) Warp::zero(row_of(a_.g_state[l], row, dim_), dim_);
      return;
    }
    for (int l = 0; l < kLeaves; ++l)
      Warp::copy(rows_.at(kFrom + l, slot), row_of(a_.run.state[l], row, dim_), dim_);
    if (a_.run.x) Warp::copy(x_.at(0, slot), row_of(a_.run.x, row, input_), input_);
    if (a_.g_output) {
      Warp::copy(width_ ? g_read_.at(0, slot) : rows_.at(kOutput, slot),
                 row_of(a_.g_output, row, width_ ? width_ : dim_), width_ ? width_ : dim_);
    } else {
      Warp::zero(width_ ? g_read_.at(0, slot) : rows_.at(kOutput, slot), width_ ? width_ : dim_);
    }
    if (width_) Warp::zero(rows_.at(kMean, slot), dim_);
    Warp::zero(cell_.g_given(slot), static_cast<int>(Cell::gates(a_.run)));
    Warp::once([&] {
      row_[slot] = row;
      state_[slot] = {0, a_.run.halt.steps[row], C(0), C(0), false, false};
    });
  }
  // What is computed once for each row, of a set of slots that have been filled.
  __device__ __forceinline__ void begin(unsigned slots) {
    cell_.begin(slots, x_.all(0), x_.stride());
    if (width_)
      product_into(slots, g_read_.all(0), g_read_.stride(), readout_down_, nullptr, rows_.all(kOutput),
                   rows_.stride(), nullptr);
    __syncthreads();
  }

  // Keeps the state after a step, or turns back at the last one.
  __device__ __forceinline__ void advance(int slot) {
    State s = state_[slot];
    const int64_t row = row_[slot];
    ++s.step;
    const C* h = rows_.at(kNext, slot);
    C weight = C(1);
    if (weights()) {
      const C logit = Warp::dot(static_cast<const C*>(a_.run.head), h, dim_) +
                      (a_.run.head_bias ? static_cast<const C*>(a_.run.head_bias)[0] : C(0));
      const HaltStep& halt = a_.run.halt;
      const ActRow<C> act =
          act_row(logit, s.accumulated, {s.step, halt.min_steps, halt.max_steps, halt.threshold});
      s.accumulated = act.accumulated;
      weight = act.weight;
    }
    if (s.step < s.last) {
      for (int l = 0; l < kLeaves; ++l) {
        C *next = rows_.at(kNext + l, slot), *from = rows_.at(kFrom + l, slot),
          *kept = state_at(slot, s.step, l);
        Warp::each(dim_, [&](int j) { from[j] = kept[j] = next[j]; });
      }
      Warp::once([&] {
        weight_at(slot, s.step) = weight;
        state_[slot] = s;
      });
      return;
    }
    s.back = true;
    const C* g = rows_.at(kOutput, slot);
    if (weights()) {
      s.at_last = Warp::dot(g, h, dim_);
      if (a_.g_cost) s.at_last += static_cast<const C*>(a_.g_cost)[row];
    }
    add_to_mean(slot, weight, h);
    for (int l = 0; l < kLeaves; ++l) {
      C* next = rows_.at(kNext + l, slot);
      const C* given = a_.g_result[l] ? row_of(a_.g_result[l], row, dim_) : nullptr;
      Warp::each(dim_, [&](int j) {
        const C from = given ? given[j] : C(0);
        next[j] = l == 0 ? std::fma(weight, g[j], from) : from;
      });
    }
    Warp::once([&] { state_[slot] = s; });
  }
  __device__ __forceinline__ void add_to_mean(int slot, C weight, const C* h) {
    if (width_ == 0) return;
    C* mean = rows_.at(kMean, slot);
    Warp::each(dim_, [&](int j) { mean[j] = std::fma(weight, h[j], mean[j]); });
  }

  // Adds the parts in the output and in the logit of the state that has been reached, and goes on to the one
  // before it. `held`: the number of the row among those of the pass.
  __device__ __forceinline__ void retreat(int slot, int held) {
    State s = state_[slot];
    const int64_t row = row_[slot];
    --s.step;
    C *h = rows_.at(kFrom, slot), *g_state = rows_.at(kNext, slot);
    const C* g = rows_.at(kOutput, slot);
    Warp::copy(cell_.steps().right(held), h, dim_);
    C logit = C(0);
    if (weights() && s.step > 0) {
      const C p = weight_at(slot, s.step);
      logit = (Warp::dot(g, h, dim_) - s.at_last) * p * (C(1) - p);
      const C* head = static_cast<const C*>(a_.run.head);
      Warp::each(dim_, [&](int j) { g_state[j] = std::fma(p, g[j], g_state[j] + head[j] * logit); });
      add_to_mean(slot, p, h);
    }
    if (s.step > 0) {
      for (int l = 0; l < kLeaves; ++l)
        Warp::copy(rows_.at(kFrom + l, slot),
                   s.step > 1 ? state_at(slot, s.step - 1, l) : row_of(a_.run.state[l], row, dim_), dim_);
    } else {
      s.ended = true;
      for (int l = 0; l < kLeaves; ++l)
        if (a_.g_state[l]) Warp::copy(row_of(a_.g_state[l], row, dim_), rows_.at(kNext + l, slot), dim_);
    }
    Warp::once([&] {
      cell_.steps().left(held)[Cell::gates(a_.run)] = logit;
      state_[slot] = s;
    });
  }

  // What is computed once for each row, of a set of slots whose rows have arrived; empties them.
  __device__ __forceinline__ void finish(unsigned slots) {
    const int rows = __popc(slots), gates = static_cast<int>(Cell::gates(a_.run));
    inputs_.reserve(rows);
    readouts_.reserve(rows);
    if (a_.g_x)
      product_into(slots, cell_.g_given(0), cell_.g_given_stride(), cell_.input_down(), nullptr,
                   static_cast<C*>(a_.g_x), input_, row_);
    const Slots those{count_, slots, row_};
    those.each([&](int slot) {
      const int row = rank_in(slots, slot);
      Warp::copy(inputs_.left(row), cell_.g_given(slot), gates);
      if (a_.run.x) Warp::copy(inputs_.right(row), x_.at(0, slot), input_);
      if (width_ == 0) return;
      Warp::copy(readouts_.left(row), g_read_.at(0, slot), width_);
      Warp::copy(readouts_.right(row), rows_.at(kMean, slot), dim_);
    });
    __syncthreads();
    inputs_.hold(rows);
    readouts_.hold(rows);
    those.each([&](int slot) { Warp::once([&] { row_[slot] = kNone; }); });
    __syncthreads();
  }

  const RecurrenceBackward& a_;
  int dim_, input_, width_, count_;  // width_: of the readout; 0: there is none
  int64_t* row_;                     // kNone: the slot is empty
  State* state_;
  TileRows<C> rows_, x_, g_read_;
  Cell cell_;
  Matrix<C> readout_down_;
  OuterSums<C> inputs_, readouts_;
  C *states_, *weights_;
};

// The layout of a block's memory; the host builds it without memory, to measure it. The scratch has the
// matrices, then the sums of all blocks, and then what each has besides.
struct Sizes {
  int64_t sums, own;  // bytes of a block
};

template <class Cell>
struct Block {
  AC_HD Block(const RecurrenceBackward& a, const TilePlan& plan, const Sizes& sizes, void* scratch,
              void* shared_memory, int64_t number)
      : global(scratch),
        shared(shared_memory),
        next(global.template take<unsigned long long>(1)),
        partial(global.template take<char>(plan.blocks * sizes.sums)),
        work(global.template take<char>(plan.blocks * sizes.own)),
        sums(partial + number * sizes.sums),
        own(work + number * sizes.own),
        tile(a, plan, global, shared, own, sums) {}
  AC_HD Sizes sizes() const { return {sums.used(), own.used()}; }

  Carver global, shared;
  unsigned long long* next;  // the packing's counter, which nobody uses here
  char *partial, *work;
  Carver sums, own;
  BackwardTile<Cell> tile;
};

}  // namespace

// Not in the unnamed namespace, where the name of the shared memory would be another one.
template <class Cell>
__global__ void __launch_bounds__(kThreads, 2)
    recurrence_backward_kernel(const __grid_constant__ RecurrenceBackward a,
                               const __grid_constant__ TilePlan plan, const __grid_constant__ Sizes sizes,
                               void* scratch) {
  using C = typename Cell::scalar;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Block<Cell> block(a, plan, sizes, scratch, shared_memory, blockIdx.x);
  auto* sums = reinterpret_cast<C*>(block.partial + blockIdx.x * sizes.sums);
  for (int64_t i = threadIdx.x; i < sizes.sums / static_cast<int64_t>(sizeof(C)); i += kThreads)
    sums[i] = C(0);
  block.tile.run(blockIdx.x, gridDim.x);
}

namespace {

template <class Cell>
Sizes sizes_of(const RecurrenceBackward& a, const TilePlan& plan) {
  return Block<Cell>(a, plan, {0, 0}, nullptr, nullptr, 0).sizes();
}

template <class Cell>
TilePlan plan_of(const RecurrenceBackward& a, int64_t device) {
  constexpr int64_t kMostNumbers = int64_t{1} << 30;  // of a row's states: the sizes below do not overflow
  if (!has_short_rows(a.run) || a.run.halt.max_steps > kMostNumbers / std::max<int64_t>(a.run.dim, 1))
    return {};
  return plan_tile(
      recurrence_backward_kernel<Cell>, a.run.rows, device, 0, kParts,
      [&](const TilePlan& plan) {
        const Block<Cell> block(a, plan, {0, 0}, nullptr, nullptr, 0);
        return BlockNeeds{block.shared.used(), block.sums.used(), block.own.used()};
      },
      [&](const TilePlan& plan) {
        return Block<Cell>(a, plan, sizes_of<Cell>(a, plan), nullptr, nullptr, 0).global.used();
      });
}

}  // namespace

void recurrence_backward_cuda(const RecurrenceBackward& a, const DeviceScratch& scratch, int64_t device,
                              void* stream) {
  if (a.run.rows == 0) return;
  const DeviceGuard guard(device);
  dispatch_cell<GruBack, LstmBack, MlpBack>(a.run, [&](auto* type) {
    using Cell = std::remove_pointer_t<decltype(type)>;
    using C = typename Cell::scalar;
    const TilePlan plan = plan_of<Cell>(a, device);
    check_plan("recurrence_backward", plan, scratch);
    const Sizes sizes = sizes_of<Cell>(a, plan);
    const Block<Cell> memory(a, plan, sizes, scratch.data, nullptr, 0);
    ListOf<Packing> packings;
    memory.tile.pack(packings);
    launch_pack<C>(packings, memory.next, stream);
    launch_shared("recurrence_backward", recurrence_backward_kernel<Cell>, plan.blocks, plan.shared, stream,
                  a, plan, sizes, scratch.data);
    ListOf<SumOf> sums;
    memory.tile.sums(sums);
    const int64_t size = sizes.sums / static_cast<int64_t>(sizeof(C));
    launch("sum", sum_kernel<C>, few_blocks(size), stream, sums, reinterpret_cast<const C*>(memory.partial),
           size, plan.blocks);
  });
}

int64_t recurrence_backward_scratch_cuda(const RecurrenceBackward& a, int64_t device) {
  const DeviceGuard guard(device);
  return dispatch_cell<GruBack, LstmBack, MlpBack>(a.run, [&](auto* type) {
    const TilePlan plan = plan_of<std::remove_pointer_t<decltype(type)>>(a, device);
    return plan.slots == 0 ? int64_t{-1} : plan.scratch;
  });
}

}  // namespace adaptcomp
