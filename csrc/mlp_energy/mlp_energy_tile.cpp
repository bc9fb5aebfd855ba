// The energy network on a tile of rows; compiled once per instruction set.
//
// An evaluation is two matrix products, up through the layer and down again, with the activation in the
// registers in which the first product ends. Its 4 dim hidden operations per row and step bound the speed.
// The packed weights, which all threads share, stay in the second-level cache, the tile's rows in the first.
#include "common/simd_math.h"
#include "descent/tile.h"
#include "mlp_energy/mlp_energy.h"

namespace adaptcomp {
namespace AC_ISA {
namespace {

template <class C>
struct MlpWeights {
  explicit MlpWeights(const MlpEnergy& e, int64_t d)
      : energy(e),
        dim(d),
        width1(padded<C>(e.hidden1)),
        width2(padded<C>(e.hidden2)),
        up1(static_cast<const C*>(e.weight1), d, e.hidden1, 1, d),
        down1(static_cast<const C*>(e.weight1), e.hidden1, d, d, 1),
        out(last_width()),
        bias2(width2 + 1) {
    fill(out.get(), e.out, last_hidden(), last_width());
    if (e.hidden2) {
      up2 = Panels<C>(static_cast<const C*>(e.weight2), e.hidden1, e.hidden2, 1, e.hidden1);
      down2 = Panels<C>(static_cast<const C*>(e.weight2), e.hidden2, e.hidden1, e.hidden1, 1);
      fill(bias2.get(), e.bias2, e.hidden2, width2);
    }
  }
  int64_t last_hidden() const { return energy.hidden2 ? energy.hidden2 : energy.hidden1; }
  int64_t last_width() const { return energy.hidden2 ? width2 : width1; }

  const MlpEnergy& energy;
  int64_t dim, width1, width2;
  Panels<C> up1, down1, up2, down2;
  Scratch<C> out, bias2;

 private:
  static void fill(C* to, const void* from, int64_t n, int64_t width) {
    copy_row(to, static_cast<const C*>(from), n);
    zero_row(to + n, width - n);
  }
};

template <class T, Activation A, bool kDeep>
class MlpTile final : public TileEnergy<T> {
 public:
  using scalar = T;
  using C = T;
  using V = vec<C>;
  using Weights = MlpWeights<C>;
  using M = VectorMath<C>;

  // Number of multiply-adds of a row's step.
  static double work(const Weights& w) {
    return 2.0 * static_cast<double>(w.energy.hidden1) * static_cast<double>(w.dim + w.energy.hidden2);
  }
  // Number of values in the sums of derivatives: weight1 [width1, padded dim], out [last width], and weight2
  // [width2, width1], bias2 [width2].
  static int64_t sums(const Weights& w) {
    return w.width1 * padded<C>(w.dim) + w.last_width() + w.width2 * (w.width1 + 1);
  }

  MlpTile(const Weights& w, int64_t capacity, C* sums, C* g_rows)
      : w_(w),
        g_rows_(g_rows),
        capacity_(whole_blocks(capacity)),
        stride_(padded<C>(w.dim)),
        context_(capacity_ * w.width1),
        g_context_(sums ? capacity_ * w.width1 : 0),
        scratch_(capacity_ * (sums ? (kDeep ? 8 * w.width1 + 4 * w.width2 : 3 * w.width1)
                                   : (kDeep ? 2 * w.width1 + w.width2 : w.width1))),
        weight1_(sums),
        out_(sums ? weight1_ + w.width1 * stride_ : nullptr),
        weight2_(sums ? out_ + w.last_width() : nullptr),
        bias2_(sums ? weight2_ + w.width2 * w.width1 : nullptr) {}

  void fill(int64_t slot, int64_t row) override {
    const MlpEnergy& e = w_.energy;
    C* context = context_.get() + slot * w_.width1;
    copy_row(context, static_cast<const C*>(e.context) + row * e.context_stride, e.hidden1);
    zero_row(context + e.hidden1, w_.width1 - e.hidden1);
    if (weight1_) zero_row(g_context_.get() + slot * w_.width1, w_.width1);
  }

  void move(int64_t to, int64_t from) override {
    copy_row(context_.get() + to * w_.width1, context_.get() + from * w_.width1, w_.width1);
    if (weight1_) copy_row(g_context_.get() + to * w_.width1, g_context_.get() + from * w_.width1, w_.width1);
  }

  void finish(int64_t slot, int64_t row) override {
    copy_row(g_rows_ + row * w_.energy.hidden1, g_context_.get() + slot * w_.width1, w_.energy.hidden1);
  }

