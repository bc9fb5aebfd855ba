// Descents on the energy network on CUDA, all steps of a row in one launch (descent/tile.cuh).
//
// A step of a small network is a few microseconds of arithmetic. In PyTorch it is some twenty launches, which
// dominate its time, and the hidden values go through global memory each time. Here they never leave the
// block. Both layers' matrices are packed once per call, for both directions in which they are read, and
// copied to shared memory if they fit. A larger network reads them through the caches, which then bound the
// step.
//
// Limit: the tile's rows for one batch row have to fit in a block's shared memory. Of the 58000 floats that a
// block has on Hopper they take 5 dim + hidden1 forward and 7 dim + 3 hidden1 backward, with two layers 5 dim
// + 2 hidden1 + hidden2 and 7 dim + 6 hidden1 + 3 hidden2. Each block keeps its own sums of the gradient over
// rows, as large as the parameters, and reads and writes them once per step: for layers too large for shared
// memory this costs more than the products.
#include "descent/tile.cuh"
#include "mlp_energy/activated.cuh"
#include "mlp_energy/mlp_energy.h"

namespace adaptcomp {
namespace {

template <class C>
class MlpTile {
 public:
  using scalar = C;
  using Energy = MlpEnergy;
  using Grad = MlpEnergyGrad;
  static constexpr int kParts = 5;
  static int64_t widest(const MlpEnergy& e, int64_t dim) { return std::max({dim, e.hidden1, e.hidden2}); }
  static std::string sizes(const MlpEnergy& e) {
    return "hidden layers of " + std::to_string(e.hidden1) + " and " + std::to_string(e.hidden2);
  }

  AC_HD MlpTile(const MlpEnergy& e, const MlpEnergyGrad& grad, int64_t dim, bool backward,
                const TilePlan& plan, Carver& global, Carver& shared)
      : e_(e),
        grad_(grad),
        dim_(static_cast<int>(dim)),
        n1_(static_cast<int>(e.hidden1)),
        n2_(static_cast<int>(e.hidden2)),
        stride_(tile_stride<C>(dim)),
        up1_(dim, e.hidden1, plan.has(1), global, shared),
        down1_(e.hidden1, dim, plan.has(2), global, shared),
        up2_(e.hidden2 ? e.hidden1 : 0, e.hidden2, plan.has(3), global, shared),
        down2_(e.hidden2, e.hidden2 ? e.hidden1 : 0, plan.has(4), global, shared),
        first_(e.hidden1,
               kinds(backward, e.hidden2 ? kFirstForward : kA + 1, e.hidden2 ? kFirstBackward : kF + 1),
               plan.slots, shared),
        second_(e.hidden2, e.hidden2 ? (backward ? kF + 1 : kA + 1) : 0, plan.slots, shared) {}

  AC_HD int64_t sums_size() const { return bias2() + e_.hidden2; }
  AC_HD void use_sums(C* own) { sums_ = own; }
  void sums(ListOf<SumOf>& list) const {
    list.add({grad_.weight1, 0, n1_, dim_, padded<C>(dim_), false});
    list.add({grad_.out, out(), 1, last(), 0, false});
    if (deep()) {
      list.add({grad_.weight2, weight2(), n2_, n1_, padded<C>(n1_), false});
      list.add({grad_.bias2, bias2(), 1, n2_, 0, false});
    }
  }
  void pack(ListOf<Packing>& packings) const {
    const auto both = [&](const Matrix<C>& up, const Matrix<C>& down, const void* weight) {
      packings.add({up.packed(), weight, up.inner(), up.columns(), up.stride(), 1, up.inner(), false});
      packings.add(
          {down.packed(), weight, down.inner(), down.columns(), down.stride(), down.columns(), 1, false});
    };
    both(up1_, down1_, e_.weight1);
    if (deep()) both(up2_, down2_, e_.weight2);
  }

  __device__ __forceinline__ void bring() {
    up1_.bring();
    down1_.bring();
    up2_.bring();
    down2_.bring();
  }

  __device__ __forceinline__ void begin(int64_t row) {
    Warp::zero(static_cast<C*>(grad_.context) + row * n1_, n1_);
  }

  __device__ __forceinline__ void evaluate(const Slots& slots, const C* y, bool gradient, C* g, C* e) {
    if (deep()) {
      into_first(slots, y, first_.all(kSlope));
      __syncthreads();
      slots.each([&](int slot) {
        C *slope = first_.at(kSlope, slot), *h = first_.at(kH, slot);
        Warp::each(n1_, [&](int j) {
          const auto act = activated<true, false>(e_.activation, slope[j]);
          h[j] = act.value;
          slope[j] = act.first;
        });
      });
      __syncthreads();
      into_second(slots);
      __syncthreads();
      last_layer(slots, second_, n2_, y, e);
      __syncthreads();
      if (!gradient) return;
      C* slope = first_.all(kSlope);
      product(slots, second_.all(kA), second_.stride(), down2_, Nothing<C>(),
              [&](int slot, int j, C q) { slope[slot * first_.stride() + j] *= q; });
      __syncthreads();
      down(slots, slope, y, g);
    } else {
      into_first(slots, y, first_.all(kA));
      __syncthreads();
      last_layer(slots, first_, n1_, y, e);
      __syncthreads();
      if (!gradient) return;
      down(slots, first_.all(kA), y, g);
    }
    __syncthreads();
  }

