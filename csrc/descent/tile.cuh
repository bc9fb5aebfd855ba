// Fused descents on CUDA: all steps in one launch, and their gradient in another. It is descent/tile.h for
// the threads of a block. The points, gradients and hidden values of a tile of rows stay in shared memory
// from a row's first step to its last, and so do the energy's matrices if they fit. A slot whose row has
// ended takes the next waiting row, or idles if none waits.
//
// Nothing here waits for the host or keeps memory: besides shared memory a launch uses a scratch tensor of
// the caller, so that a CUDA graph can hold it. The gradient's rows go to blocks and slots by their numbers
// alone, and the blocks' sums over rows are added up in the order of the blocks: a device gives the same bits
// in every run.
//
// Limit: a row of the tile has to fit in a block's shared memory. The tile's own indices therefore have 32
// bits; those of the batch have 64.
#pragma once

#include <initializer_list>

#include "common/tile_launch.cuh"
#include "descent/rows.h"
#include "descent/whole.h"

namespace adaptcomp {

template <class C>
__device__ __forceinline__ C setting(const void* data, int64_t stride, int64_t row) {
  return static_cast<const C*>(data)[row * stride];
}

template <class C>
__device__ __forceinline__ void noise_row(const DescentRule& rule, const int64_t* ids, int64_t row,
                                          int64_t step, C* eta, int dim) {
  const auto sample = static_cast<uint64_t>(ids ? ids[row] : row);
  Warp::each((dim + 3) / 4, [&](int block) {
    C four[4];
    normals<C>(rule, sample, step, block, four);
    for (int j = 0; j < 4 && 4 * block + j < dim; ++j) eta[4 * block + j] = four[j];
  });
}

// y + sigma eta - rate m; a null eta is no noise.
template <class C>
__device__ __forceinline__ C unclamped(const C* y, const C* eta, C sigma, C rate, const C* m, int i) {
  const C x = eta ? std::fma(sigma, eta[i], y[i]) : y[i];
  return std::fma(-rate, m[i], x);
}

// The members that both directions share: the slots' batch rows, and the rows of the tile.
template <class C>
class DescentSlots {
 public:
  AC_HD DescentSlots(int64_t dim, int kinds, int slots, Carver& shared)
      : dim_(static_cast<int>(dim)),
        count_(slots),
        row_(shared.take<int64_t>(slots)),
        of_slot_(shared.take<C>(slots)),
        rows_(dim, kinds, slots, shared) {}

 protected:
  static constexpr int64_t kNone = -1;

  __device__ __forceinline__ unsigned full() const { return ~0u >> (kWarp - count_); }
  __device__ __forceinline__ unsigned live() const {
    return slots_where(count_, [&](int slot) { return row_[slot] != kNone; });
  }

  int dim_, count_;
  int64_t* row_;  // kNone: the slot is empty
  C* of_slot_;    // the energy's result for the slot: E, or phi
  TileRows<C> rows_;
};

// An energy is a class with these members:
//   scalar, Energy, Grad        the types of elements, arguments and results
//   kParts                      number of parts that may lie in shared memory; bit 0 of `staged` is the sums,
//                               the others are matrices, the most useful first
//   widest, sizes               the length of its longest row, and a description of its sizes for messages
//   Tile(energy, grad, dim, backward, plan, global, shared)
//                               takes its matrices and its rows of the tile from the memory
//   sums_size(), use_sums(own)  a block's sums, to which the derivatives in the parameters are added
//   pack(packings), sums(list)  on the host: the matrices to pack, and the destinations of the sums
//   bring()                     copies matrices to their places in shared memory
//   begin(row)                  zeroes the row's own results, by one warp
//   evaluate(slots, y, gradient, g, e)
//                               e = E(y), and its gradient g if `gradient`
//   gradient_product(slots, y, r, hr, phi)
//                               hr = H r and phi = <r, g>; adds the derivatives of phi in the parameters to
//                               their sums, and those of the rows' own arguments to the results
// All threads call the last two, which synchronise inside and end with a barrier.

template <class C>
class DescentTile : DescentSlots<C> {
  using Base = DescentSlots<C>;
  using Base::count_, Base::dim_, Base::full, Base::kNone, Base::live, Base::of_slot_, Base::row_,
      Base::rows_;
  struct State {
    int64_t step;
    C e, s, alpha, sigma;
    bool velocity, moving;  // m holds a velocity; it took part in the present proposal
  };
  // The new point and its gradient; the row's point, its gradient and its velocity.
  enum Kind { kP, kG, kY, kKept, kM, kKinds };