  void evaluate(const C* y, int64_t used, bool gradient, C* g, C* e) override {
    V energy[whole_blocks(kSlots)];
    for (V& v : energy) v = V{};
    const C *context = context_.get(), *out = w_.out.get();
    const int64_t n1 = w_.width1, n2 = w_.width2;
    C* s1 = scratch_.get();
    // The last layer's part of the energy, and the energy's derivative in the layer.
    const auto last_layer = [&](int64_t r, int64_t j, V a, C* slope, int64_t n)
                                __attribute__((always_inline)) {
                                  const auto act = activate<A, true, false, M>(a);
                                  const V w = load_vec(out + j);
                                  energy[r] = fma(w, act.value, energy[r]);
                                  store_vec(slope + r * n + j, w * act.first);
                                };
    if constexpr (kDeep) {
      C *h1 = s1 + capacity_ * n1, *s2 = h1 + capacity_ * n1;
      const C* bias2 = w_.bias2.get();
      product(y, stride_, used, w_.up1, {context, n1},
              [&](int64_t r, int64_t j, V a) __attribute__((always_inline)) {
                const auto act = activate<A, true, false, M>(a);
                store_vec(h1 + r * n1 + j, act.value);
                store_vec(s1 + r * n1 + j, act.first);
              });
      product(h1, n1, used, w_.up2, {bias2, 0},
              [&](int64_t r, int64_t j, V a) __attribute__((always_inline)) { last_layer(r, j, a, s2, n2); });
      if (gradient) {
        product(s2, n2, used, w_.down2, {}, [&](int64_t r, int64_t j, V q) __attribute__((always_inline)) {
          C* s = s1 + r * n1 + j;
          store_vec(s, q * load_vec(s));
        });
      }
    } else {
      product(y, stride_, used, w_.up1, {context, n1},
              [&](int64_t r, int64_t j, V a) __attribute__((always_inline)) { last_layer(r, j, a, s1, n1); });
    }
    if (gradient) down(s1, used, y, g);
    const C ridge = C(w_.energy.ridge), bias = *static_cast<const C*>(w_.energy.out_bias);
    for (int64_t r = 0; r < used; ++r) {
      e[r] = sum_lanes<C>(energy[r]) + bias;
      if (ridge != C(0)) e[r] += C(0.5) * ridge * dot(y + r * stride_, y + r * stride_, stride_);
    }
  }

  // The derivatives of phi = <r, g> = d/dt E(y + t r): forward mode in the direction r, then backward.
  void gradient_product(const C* y, const C* r_in, int64_t used, C* hr, C* phi) override {
    V along[whole_blocks(kSlots)];
    for (V& v : along) v = V{};
    const C *context = context_.get(), *out = w_.out.get();
    C* g_context = g_context_.get();
    const int64_t n1 = w_.width1, n2 = w_.width2, tile = capacity_ * n1, tile2 = capacity_ * n2;
    C *first = scratch_.get(), *second = first + tile, *t1 = second + tile;
    if constexpr (kDeep) {
      C *h1 = t1 + tile, *u1 = h1 + tile, *d1 = u1 + tile, *q1 = d1 + tile, *s1 = q1 + tile;
      C *s2 = s1 + tile, *t2 = s2 + tile2, *first2 = t2 + tile2, *second2 = first2 + tile2;
      const C* bias2 = w_.bias2.get();
      product(y, stride_, used, w_.up1, {context, n1},
              [&](int64_t r, int64_t j, V a) __attribute__((always_inline)) {
                const auto act = activate<A, true, true, M>(a);
                store_vec(h1 + r * n1 + j, act.value);
                store_vec(first + r * n1 + j, act.first);
                store_vec(second + r * n1 + j, act.second);
              });
      product(r_in, stride_, used, w_.up1, {}, [&](int64_t r, int64_t j, V u) __attribute__((always_inline)) {
        store_vec(u1 + r * n1 + j, u);
        store_vec(d1 + r * n1 + j, u * load_vec(first + r * n1 + j));
      });
      product(h1, n1, used, w_.up2, {bias2, 0},
              [&](int64_t r, int64_t j, V a) __attribute__((always_inline)) {
                const auto act = activate<A, false, true, M>(a);
                store_vec(first2 + r * n2 + j, act.first);
                store_vec(second2 + r * n2 + j, act.second);
              });
      product(d1, n1, used, w_.up2, {}, [&](int64_t r, int64_t j, V u) __attribute__((always_inline)) {
        const V w = load_vec(out + j), f = load_vec(first2 + r * n2 + j);
        const V s = w * f, t = w * load_vec(second2 + r * n2 + j) * u;
        store_vec(s2 + r * n2 + j, s);
        store_vec(t2 + r * n2 + j, t);
        along[r] = fma(s, u, along[r]);
        store_vec(first2 + r * n2 + j, f * u);
      });
      add_columns(out_, n2, first2, n2, used);
      add_columns(bias2_, n2, t2, n2, used);
      product(s2, n2, used, w_.down2, {}, [&](int64_t r, int64_t j, V q) __attribute__((always_inline)) {
        store_vec(q1 + r * n1 + j, q);
        store_vec(s1 + r * n1 + j, q * load_vec(first + r * n1 + j));
      });
      product(t2, n2, used, w_.down2, {}, [&](int64_t r, int64_t j, V dq) __attribute__((always_inline)) {
        const int64_t at = r * n1 + j;
        const V t =
            fma(dq, load_vec(first + at), load_vec(q1 + at) * load_vec(second + at) * load_vec(u1 + at));
        store_vec(t1 + at, t);
        store_vec(g_context + at, load_vec(g_context + at) + t);
      });
      const Factors<C> layer2[2] = {{s2, n2, d1, n1}, {t2, n2, h1, n1}};
      add_outer(weight2_, n2, n1, layer2, used);
      const Factors<C> layer1[2] = {{s1, n1, r_in, stride_}, {t1, n1, y, stride_}};
      add_outer(weight1_, n1, stride_, layer1, used);
    } else {
      product(y, stride_, used, w_.up1, {context, n1},
              [&](int64_t r, int64_t j, V a) __attribute__((always_inline)) {
                const auto act = activate<A, false, true, M>(a);
                store_vec(first + r * n1 + j, act.first);
                store_vec(second + r * n1 + j, act.second);
              });
      product(r_in, stride_, used, w_.up1, {}, [&](int64_t r, int64_t j, V u) __attribute__((always_inline)) {
        const int64_t at = r * n1 + j;
        const V w = load_vec(out + j), f = load_vec(first + at);
        const V s = w * f, t = w * load_vec(second + at) * u;
        along[r] = fma(s, u, along[r]);
        store_vec(first + at, s);
        store_vec(t1 + at, t);
        store_vec(g_context + at, load_vec(g_context + at) + t);
        store_vec(second + at, f * u);
      });
      add_columns(out_, n1, second, n1, used);
      const Factors<C> layer[2] = {{first, n1, r_in, stride_}, {t1, n1, y, stride_}};
      add_outer(weight1_, n1, stride_, layer, used);
    }
    down(t1, used, r_in, hr);
    const C ridge = C(w_.energy.ridge);
    for (int64_t r = 0; r < used; ++r) {
      phi[r] = sum_lanes<C>(along[r]);
      if (ridge != C(0)) phi[r] += ridge * dot(y + r * stride_, r_in + r * stride_, stride_);
    }
  }

