// Whole runs of a recurrent cell on CUDA: all steps of all rows in one launch, after one that packs the
// weights. It is recurrence_tile.cpp for the threads of a block.
//
// In PyTorch a step of a small cell is a dozen launches, which take longer than its arithmetic, and whose
// results go through global memory. Here a tile of rows stays in shared memory from a row's first step to its
// last, and so do the weights if they fit; else they are read through the caches. A slot whose row has ended
// takes the next waiting row from a counter, or idles if none waits. Nothing here waits for the host or keeps
// memory, so that a CUDA graph can hold a run.
//
// Limit: a row's numbers have to fit in a block's shared memory, of which Hopper has 58000 floats: its input,
// two states (an LSTM: three), the input's part of the gates (of an MLP twice the hidden layer), its readout.
#include "common/tile_launch.cuh"
#include "confidence/warp.cuh"
#include "halting/rows.h"
#include "recurrence/tile.cuh"

namespace adaptcomp {
namespace {

// Whether a row is finite, or, where classes may be masked, made of valid logits; by one warp.
template <class C>
__device__ __forceinline__ bool is_sound(const C* x, int n, bool may_be_masked) {
  bool finite = true, logits = true, left = false;
#pragma unroll 1
  for (int i = Warp::lane(); i < n; i += kWarp) {
    const bool is = is_finite(x[i]);
    finite &= is;
    logits &= is || is_masked(x[i]);
    left |= is;
  }
  if (__all_sync(~0u, finite)) return true;
  return __all_sync(~0u, logits) && !__all_sync(~0u, !left) && may_be_masked;
}

template <class Cell>
class RecurrenceTile {
  using C = typename Cell::scalar;
  static constexpr int kLeaves = Cell::kLeaves;
  static constexpr int64_t kNone = -1;
  struct State {
    int64_t step, still;  // steps taken; consecutive steps without a change
    C accumulated;        // ACT's halting probability
  };

 public:
  AC_HD RecurrenceTile(const Recurrence& a, const TilePlan& plan, Carver& global, Carver& shared)
      : a_(a),
        dim_(static_cast<int>(a.dim)),
        width_(static_cast<int>(a.width)),
        count_(plan.slots),
        row_(shared.take<int64_t>(plan.slots)),
        state_(shared.take<State>(plan.slots)),
        // Two places of the first tensor take turns; the others are overwritten.
        rows_(a.dim, kLeaves + 1, plan.slots, shared),
        x_(a.input, 1, plan.slots, shared),
        readouts_(a.readout ? a.width : 0, converges() ? 2 : 1, plan.slots, shared),
        readout_(a.readout ? a.dim : 0, a.readout ? a.width : 0, plan.has(kReadout), global, shared),
        cell_(a, plan, global, shared) {}

  void pack(ListOf<Packing>& packings) const {
    cell_.pack(packings);
    if (a_.readout) packings.add(packed_up(readout_, a_.readout));
  }

  // Takes rows from `next` until there are no more.
  __device__ __forceinline__ void run(unsigned long long* next) {
    cell_.bring();
    readout_.bring();
    Slots{count_, ~0u >> (kWarp - count_), row_}.each([&](int slot) { fill(slot, next); });
    __syncthreads();
    for (;;) {
      const unsigned live = slots_where(count_, [&](int slot) { return row_[slot] != kNone; });
      if (live == 0) return;
      const unsigned fresh =
          slots_where(count_, [&](int slot) { return row_[slot] != kNone && state_[slot].step == 0; });
      if (fresh != 0) {
        cell_.begin(fresh, x_.all(0), x_.stride());
        __syncthreads();
      }
      const C* now[kLeaves];
      C* after[kLeaves];
      for (int l = 0; l < kLeaves; ++l) now[l] = after[l] = rows_.all(l == 0 ? turn_ : l + 1);
      turn_ = 1 - turn_;
      after[0] = rows_.all(turn_);
      cell_.step(live, now, after, rows_.stride());
      __syncthreads();
      if (a_.readout) {
        product_into(live, rows_.all(turn_), rows_.stride(), readout_, a_.readout_bias,
                     readouts_.all(reading()), readouts_.stride(), nullptr);
        __syncthreads();
      }
      Slots{count_, live, row_}.each([&](int slot) {
        if (!advance(slot)) fill(slot, next);
      });
      __syncthreads();
    }
  }

