// Descents on the Hopfield energy on CUDA, all steps of a row in one launch (descent/tile.cuh).
//
// A step is attention of a row over all patterns: two products with the pattern matrix and a softmax between
// them, whose weights stay in shared memory. The patterns are packed once per call, for both directions in
// which they are read, and copied to shared memory if they fit. More patterns are read through the caches,
// which then bound the step.
//
// Limit: the softmax weights of a row, backward three times as many numbers, have to fit in shared memory. A
// softmax in pieces would lift it, but read the patterns a third time in each step.
#include "descent/tile.cuh"
#include "hopfield_energy/hopfield_energy.h"

namespace adaptcomp {
namespace {

template <class C>
class HopfieldTile {
 public:
  using scalar = C;
  using Energy = HopfieldEnergy;
  using Grad = HopfieldEnergyGrad;
  static constexpr int kParts = 3;

  static int64_t widest(const HopfieldEnergy& e, int64_t dim) { return std::max(dim, e.patterns); }
  static std::string sizes(const HopfieldEnergy& e) { return std::to_string(e.patterns) + " patterns"; }

  AC_HD HopfieldTile(const HopfieldEnergy& e, const HopfieldEnergyGrad& grad, int64_t dim, bool backward,
                     const TilePlan& plan, Carver& global, Carver& shared)
      : e_(e),
        grad_(grad),
        dim_(static_cast<int>(dim)),
        n_(static_cast<int>(e.patterns)),
        stride_(tile_stride<C>(dim)),
        width_(tile_stride<C>(e.patterns)),
        up_(dim, e.patterns, plan.has(1), global, shared),
        down_(e.patterns, dim, plan.has(2), global, shared),
        p_(shared.take<C>(plan.slots * width_)),
        u_(backward ? shared.take<C>(plan.slots * width_) : nullptr),
        z_(backward ? shared.take<C>(plan.slots * width_) : nullptr),
        g_beta_(backward ? shared.take<C>(plan.slots) : nullptr) {}

  AC_HD int64_t sums_size() const { return beta_sum() + 1; }
  AC_HD void use_sums(C* own) { sums_ = own; }
  void sums(ListOf<SumOf>& list) const {
    list.add({grad_.pattern, 0, n_, dim_, padded<C>(dim_), false});
    list.add({grad_.beta, beta_sum(), 1, 1, 0, false});
  }
  void pack(ListOf<Packing>& packings) const {
    packings.add({up_.packed(), e_.pattern, dim_, n_, up_.stride(), 1, dim_, false});
    packings.add({down_.packed(), e_.pattern, n_, dim_, down_.stride(), dim_, 1, false});
  }

  __device__ __forceinline__ void bring() {
    up_.bring();
    down_.bring();
  }
  __device__ __forceinline__ void begin(int64_t) {}

  __device__ __forceinline__ void evaluate(const Slots& slots, const C* y, bool gradient, C* g, C* e) {
    scores(slots, y, p_);
    __syncthreads();
    const C beta = this->beta();
    slots.each([&](int slot) {
      const C log_sum = softmax(p_ + slot * width_, p_ + slot * width_);
      const C* at = y + slot * stride_;
      const C energy = C(0.5) * Warp::dot(at, at, dim_) - log_sum / beta;
      Warp::once([&] { e[slot] = energy; });
    });
    __syncthreads();
    if (!gradient) return;
    product(slots, p_, width_, down_, Nothing<C>(), [&](int slot, int j, C x) {
      const int at = slot * stride_ + j;
      g[at] = y[at] - x;
    });
    __syncthreads();
  }