 private:
  // to = W_1' s + rho x
  void down(const C* s, int64_t used, const C* x, C* to) {
    const V ridge = splat(C(w_.energy.ridge));
    product(s, w_.width1, used, w_.down1, {}, [&](int64_t r, int64_t j, V g) __attribute__((always_inline)) {
      store_vec(to + r * stride_ + j, fma(ridge, load_vec(x + r * stride_ + j), g));
    });
  }

  const Weights& w_;
  C* g_rows_;
  int64_t capacity_, stride_;
  Scratch<C> context_, g_context_, scratch_;
  C *weight1_, *out_, *weight2_, *bias2_;  // sums
};

// Copies rows of `from`, `width` apart, without their padding.
template <class C>
void unpad(void* to, const C* from, int64_t rows, int64_t columns, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) copy_row(static_cast<C*>(to) + i * columns, from + i * width, columns);
}

template <class F>
void dispatch_mlp(bool wide, const MlpEnergy& e, const F& f) {
  dispatch_activation(e.activation, [&](auto activation) {
    constexpr Activation A = decltype(activation)::value;
    if (wide) {
      e.hidden2 ? f(static_cast<MlpTile<double, A, true>*>(nullptr))
                : f(static_cast<MlpTile<double, A, false>*>(nullptr));
    } else {
      e.hidden2 ? f(static_cast<MlpTile<float, A, true>*>(nullptr))
                : f(static_cast<MlpTile<float, A, false>*>(nullptr));
    }
  });
}

}  // namespace

void mlp_descent(const Descent& a, const MlpEnergy& e) {
  dispatch_mlp(a.wide, e, [&](auto* tile) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    using C = typename Tile::scalar;
    const typename Tile::Weights w(e, a.dim);
    descend<C>(a, Tile::work(w), [&](int64_t capacity, C* sums) { return Tile(w, capacity, sums, nullptr); });
  });
}

void mlp_descent_backward(const DescentBackward& a, const MlpEnergy& e, const MlpEnergyGrad& grad) {
  dispatch_mlp(a.wide, e, [&](auto* tile) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    using C = typename Tile::scalar;
    const typename Tile::Weights w(e, a.dim);
    Scratch<C> sums(Tile::sums(w));
    descend_backward<C>(a, Tile::work(w), sums.get(), Tile::sums(w), [&](int64_t capacity, C* own) {
      return Tile(w, capacity, own, static_cast<C*>(grad.context));
    });
    const C* from = sums.get();
    unpad(grad.weight1, from, e.hidden1, a.dim, padded<C>(a.dim));
    from += w.width1 * padded<C>(a.dim);
    unpad(grad.out, from, 1, w.last_hidden(), w.last_width());
    from += w.last_width();
    if (e.hidden2) {
      unpad(grad.weight2, from, e.hidden2, e.hidden1, w.width1);
      unpad(grad.bias2, from + w.width2 * w.width1, 1, e.hidden2, w.width2);
    }
  });
}

}  // namespace AC_ISA
}  // namespace adaptcomp
