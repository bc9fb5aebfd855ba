// The Hopfield energy on a tile of rows; compiled once per instruction set.
#include "common/simd_math.h"
#include "descent/tile.h"
#include "hopfield_energy/hopfield_energy.h"

namespace adaptcomp {
namespace AC_ISA {
namespace {

template <class C>
struct HopfieldWeights {
  HopfieldWeights(const HopfieldEnergy& e, int64_t d)
      : patterns(e.patterns),
        dim(d),
        width(padded<C>(e.patterns)),
        beta(*static_cast<const C*>(e.beta)),
        up(static_cast<const C*>(e.pattern), d, e.patterns, 1, d),
        down(static_cast<const C*>(e.pattern), e.patterns, d, d, 1) {}
  double work() const { return 2.0 * static_cast<double>(patterns) * static_cast<double>(dim); }
  // Number of values in the sums of derivatives: patterns [width, padded dim], beta.
  int64_t sums() const { return width * padded<C>(dim) + 1; }

  int64_t patterns, dim, width;
  C beta;
  Panels<C> up, down;
};

template <class C>
class HopfieldTile final : public TileEnergy<C> {
  using V = vec<C>;

 public:
  HopfieldTile(const HopfieldWeights<C>& w, int64_t capacity, C* sums)
      : w_(w),
        stride_(padded<C>(w.dim)),
        scratch_(whole_blocks(capacity) * w.width * (sums ? 3 : 1)),
        sums_(sums) {
    p_ = scratch_.get();
    u_ = p_ + whole_blocks(capacity) * w.width;
    z_ = u_ + whole_blocks(capacity) * w.width;
  }

  void fill(int64_t, int64_t) override {}
  void move(int64_t, int64_t) override {}
  void finish(int64_t, int64_t) override {}

  void evaluate(const C* y, int64_t used, bool gradient, C* g, C* e) override {
    softmax(y, used, e);
    for (int64_t r = 0; r < used; ++r)
      e[r] = C(0.5) * dot(y + r * stride_, y + r * stride_, stride_) - e[r] / w_.beta;
    if (!gradient) return;
    product(p_, w_.width, used, w_.down, {}, [&](int64_t r, int64_t j, V x) __attribute__((always_inline)) {
      store_vec(g + r * stride_ + j, load_vec(y + r * stride_ + j) - x);
    });
  }

  // With u = X r and t = p (u - p . u):  phi = r . y - p . u,  H r = r - beta X't.
  void gradient_product(const C* y, const C* r_in, int64_t used, C* hr, C* phi) override {
    const int64_t n = w_.width;
    softmax(y, used, phi);
    product(r_in, stride_, used, w_.up, {},
            [&](int64_t r, int64_t j, V u) __attribute__((always_inline)) { store_vec(u_ + r * n + j, u); });
    for (int64_t r = 0; r < used; ++r) {
      C *p = p_ + r * n, *t = u_ + r * n;
      const C* z = z_ + r * n;
      const C mean = dot(p, t, n);
      V g_beta{};
      for (int64_t j = 0; j < n; j += kLanes<C>) {
        const V pj = load_vec(p + j), tj = pj * (load_vec(t + j) - mean);
        g_beta = fma(tj, load_vec(z + j), g_beta);
        store_vec(t + j, -w_.beta * tj);
        store_vec(p + j, -pj);
      }
      sums_[n * stride_] -= sum_lanes<C>(g_beta) / w_.beta;
      phi[r] = dot(r_in + r * stride_, y + r * stride_, stride_) - mean;
    }
    const Factors<C> pairs[2] = {{p_, n, r_in, stride_}, {u_, n, y, stride_}};
    add_outer(sums_, n, stride_, pairs, used);
    product(u_, n, used, w_.down, {}, [&](int64_t r, int64_t j, V x) __attribute__((always_inline)) {
      store_vec(hr + r * stride_ + j, load_vec(r_in + r * stride_ + j) + x);
    });
  }

 private:
  // p = softmax(z) with z = beta X y, which a gradient keeps, and log sum_j exp(z_j).
  void softmax(const C* y, int64_t used, C* log_sum) {
    const int64_t n = w_.width;
    const V beta = splat(w_.beta);
    product(y, stride_, used, w_.up, {}, [&](int64_t r, int64_t j, V x) __attribute__((always_inline)) {
      store_vec(p_ + r * n + j, beta * x);
    });
    for (int64_t r = 0; r < used; ++r) {
      C* p = p_ + r * n;
      if (sums_) copy_row(z_ + r * n, p, n);
      C top = p[0];
      for (int64_t j = 1; j < w_.patterns; ++j) top = p[j] > top ? p[j] : top;
      for (int64_t j = 0; j < n; j += kLanes<C>) store_vec(p + j, exp_vec(load_vec(p + j) - top));
      zero_row(p + w_.patterns, n - w_.patterns);
      V sum{};
      for (int64_t j = 0; j < n; j += kLanes<C>) sum = sum + load_vec(p + j);
      const C total = sum_lanes<C>(sum);
      log_sum[r] = top + std::log(total);
      const V scale = splat(C(1) / total);
      for (int64_t j = 0; j < n; j += kLanes<C>) store_vec(p + j, scale * load_vec(p + j));
    }
  }

  const HopfieldWeights<C>& w_;
  int64_t stride_;
  Scratch<C> scratch_;
  C *sums_, *p_, *u_, *z_;
};

template <class C>
void run(const Descent& a, const HopfieldEnergy& e) {
  const HopfieldWeights<C> w(e, a.dim);
  descend<C>(a, w.work(), [&](int64_t capacity, C* sums) { return HopfieldTile<C>(w, capacity, sums); });
}

template <class C>
void run_backward(const DescentBackward& a, const HopfieldEnergy& e, const HopfieldEnergyGrad& grad) {
  const HopfieldWeights<C> w(e, a.dim);
  Scratch<C> sums(w.sums());
  descend_backward<C>(a, w.work(), sums.get(), w.sums(),
                      [&](int64_t capacity, C* own) { return HopfieldTile<C>(w, capacity, own); });
  for (int64_t i = 0; i < e.patterns; ++i)
    copy_row(static_cast<C*>(grad.pattern) + i * a.dim, sums.get() + i * padded<C>(a.dim), a.dim);
  *static_cast<C*>(grad.beta) = sums.get()[w.sums() - 1];
}

}  // namespace

void hopfield_descent(const Descent& a, const HopfieldEnergy& e) {
  a.wide ? run<double>(a, e) : run<float>(a, e);
}
void hopfield_descent_backward(const DescentBackward& a, const HopfieldEnergy& e,
                               const HopfieldEnergyGrad& grad) {
  a.wide ? run_backward<double>(a, e, grad) : run_backward<float>(a, e, grad);
}

}  // namespace AC_ISA
}  // namespace adaptcomp