  // The derivatives of phi = <r, g> = d/dt E(y + t r): forward mode in the direction r, then backward.
  __device__ __forceinline__ void gradient_product(const Slots& slots, const C* y, const C* r, C* hr,
                                                   C* phi) {
    const int stride1 = first_.stride(), stride2 = second_.stride();
    if (deep()) {
      into_first(slots, y, first_.all(kSlope));
      plain(slots, r, stride_, up1_, first_.all(kBend), stride1);
      __syncthreads();
      slots.each([&](int slot) {
        C *slope = first_.at(kSlope, slot), *bend = first_.at(kBend, slot);
        C *h = first_.at(kH, slot), *change = first_.at(kChange, slot);
        Warp::each(n1_, [&](int j) {
          const auto act = activated<true, true>(e_.activation, slope[j]);
          const C u = bend[j];
          h[j] = act.value;
          change[j] = act.first * u;
          slope[j] = act.first;
          bend[j] = act.second * u;
        });
      });
      __syncthreads();
      into_second(slots);
      plain(slots, first_.all(kChange), stride1, up2_, second_.all(kU), stride2);
      __syncthreads();
      last_product(slots, second_, n2_, y, r, phi);
      __syncthreads();
      const C *s2 = second_.all(kA), *t2 = second_.all(kU);
      add_outer<C, 2>(slots, sums_ + weight2(), n2_, n1_,
                      {{s2, stride2, first_.all(kChange), stride1}, {t2, stride2, first_.all(kH), stride1}});
      add_columns(slots, sums_ + out(), n2_, second_.all(kF), stride2);
      add_columns(slots, sums_ + bias2(), n2_, t2, stride2);
      plain(slots, s2, stride2, down2_, first_.all(kS), stride1);
      plain(slots, t2, stride2, down2_, first_.all(kT), stride1);
      __syncthreads();
      slots.each([&](int slot) {
        const C *slope = first_.at(kSlope, slot), *bend = first_.at(kBend, slot);
        C *s = first_.at(kS, slot), *t = first_.at(kT, slot);
        C* g_context = static_cast<C*>(grad_.context) + slots.row[slot] * n1_;
        Warp::each(n1_, [&](int j) {
          t[j] = std::fma(t[j], slope[j], s[j] * bend[j]);
          s[j] *= slope[j];
          g_context[j] += t[j];
        });
      });
      __syncthreads();
      first_sums(slots, first_.all(kS), first_.all(kT), y, r, hr);
    } else {
      into_first(slots, y, first_.all(kA));
      plain(slots, r, stride_, up1_, first_.all(kU), stride1);
      __syncthreads();
      last_product(slots, first_, n1_, y, r, phi);
      __syncthreads();
      add_columns(slots, sums_ + out(), n1_, first_.all(kF), stride1);
      first_sums(slots, first_.all(kA), first_.all(kU), y, r, hr);
    }
    __syncthreads();
  }

 private:
  // Rows of the last layer: a, then the derivative in a; u, the change of a along r, then the derivative in
  // u; the derivative in w.
  enum Last { kA, kU, kF };
  // Rows of the first of two layers: act'(a) and act(a); act''(a) u and the change of act(a); the derivatives
  // in u and a.
  enum First { kSlope, kH, kFirstForward, kBend = kFirstForward, kChange, kS, kT, kFirstBackward };
  static AC_HD int kinds(bool backward, int forwards, int backwards) {
    return backward ? backwards : forwards;
  }

  AC_HD bool deep() const { return e_.hidden2 != 0; }
  AC_HD int64_t last() const { return deep() ? e_.hidden2 : e_.hidden1; }
  // Offsets of the parameters' sums, after those of weight1.
  AC_HD int64_t weight2() const { return outer_size<C>(e_.hidden1, dim_); }
  AC_HD int64_t out() const { return weight2() + outer_size<C>(e_.hidden2, e_.hidden1); }
  AC_HD int64_t bias2() const { return out() + last(); }
  __device__ __forceinline__ C ridge() const { return C(e_.ridge); }