 public:
  AC_HD DescentTile(int64_t dim, int slots, Carver& shared)
      : Base(dim, kKinds, slots, shared), state_(shared.take<State>(slots)) {}

  // Takes rows from `next` until there are no more.
  template <class Tile>
  __device__ __forceinline__ void run(const Descent& a, Tile& energy, unsigned long long* next) {
    Slots{count_, full(), row_}.each([&](int slot) { fill(a, slot, next); });
    __syncthreads();
    for (;;) {
      const Slots slots{count_, live(), row_};
      if (slots.live == 0) return;
      const bool gradient =
          slots_where(count_, [&](int slot) {
            return slots.holds(slot) && (a.rule.on_gradient || state_[slot].step < a.rule.max_steps);
          }) != 0;
      energy.evaluate(slots, rows_.all(kP), gradient, rows_.all(kG), of_slot_);
      slots.each([&](int slot) {
        if (!advance(a, slot)) fill(a, slot, next);
      });
      __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ void fill(const Descent& a, int slot, unsigned long long* next) {
    unsigned long long taken = 0;
    if (Warp::lane() == 0) taken = atomicAdd(next, 1ull);
    const auto row = static_cast<int64_t>(__shfl_sync(~0u, taken, 0));
    if (row >= a.rows) {
      Warp::once([&] { row_[slot] = kNone; });
      return;
    }
    const C alpha = setting<C>(a.step_size, a.step_size_stride, row);
    const C sigma = a.rule.noisy ? setting<C>(a.noise, a.noise_stride, row) : C(0);
    Warp::once([&] {
      row_[slot] = row;
      state_[slot] = {0, C(0), C(1), alpha, sigma, false, false};
    });
    const C* y0 = static_cast<const C*>(a.y0) + row * dim_;
    C *p = rows_.at(kP, slot), *y = rows_.at(kY, slot), *m = rows_.at(kM, slot);
    Warp::each(dim_, [&](int i) {
      p[i] = y[i] = y0[i];
      m[i] = C(0);
    });
  }

  // Judges the slot's point; proposes the next one, or ends the row and returns false.
  __device__ __forceinline__ bool advance(const Descent& a, int slot) {
    const DescentRule& rule = a.rule;
    State s = state_[slot];
    const int64_t row = row_[slot];
    C *p = rows_.at(kP, slot), *g = rows_.at(kG, slot), *y = rows_.at(kY, slot),
      *kept = rows_.at(kKept, slot), *m = rows_.at(kM, slot);
    const C e_new = of_slot_[slot];
    const C norm = rule.on_gradient ? std::sqrt(Warp::dot(g, g, dim_)) : C(0);
    const bool finite = Warp::finite(p, dim_) && is_finite(e_new);
    const Verdict verdict = judge<C>(rule, s.step, s.e, e_new, finite, norm, s.moving);
    const C used_scale = s.s;
    if (verdict.accept) {
      Warp::copy(y, p, dim_);
      Warp::copy(kept, g, dim_);
      s.e = e_new;
    } else {
      s.velocity = false;
      Warp::zero(m, dim_);
      if (rule.backtracking > 0) s.s *= C(rule.backtracking);
    }
    if (s.step > 0) {
      const int64_t at_step = row * rule.max_steps + s.step - 1;
      if (a.path) Warp::copy(static_cast<C*>(a.path) + at_step * dim_, y, dim_);
      if (a.scale)
        Warp::once([&] { static_cast<C*>(a.scale)[at_step] = verdict.accept ? used_scale : C(0); });
    }
    if (verdict.status != kRunning) {
      Warp::copy(static_cast<C*>(a.y) + row * dim_, y, dim_);
      Warp::once([&] {
        // A starting point that is not finite reports its own energy.
        static_cast<C*>(a.energy)[row] = s.step == 0 ? e_new : s.e;
        a.steps[row] = s.step;
        a.status[row] = verdict.status;
      });
      return false;
    }
    ++s.step;
    const C* direction = kept;
    if (rule.momentum > 0 || rule.clip > 0) {
      const C factor = rule.clip > 0 ? clip_factor<C>(rule, std::sqrt(Warp::dot(kept, kept, dim_))) : C(1);
      Warp::each(dim_, [&](int i) { m[i] = std::fma(C(rule.momentum), m[i], factor * kept[i]); });
      direction = m;
      s.moving = rule.momentum > 0 && s.velocity;
      s.velocity = true;
      if (a.velocity)
        Warp::copy(static_cast<C*>(a.velocity) + (row * rule.max_steps + s.step - 1) * dim_, m, dim_);
    }
    C* eta = rule.noisy ? g : nullptr;  // g is free: its gradient was copied or is not needed
    if (eta) noise_row(rule, a.sample_ids, row, s.step, eta, dim_);
    const C rate = s.alpha * s.s;
    Warp::each(dim_, [&](int i) { p[i] = clamped(rule, unclamped(y, eta, s.sigma, rate, direction, i)); });
    Warp::once([&] { state_[slot] = s; });
    return true;
  }

  State* state_;
};

// The gradient of a descent: the same tile, backward in time. Every slot goes through its row's steps from
// the last one to the first.
template <class C>
class DescentBackwardTile : DescentSlots<C> {
  using Base = DescentSlots<C>;
  using Base::count_, Base::dim_, Base::full, Base::kNone, Base::live, Base::of_slot_, Base::row_,
      Base::rows_;
  struct State {
    int64_t step, passed;  // the present step; the number of steps passed through
    C alpha, sigma, g_alpha, g_sigma;
  };
  // v, the loss's gradient in the new point; the point before it; r, the loss's gradient in g, and H r; g,
  // the energy's gradient at the point; the velocity; and the loss's gradient in the velocity before.
  enum Kind { kV, kY, kR, kHr, kG, kM, kGm, kKinds };

 public:
  AC_HD DescentBackwardTile(int64_t dim, int slots, Carver& shared)
      : Base(dim, kKinds, slots, shared), state_(shared.take<State>(slots)) {}

  // Runs the rows first, first + apart, ... in this order.
  template <class Tile>
  __device__ __forceinline__ void run(const DescentBackward& a, Tile& energy, int64_t first, int64_t apart) {
    // The backward step then needs g itself, not only its product with a vector.
    const bool limited = a.rule.clip > 0 || a.rule.low > -HUGE_VAL || a.rule.high < HUGE_VAL;
    int64_t next = first;
    Slots{count_, full(), row_}.each([&](int slot) { Warp::once([&] { row_[slot] = kNone; }); });
    __syncthreads();
    for (;;) {
      unsigned held = live();
      while (next < a.rows && held != full()) {
        // The waiting rows go to the empty slots in order, whichever warp comes first.
        const unsigned empty = full() & ~held;
        __syncthreads();
        Slots{count_, empty, row_}.each([&](int slot) {
          const int64_t row = next + apart * __popc(empty & ((1u << slot) - 1));
          if (row < a.rows) fill(a, energy, slot, row);
        });
        __syncthreads();
        next += apart * __popc(empty);
        held = live();
      }
      if (held == 0) return;
      const Slots slots{count_, held, row_};
      if (limited) energy.evaluate(slots, rows_.all(kY), true, rows_.all(kG), of_slot_);
      slots.each([&](int slot) { into_gradient(a, slot, limited); });
      __syncthreads();
      energy.gradient_product(slots, rows_.all(kY), rows_.all(kR), rows_.all(kHr), of_slot_);
      slots.each([&](int slot) { retreat(a, slot, limited); });
      __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ int64_t at_step(const DescentBackward& a, int64_t row, int64_t step) const {
    return row * a.rule.max_steps + step - 1;
  }

  template <class Tile>
  __device__ __forceinline__ void fill(const DescentBackward& a, Tile& energy, int slot, int64_t row) {
    const State s{a.steps[row],
                  0,
                  setting<C>(a.step_size, a.step_size_stride, row),
                  a.rule.noisy ? setting<C>(a.noise, a.noise_stride, row) : C(0),
                  C(0),
                  C(0)};
    C *v = rows_.at(kV, slot), *g_m = rows_.at(kGm, slot);
    const C* g_y = a.g_y ? static_cast<const C*>(a.g_y) + row * dim_ : nullptr;
    Warp::each(dim_, [&](int i) {
      v[i] = g_y ? g_y[i] : C(0);
      g_m[i] = C(0);
    });
    energy.begin(row);
    find_step(a, slot, row, s);
  }

  // Adds the loss's gradient in y after the present step, and skips rejected steps, which changed nothing.
  // Leaves the slot at an accepted step, or writes the row's results and leaves the slot empty.
  __device__ __forceinline__ void find_step(const DescentBackward& a, int slot, int64_t row, State s) {
    C *v = rows_.at(kV, slot), *g_m = rows_.at(kGm, slot), *y = rows_.at(kY, slot);
    bool found = false;
    for (; s.step > 0; --s.step) {
      if (a.last_steps > 0 && s.passed == a.last_steps) break;
      const int64_t here = at_step(a, row, s.step);
      if (a.g_path) {
        const C* g_path = static_cast<const C*>(a.g_path) + here * dim_;
        Warp::each(dim_, [&](int i) { v[i] += g_path[i]; });
      }
      if (static_cast<const C*>(a.scale)[here] != C(0)) {
        Warp::copy(y,
                   s.step > 1 ? static_cast<const C*>(a.path) + (here - 1) * dim_
                              : static_cast<const C*>(a.y0) + row * dim_,
                   dim_);
        found = true;
        break;
      }
      Warp::zero(g_m, dim_);  // a rejection set the velocity to zero
      ++s.passed;
    }
    if (!found) {
      if (a.last_steps > 0 && s.passed == a.last_steps) Warp::zero(v, dim_);
      Warp::copy(static_cast<C*>(a.g_y0) + row * dim_, v, dim_);
      Warp::once([&] {
        static_cast<C*>(a.g_step_size)[row] = s.g_alpha;
        if (a.g_noise) static_cast<C*>(a.g_noise)[row] = s.g_sigma;
      });
    }
    Warp::once([&] {
      row_[slot] = found ? row : kNone;
      state_[slot] = s;
    });
  }

  // Computes r, the gradient in g, from v, the gradient in the new point, through clamp, step and clip.
  __device__ __forceinline__ void into_gradient(const DescentBackward& a, int slot, bool limited) {
    const DescentRule& rule = a.rule;
    State s = state_[slot];
    const int64_t row = row_[slot], here = at_step(a, row, s.step);
    C *v = rows_.at(kV, slot), *r = rows_.at(kR, slot), *m = rows_.at(kM, slot), *g_m = rows_.at(kGm, slot);
    const C *g = rows_.at(kG, slot), *y = rows_.at(kY, slot);
    const C scale = static_cast<const C*>(a.scale)[here], rate = s.alpha * scale;
    C* eta = rule.noisy ? rows_.at(kHr, slot) : nullptr;  // free until the product writes it
    if (eta) noise_row(rule, a.sample_ids, row, s.step, eta, dim_);
    C factor = C(1), norm = C(0);
    if (rule.clip > 0) {
      norm = std::sqrt(Warp::dot(g, g, dim_));
      factor = clip_factor<C>(rule, norm);
    }
    if (rule.momentum > 0) {
      Warp::copy(m, static_cast<const C*>(a.velocity) + here * dim_, dim_);
    } else if (limited) {
      Warp::each(dim_, [&](int i) { m[i] = factor * g[i]; });
    }
    if (limited) {
      // A clamped element passes no gradient.
      Warp::each(dim_, [&](int i) {
        const C x = unclamped<C>(y, eta, s.sigma, rate, m, i);
        if (x < C(rule.low) || x > C(rule.high)) v[i] = C(0);
      });
    }
    if (eta) s.g_sigma += Warp::dot(eta, v, dim_);
    Warp::each(dim_, [&](int i) { r[i] = std::fma(-rate, v[i], g_m[i]); });
    if (rule.momentum > 0) Warp::each(dim_, [&](int i) { g_m[i] = C(rule.momentum) * r[i]; });
    if (rule.clip > 0 && factor != C(1)) {
      // clip(g) = c g / |g| passes no gradient along g.
      const C along = Warp::dot(g, r, dim_) / (norm * norm);
      Warp::each(dim_, [&](int i) { r[i] = factor * std::fma(-along, g[i], r[i]); });
    }
    if (limited || rule.momentum > 0) s.g_alpha -= Warp::dot(m, v, dim_) * scale;
    Warp::once([&] { state_[slot] = s; });
  }

  // Computes v of the step before, and goes to that step.
  __device__ __forceinline__ void retreat(const DescentBackward& a, int slot, bool limited) {
    State s = state_[slot];
    C *v = rows_.at(kV, slot), *g_m = rows_.at(kGm, slot);
    const C* hr = rows_.at(kHr, slot);
    if (!limited && a.rule.momentum <= 0)
      s.g_alpha += of_slot_[slot] / s.alpha;  // r = -alpha s v, so <r, g> = -alpha s <v, g>
    const bool alone = a.last_steps == 0 && s.step > 1;
    Warp::each(dim_, [&](int i) {
      v[i] = alone ? C(0) : v[i] + hr[i];
      if (alone) g_m[i] = C(0);
    });
    --s.step;
    ++s.passed;
    find_step(a, slot, row_[slot], s);
  }

  State* state_;
};

// --- launches

// The layout of a block's shared and global memory; the host builds it without memory, to measure it.
template <class Tile, bool kBackward>
struct DescentBlock {
  using C = typename Tile::scalar;

  AC_HD DescentBlock(const typename Tile::Energy& e, const typename Tile::Grad& grad, int64_t dim,
                     const TilePlan& plan, void* scratch, void* shared_memory, int64_t block)
      : global(scratch),
        shared(shared_memory),
        next(global.template take<unsigned long long>(1)),
        rows(dim, plan.slots, shared),
        energy(e, grad, dim, kBackward, plan, global, shared) {
    if constexpr (kBackward) {
      size = padded<C>(energy.sums_size());
      partial = global.template take<C>(plan.blocks * size);
      own = plan.has(0) ? shared.template take<C>(size) : partial + block * size;
      energy.use_sums(own);
    }
  }

  Carver global, shared;
  unsigned long long* next;
  std::conditional_t<kBackward, DescentBackwardTile<C>, DescentTile<C>> rows;
  Tile energy;
  int64_t size = 0;  // of a block's sums, in elements
  C *partial = nullptr, *own = nullptr;
};

template <class Tile>
__global__ void __launch_bounds__(kThreads, 2)
    descent_kernel(const __grid_constant__ Descent a, const __grid_constant__ typename Tile::Energy e,
                   const __grid_constant__ TilePlan plan, void* scratch) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  DescentBlock<Tile, false> block(e, {}, a.dim, plan, scratch, shared_memory, blockIdx.x);
  block.energy.bring();
  block.rows.run(a, block.energy, block.next);
}

template <class Tile>
__global__ void __launch_bounds__(kThreads, 2)
    descent_backward_kernel(const __grid_constant__ DescentBackward a,
                            const __grid_constant__ typename Tile::Energy e,
                            const __grid_constant__ typename Tile::Grad grad,
                            const __grid_constant__ TilePlan plan, void* scratch) {
  using C = typename Tile::scalar;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  DescentBlock<Tile, true> block(e, grad, a.dim, plan, scratch, shared_memory, blockIdx.x);
  block.energy.bring();
  for (int64_t i = threadIdx.x; i < block.size; i += kThreads) block.own[i] = C(0);
  block.rows.run(a, block.energy, blockIdx.x, gridDim.x);
  if (plan.has(0)) {
    C* to = block.partial + blockIdx.x * block.size;
    for (int64_t i = threadIdx.x; i < block.size; i += kThreads) to[i] = block.own[i];
  }
}

// The layout of a launch on the current device; without slots if a row does not fit.
template <class Tile, bool kBackward, class Kernel>
TilePlan plan_descent(Kernel* kernel, int64_t rows, int64_t dim, const typename Tile::Energy& e,
                      int64_t device) {
  using C = typename Tile::scalar;
  const auto block = [&](const TilePlan& plan) {
    return DescentBlock<Tile, kBackward>(e, {}, dim, plan, nullptr, nullptr, 0);
  };
  constexpr auto size = static_cast<int64_t>(sizeof(C));
  if (Tile::widest(e, dim) > (int64_t{1} << 20) / size) return {};  // more than any block has
  return plan_tile(
      kernel, rows, device, kBackward ? 0 : 1, Tile::kParts,
      [&](const TilePlan& plan) {
        const auto own = block(plan);
        return BlockNeeds{own.shared.used(), kBackward ? std::max<int64_t>(own.size * size, 1) : 0, 0};
      },
      [&](const TilePlan& plan) { return block(plan).global.used(); });
}

template <class Tile>
void check_plan(const char* name, const TilePlan& plan, const DeviceScratch& scratch, int64_t dim,
                const typename Tile::Energy& e) {
  if (plan.slots == 0)
    throw std::runtime_error(std::string("adaptcomp_ext: ") + name + ": a row with dim " +
                             std::to_string(dim) + ", " + Tile::sizes(e) +
                             " does not fit in the shared memory of a block of this CUDA device");
  if (scratch.bytes < plan.scratch)
    throw std::runtime_error(std::string("adaptcomp_ext: ") + name + " needs " +
                             std::to_string(plan.scratch) + " bytes of scratch on the CUDA device, not " +
                             std::to_string(scratch.bytes));
}

template <class Tile, bool kBackward>
void pack(const DescentBlock<Tile, kBackward>& memory, void* stream) {
  ListOf<Packing> packings;
  memory.energy.pack(packings);
  launch_pack<typename Tile::scalar>(packings, memory.next, stream);
}

template <class Tile>
void descend_cuda(const char* name, const Descent& a, const typename Tile::Energy& e,
                  const DeviceScratch& scratch, int64_t device, void* stream) {
  if (a.rows == 0) return;
  const DeviceGuard guard(device);
  const TilePlan plan = plan_descent<Tile, false>(descent_kernel<Tile>, a.rows, a.dim, e, device);
  check_plan<Tile>(name, plan, scratch, a.dim, e);
  pack(DescentBlock<Tile, false>(e, {}, a.dim, plan, scratch.data, nullptr, 0), stream);
  launch_shared(name, descent_kernel<Tile>, plan.blocks, plan.shared, stream, a, e, plan, scratch.data);
}

template <class Tile>
void descend_backward_cuda(const char* name, const DescentBackward& a, const typename Tile::Energy& e,
                           const typename Tile::Grad& grad, const DeviceScratch& scratch, int64_t device,
                           void* stream) {
  const DeviceGuard guard(device);
  const TilePlan plan = plan_descent<Tile, true>(descent_backward_kernel<Tile>, a.rows, a.dim, e, device);
  check_plan<Tile>(name, plan, scratch, a.dim, e);
  const DescentBlock<Tile, true> memory(e, grad, a.dim, plan, scratch.data, nullptr, 0);
  pack(memory, stream);
  launch_shared(name, descent_backward_kernel<Tile>, plan.blocks, plan.shared, stream, a, e, grad, plan,
                scratch.data);
  ListOf<SumOf> sums;
  memory.energy.sums(sums);
  launch("sum", sum_kernel<typename Tile::scalar>, few_blocks(memory.size), stream, sums,
         static_cast<const typename Tile::scalar*>(memory.partial), memory.size, plan.blocks);
}

// Bytes of scratch of a call; -1 if a row does not fit.
template <class Tile>
int64_t descent_scratch(int64_t rows, int64_t dim, const typename Tile::Energy& e, bool backward,
                        int64_t device) {
  const DeviceGuard guard(device);
  const TilePlan plan = backward
                            ? plan_descent<Tile, true>(descent_backward_kernel<Tile>, rows, dim, e, device)
                            : plan_descent<Tile, false>(descent_kernel<Tile>, rows, dim, e, device);
  return plan.slots == 0 ? -1 : plan.scratch;
}

}  // namespace adaptcomp