 private:
  AC_HD bool converges() const { return a_.halt.policy == Policy::given; }
  AC_HD bool weights() const { return a_.halt.policy == Policy::act; }
  __device__ __forceinline__ int reading() const { return converges() ? turn_ : 0; }

  __device__ __forceinline__ void fill(int slot, unsigned long long* next) {
    unsigned long long taken = 0;
    if (Warp::lane() == 0) taken = atomicAdd(next, 1ull);
    const auto row = static_cast<int64_t>(__shfl_sync(~0u, taken, 0));
    Warp::once([&] {
      row_[slot] = row < a_.rows ? row : kNone;
      state_[slot] = {0, 0, C(0)};
    });
    if (row >= a_.rows) return;
    for (int l = 0; l < kLeaves; ++l)
      Warp::copy(rows_.at(l == 0 ? turn_ : l + 1, slot), static_cast<const C*>(a_.state[l]) + row * dim_,
                 dim_);
    const int input = static_cast<int>(a_.input);
    if (a_.x) Warp::copy(x_.at(0, slot), static_cast<const C*>(a_.x) + row * input, input);
  }

  __device__ __forceinline__ bool has_stayed(int slot, const C* read) const {
    const C* last = a_.readout ? readouts_.at(1 - turn_, slot) : rows_.at(1 - turn_, slot);
    Movement<C> movement;
#pragma unroll 1
    for (int i = Warp::lane(); i < width_; i += kWarp) movement.add(read[i], last[i]);
    movement.change = Warp::total(movement.change);
    movement.size = Warp::total(movement.size);
    return movement.stays(C(a_.halt.threshold), a_.relative);
  }

  // The policy's decision, the same in every lane; updates the row's state.
  __device__ __forceinline__ Decision<C> decision(int64_t row, const C* h, const C* read, State& s,
                                                  int slot) const {
    const HaltStep& run = a_.halt;
    if (run.policy == Policy::confidence && width_ > kClassesPerThread) {
      const C confidence = confidence_warp(read, width_, static_cast<Measure>(run.parameter));
      return {C(1), C(0), confidence >= C(run.threshold), true};
    }
    HaltStep halt{};
    halt.policy = run.policy;
    halt.step = s.step;
    halt.min_steps = run.min_steps;
    halt.max_steps = run.max_steps;
    halt.threshold = run.threshold;
    halt.parameter = run.parameter;
    halt.signal = run.signal;
    halt.sample = run.sample;
    halt.signal_dtype = halt.readout.dtype = sizeof(C) == 8 ? DType::f64 : DType::f32;
    halt.readout.block = read;
    halt.readout.row_elements = width_;
    C logit = C(0);
    uint8_t converged = 0;
    if (a_.head) {
      logit = Warp::dot(static_cast<const C*>(a_.head), h, dim_) +
              (a_.head_bias ? static_cast<const C*>(a_.head_bias)[0] : C(0));
      halt.signal = &logit;
      halt.carry = &s.accumulated;
    }
    if (converges()) {
      s.still = s.step > 1 && has_stayed(slot, read) ? s.still + 1 : 0;
      converged = s.still >= run.parameter;
      halt.signal = &converged;
    }
    return decide<C>(halt, 0, row);
  }

