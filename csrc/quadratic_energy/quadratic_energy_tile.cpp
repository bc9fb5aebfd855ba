// The quadratic energy on a tile of rows; compiled once per instruction set.
#include "descent/tile.h"
#include "quadratic_energy/quadratic_energy.h"

namespace adaptcomp {
namespace AC_ISA {
namespace {

// S = (A + A')/2, not in panels.
template <class C>
Scratch<C> symmetric(const C* a, int64_t n) {
  Scratch<C> s(n * n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) s.get()[i * n + j] = C(0.5) * (a[i * n + j] + a[j * n + i]);
  return s;
}

template <class C>
class QuadraticTile final : public TileEnergy<C> {
  using V = vec<C>;

 public:
  QuadraticTile(const QuadraticEnergy& e, const Panels<C>& matrix, int64_t capacity, C* sums, C* g_rows)
      : e_(e),
        matrix_(matrix),
        dim_(matrix.inner()),
        stride_(padded<C>(dim_)),
        linear_(2 * capacity * stride_),
        g_linear_(linear_.get() + capacity * stride_),
        sums_(sums),
        g_rows_(g_rows) {
    zero_row(linear_.get(), 2 * capacity * stride_);
  }

  void fill(int64_t slot, int64_t row) override {
    copy_row(linear_.get() + slot * stride_, static_cast<const C*>(e_.linear) + row * e_.linear_stride, dim_);
    zero_row(g_linear_ + slot * stride_, stride_);
  }
  void move(int64_t to, int64_t from) override {
    copy_row(linear_.get() + to * stride_, linear_.get() + from * stride_, stride_);
    copy_row(g_linear_ + to * stride_, g_linear_ + from * stride_, stride_);
  }
  void finish(int64_t slot, int64_t row) override {
    copy_row(g_rows_ + row * dim_, g_linear_ + slot * stride_, dim_);
  }

  // The energy follows from the gradient: E = y . (g - b) / 2.
  void evaluate(const C* y, int64_t used, bool, C* g, C* e) override {
    const C* linear = linear_.get();
    product(y, stride_, used, matrix_, {}, [&](int64_t r, int64_t j, V x) __attribute__((always_inline)) {
      if (r < used) store_vec(g + r * stride_ + j, x - load_vec(linear + r * stride_ + j));
    });
    for (int64_t r = 0; r < used; ++r) {
      const int64_t at = r * stride_;
      e[r] = C(0.5) * (dot(y + at, g + at, stride_) - dot(y + at, linear + at, stride_));
    }
  }

  void gradient_product(const C* y, const C* r_in, int64_t used, C* hr, C* phi) override {
    product(r_in, stride_, used, matrix_, {}, [&](int64_t r, int64_t j, V x) __attribute__((always_inline)) {
      store_vec(hr + r * stride_ + j, x);
    });
    for (int64_t r = 0; r < used; ++r) {
      const int64_t at = r * stride_;
      phi[r] = dot(hr + at, y + at, stride_) - dot(linear_.get() + at, r_in + at, stride_);
      for (int64_t j = 0; j < stride_; j += kLanes<C>)
        store_vec(g_linear_ + at + j, load_vec(g_linear_ + at + j) - load_vec(r_in + at + j));
    }
    const Factors<C> pair[1] = {{r_in, stride_, y, stride_}};
    add_outer(sums_, stride_, stride_, pair, used);
  }

 private:
  const QuadraticEnergy& e_;
  const Panels<C>& matrix_;
  int64_t dim_, stride_;
  Scratch<C> linear_;
  C *g_linear_, *sums_, *g_rows_;
};

template <class C>
double work(int64_t dim) {
  return static_cast<double>(dim) * static_cast<double>(dim);
}

template <class C>
void run(const Descent& a, const QuadraticEnergy& e) {
  const Panels<C> matrix(symmetric(static_cast<const C*>(e.matrix), a.dim).get(), a.dim, a.dim, a.dim, 1);
  descend<C>(a, work<C>(a.dim),
             [&](int64_t capacity, C* sums) { return QuadraticTile<C>(e, matrix, capacity, sums, nullptr); });
}

template <class C>
void run_backward(const DescentBackward& a, const QuadraticEnergy& e, const QuadraticEnergyGrad& grad) {
  const Panels<C> matrix(symmetric(static_cast<const C*>(e.matrix), a.dim).get(), a.dim, a.dim, a.dim, 1);
  const int64_t n = a.dim, width = padded<C>(n);
  Scratch<C> sums(width * width);
  descend_backward<C>(a, work<C>(n), sums.get(), width * width, [&](int64_t capacity, C* own) {
    return QuadraticTile<C>(e, matrix, capacity, own, static_cast<C*>(grad.linear));
  });
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      static_cast<C*>(grad.matrix)[i * n + j] =
          C(0.5) * (sums.get()[i * width + j] + sums.get()[j * width + i]);
}

}  // namespace

void quadratic_descent(const Descent& a, const QuadraticEnergy& e) {
  a.wide ? run<double>(a, e) : run<float>(a, e);
}
void quadratic_descent_backward(const DescentBackward& a, const QuadraticEnergy& e,
                                const QuadraticEnergyGrad& grad) {
  a.wide ? run_backward<double>(a, e, grad) : run_backward<float>(a, e, grad);
}

}  // namespace AC_ISA
}  // namespace adaptcomp