  // to = M in
  __device__ __forceinline__ void plain(const Slots& slots, const C* in, int stride, const Matrix<C>& matrix,
                                        C* to, int to_stride) {
    product(slots, in, stride, matrix, Nothing<C>(),
            [&](int slot, int j, C x) { to[slot * to_stride + j] = x; });
  }
  // a = W_1 y + c
  __device__ __forceinline__ void into_first(const Slots& slots, const C* y, C* a) {
    const auto* context = static_cast<const C*>(e_.context);
    product(
        slots, y, stride_, up1_,
        [&](int slot, int j) { return context[slots.row[slot] * e_.context_stride + j]; },
        [&](int slot, int j, C x) { a[slot * first_.stride() + j] = x; });
  }
  // a_2 = W_2 h + b_2
  __device__ __forceinline__ void into_second(const Slots& slots) {
    const auto* bias = static_cast<const C*>(e_.bias2);
    C* a = second_.all(kA);
    product(
        slots, first_.all(kH), first_.stride(), up2_, [&](int, int j) { return bias[j]; },
        [&](int slot, int j, C x) { a[slot * second_.stride() + j] = x; });
  }
  // to = W_1' s + rho x
  __device__ __forceinline__ void down(const Slots& slots, const C* s, const C* x, C* to) {
    product(slots, s, first_.stride(), down1_, Nothing<C>(), [&](int slot, int j, C g) {
      const int at = slot * stride_ + j;
      to[at] = std::fma(ridge(), x[at], g);
    });
  }

  // Computes the energy, and replaces a by the derivative in a.
  __device__ __forceinline__ void last_layer(const Slots& slots, const TileRows<C>& layer, int n, const C* y,
                                             C* e) {
    const auto* out = static_cast<const C*>(e_.out);
    slots.each([&](int slot) {
      C *s = layer.at(kA, slot), energy = 0;
      Warp::each(n, [&](int j) {
        const auto act = activated<true, false>(e_.activation, s[j]);
        energy = std::fma(out[j], act.value, energy);
        s[j] = out[j] * act.first;
      });
      energy = Warp::total(energy) + *static_cast<const C*>(e_.out_bias);
      const C* at = y + slot * stride_;
      if (ridge() != C(0)) energy += C(0.5) * ridge() * Warp::dot(at, at, dim_);
      Warp::once([&] { e[slot] = energy; });
    });
  }

  // Computes phi and its derivatives. With one layer the derivative in the context is that in a; it is added
  // to the row's result here.
  __device__ __forceinline__ void last_product(const Slots& slots, const TileRows<C>& layer, int n,
                                               const C* y, const C* r, C* phi) {
    const auto* out = static_cast<const C*>(e_.out);
    slots.each([&](int slot) {
      C *s = layer.at(kA, slot), *t = layer.at(kU, slot), *f = layer.at(kF, slot), along = 0;
      C* g_context = deep() ? nullptr : static_cast<C*>(grad_.context) + slots.row[slot] * n1_;
      Warp::each(n, [&](int j) {
        const auto act = activated<false, true>(e_.activation, s[j]);
        const C w = out[j], u = t[j];
        s[j] = w * act.first;
        t[j] = w * act.second * u;
        f[j] = act.first * u;
        along = std::fma(s[j], u, along);
        if (g_context) g_context[j] += t[j];
      });
      along = Warp::total(along);
      if (ridge() != C(0)) along += ridge() * Warp::dot(y + slot * stride_, r + slot * stride_, dim_);
      Warp::once([&] { phi[slot] = along; });
    });
  }

  // Computes hr and adds to the first layer's sums, from the derivatives s in the change of a_1 and t in a_1.
  __device__ __forceinline__ void first_sums(const Slots& slots, const C* s, const C* t, const C* y,
                                             const C* r, C* hr) {
    const int stride1 = first_.stride();
    add_outer<C, 2>(slots, sums_, n1_, dim_, {{s, stride1, r, stride_}, {t, stride1, y, stride_}});
    down(slots, t, r, hr);
  }

  const MlpEnergy& e_;
  const MlpEnergyGrad& grad_;
  int dim_, n1_, n2_, stride_;
  Matrix<C> up1_, down1_, up2_, down2_;
  TileRows<C> first_, second_;
  C* sums_ = nullptr;
};

}  // namespace

void mlp_descent_cuda(const Descent& a, const MlpEnergy& e, const DeviceScratch& scratch, int64_t device,
                      void* stream) {
  (a.wide ? descend_cuda<MlpTile<double>> : descend_cuda<MlpTile<float>>)("mlp_descent", a, e, scratch,
                                                                          device, stream);
}

void mlp_descent_backward_cuda(const DescentBackward& a, const MlpEnergy& e, const MlpEnergyGrad& grad,
                               const DeviceScratch& scratch, int64_t device, void* stream) {
  (a.wide
       ? descend_backward_cuda<MlpTile<double>>
       : descend_backward_cuda<MlpTile<float>>)("mlp_descent_backward", a, e, grad, scratch, device, stream);
}

int64_t mlp_descent_scratch_cuda(int64_t rows, int64_t dim, bool wide, const MlpEnergy& e, bool backward,
                                 int64_t device) {
  return (wide ? descent_scratch<MlpTile<double>> : descent_scratch<MlpTile<float>>)(rows, dim, e, backward,
                                                                                     device);
}

}  // namespace adaptcomp