  // Decides for the slot's row after its step; returns false if the row has ended.
  __device__ __forceinline__ bool advance(int slot) {
    State s = state_[slot];
    const int64_t row = row_[slot];
    ++s.step;
    const C* h = rows_.at(turn_, slot);
    const C* read = a_.readout ? readouts_.at(reading(), slot) : h;
    const Decision<C> v = decision(row, h, read, s, slot);
    const bool masked = may_mask(v.weight);
    bool finite = v.finite;
    if (a_.readout) finite = is_sound(read, width_, masked) && finite;
    finite = is_sound(h, dim_, masked && a_.halt.read_leaf == 0) && finite;
    for (int l = 1; l < kLeaves; ++l) finite = is_sound(rows_.at(l + 1, slot), dim_, false) && finite;
    const Status status = outcome(v.halt, finite, s.step, a_.halt.min_steps, a_.halt.max_steps);
    C* out = a_.output ? static_cast<C*>(a_.output) + row * width_ : nullptr;
    if (weights() && v.weight != C(0))
      Warp::each(width_, [&](int j) { accumulate<C>(out[j], v.weight, read[j]); });
    if (status == kRunning) {
      Warp::once([&] {
        if (a_.cost) static_cast<C*>(a_.cost)[row] += v.cost;
        state_[slot] = s;
      });
      return true;
    }
    Warp::once([&] {
      if (a_.cost && status != kNonFinite) static_cast<C*>(a_.cost)[row] += v.cost;
      a_.halt.steps[row] = s.step;
      a_.halt.status[row] = status;
    });
    if (!weights() && out) Warp::copy(out, read, width_);
    for (int l = 0; l < kLeaves; ++l)
      Warp::copy(static_cast<C*>(a_.result[l]) + row * dim_, rows_.at(l == 0 ? turn_ : l + 1, slot), dim_);
    return false;
  }

  const Recurrence& a_;
  int dim_, width_, count_;
  int64_t* row_;  // kNone: the slot is empty
  State* state_;
  TileRows<C> rows_, x_, readouts_;
  Matrix<C> readout_;
  Cell cell_;
  int turn_ = 0;  // the place of the first tensor of the state
};

// The layout of a block's shared and global memory; the host builds it without memory, to measure it.
template <class Cell>
struct Block {
  AC_HD Block(const Recurrence& a, const TilePlan& plan, void* scratch, void* shared_memory)
      : global(scratch),
        shared(shared_memory),
        next(global.template take<unsigned long long>(1)),
        tile(a, plan, global, shared) {}

  Carver global, shared;
  unsigned long long* next;
  RecurrenceTile<Cell> tile;
};

}  // namespace

// Not in the unnamed namespace, where the name of the shared memory would be another one.
template <class Cell>
__global__ void __launch_bounds__(kThreads, 2)
    recurrence_kernel(const __grid_constant__ Recurrence a, const __grid_constant__ TilePlan plan,
                      void* scratch) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Block<Cell> block(a, plan, scratch, shared_memory);
  block.tile.run(block.next);
}

namespace {

template <class Cell>
TilePlan plan_of(const Recurrence& a, int64_t device) {
  if (!has_short_rows(a)) return {};
  const auto block = [&](const TilePlan& plan) { return Block<Cell>(a, plan, nullptr, nullptr); };
  return plan_tile(
      recurrence_kernel<Cell>, a.rows, device, 0, kParts,
      [&](const TilePlan& plan) { return BlockNeeds{block(plan).shared.used(), 0, 0}; },
      [&](const TilePlan& plan) { return block(plan).global.used(); });
}

}  // namespace

void recurrence_cuda(const Recurrence& a, const DeviceScratch& scratch, int64_t device, void* stream) {
  if (a.rows == 0) return;
  const DeviceGuard guard(device);
  dispatch_cell<GruTile, LstmTile, MlpCellTile>(a, [&](auto* type) {
    using Cell = std::remove_pointer_t<decltype(type)>;
    const TilePlan plan = plan_of<Cell>(a, device);
    check_plan("recurrence", plan, scratch);
    const Block<Cell> memory(a, plan, scratch.data, nullptr);
    ListOf<Packing> packings;
    memory.tile.pack(packings);
    launch_pack<typename Cell::scalar>(packings, memory.next, stream);
    launch_shared("recurrence", recurrence_kernel<Cell>, plan.blocks, plan.shared, stream, a, plan,
                  scratch.data);
  });
}

int64_t recurrence_scratch_cuda(const Recurrence& a, int64_t device) {
  const DeviceGuard guard(device);
  return dispatch_cell<GruTile, LstmTile, MlpCellTile>(a, [&](auto* type) {
    const TilePlan plan = plan_of<std::remove_pointer_t<decltype(type)>>(a, device);
    return plan.slots == 0 ? int64_t{-1} : plan.scratch;
  });
}

}  // namespace adaptcomp