  // With u = X r and t = p (u - p . u):  phi = r . y - p . u,  H r = r - beta X't.
  __device__ __forceinline__ void gradient_product(const Slots& slots, const C* y, const C* r, C* hr,
                                                   C* phi) {
    scores(slots, y, z_);
    product(slots, r, stride_, up_, Nothing<C>(), [&](int slot, int j, C u) { u_[slot * width_ + j] = u; });
    __syncthreads();
    const C beta = this->beta();
    slots.each([&](int slot) {
      C *p = p_ + slot * width_, *t = u_ + slot * width_, g_beta = 0;
      const C* z = z_ + slot * width_;
      softmax(z_ + slot * width_, p);
      const C mean = Warp::dot(p, t, n_);
      Warp::each(n_, [&](int j) {
        const C tj = p[j] * (t[j] - mean);
        g_beta = std::fma(tj, z[j], g_beta);
        t[j] = -beta * tj;
        p[j] = -p[j];
      });
      g_beta = Warp::total(g_beta) / beta;
      const C along = Warp::dot(r + slot * stride_, y + slot * stride_, dim_) - mean;
      Warp::once([&] {
        g_beta_[slot] = -g_beta;
        phi[slot] = along;
      });
    });
    __syncthreads();
    add_outer<C, 2>(slots, sums_, n_, dim_, {{p_, width_, r, stride_}, {u_, width_, y, stride_}});
    add_columns(slots, sums_ + beta_sum(), 1, g_beta_, 1);
    product(slots, u_, width_, down_, Nothing<C>(), [&](int slot, int j, C x) {
      const int at = slot * stride_ + j;
      hr[at] = r[at] + x;
    });
    __syncthreads();
  }

 private:
  AC_HD int64_t beta_sum() const {
    return outer_size<C>(n_, dim_);
  }  // its place in the sums, after those of the patterns
  __device__ __forceinline__ C beta() const { return *static_cast<const C*>(e_.beta); }

  // z = beta X y
  __device__ __forceinline__ void scores(const Slots& slots, const C* y, C* z) {
    const C beta = this->beta();
    product(slots, y, stride_, up_, Nothing<C>(),
            [&](int slot, int j, C x) { z[slot * width_ + j] = beta * x; });
  }

  // p = softmax(z), where p may be z; returns log sum_j exp(z_j).
  __device__ __forceinline__ C softmax(const C* z, C* p) {
    C top = -C(INFINITY), sum = 0;
    for (int j = Warp::lane(); j < n_; j += kWarp) top = z[j] > top ? z[j] : top;
    top = Warp::most(top);
    Warp::each(n_, [&](int j) {
      p[j] = std::exp(z[j] - top);
      sum += p[j];
    });
    sum = Warp::total(sum);
    const C scale = C(1) / sum;
    Warp::each(n_, [&](int j) { p[j] *= scale; });
    return top + std::log(sum);
  }

  const HopfieldEnergy& e_;
  const HopfieldEnergyGrad& grad_;
  int dim_, n_;
  int stride_, width_;
  Matrix<C> up_, down_;
  C *p_, *u_, *z_, *g_beta_;  // rows of the tile
  C* sums_ = nullptr;
};

}  // namespace

void hopfield_descent_cuda(const Descent& a, const HopfieldEnergy& e, const DeviceScratch& scratch,
                           int64_t device, void* stream) {
  (a.wide ? descend_cuda<HopfieldTile<double>> : descend_cuda<HopfieldTile<float>>)("hopfield_descent", a, e,
                                                                                    scratch, device, stream);
}

void hopfield_descent_backward_cuda(const DescentBackward& a, const HopfieldEnergy& e,
                                    const HopfieldEnergyGrad& grad, const DeviceScratch& scratch,
                                    int64_t device, void* stream) {
  (a.wide ? descend_backward_cuda<HopfieldTile<double>>
          : descend_backward_cuda<HopfieldTile<float>>)("hopfield_descent_backward", a, e, grad, scratch,
                                                        device, stream);
}

int64_t hopfield_descent_scratch_cuda(int64_t rows, int64_t dim, bool wide, const HopfieldEnergy& e,
                                      bool backward, int64_t device) {
  return (wide ? descent_scratch<HopfieldTile<double>>
               : descent_scratch<HopfieldTile<float>>)(rows, dim, e, backward, device);
}

}  // namespace adaptcomp
