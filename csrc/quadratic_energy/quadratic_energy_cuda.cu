// Descents on the quadratic energy on CUDA, all steps of a row in one launch (descent/tile.cuh).
//
// A step is one product with the symmetric part of the matrix, which is computed once per call and copied to
// shared memory if it fits. A larger matrix is read through the caches, which then bound the step.
//
// Limit: the points and gradients of one batch row, five tile rows forward and seven backward, have to fit in
// shared memory.
#include "descent/tile.cuh"
#include "quadratic_energy/quadratic_energy.h"

namespace adaptcomp {
namespace {

template <class C>
class QuadraticTile {
 public:
  using scalar = C;
  using Energy = QuadraticEnergy;
  using Grad = QuadraticEnergyGrad;
  static constexpr int kParts = 2;

  static int64_t widest(const QuadraticEnergy&, int64_t dim) { return dim; }
  static std::string sizes(const QuadraticEnergy&) { return "a matrix of as many rows and columns"; }

  AC_HD QuadraticTile(const QuadraticEnergy& e, const QuadraticEnergyGrad& grad, int64_t dim, bool,
                      const TilePlan& plan, Carver& global, Carver& shared)
      : e_(e),
        grad_(grad),
        dim_(static_cast<int>(dim)),
        stride_(tile_stride<C>(dim)),
        matrix_(dim, dim, plan.has(1), global, shared) {}

  AC_HD int64_t sums_size() const { return outer_size<C>(dim_, dim_); }
  AC_HD void use_sums(C* own) { sums_ = own; }
  void sums(ListOf<SumOf>& list) const { list.add({grad_.matrix, 0, dim_, dim_, padded<C>(dim_), true}); }
  void pack(ListOf<Packing>& packings) const {
    packings.add({matrix_.packed(), e_.matrix, dim_, dim_, matrix_.stride(), dim_, 1, true});
  }

  __device__ __forceinline__ void bring() { matrix_.bring(); }
  __device__ __forceinline__ void begin(int64_t row) {
    Warp::zero(static_cast<C*>(grad_.linear) + row * dim_, dim_);
  }

  // The energy follows from the gradient: E = y . (g - b) / 2.
  __device__ __forceinline__ void evaluate(const Slots& slots, const C* y, bool, C* g, C* e) {
    product(slots, y, stride_, matrix_, Nothing<C>(),
            [&](int slot, int j, C x) { g[slot * stride_ + j] = x - linear(slots, slot)[j]; });
    __syncthreads();
    slots.each([&](int slot) {
      const C *at = y + slot * stride_, *b = linear(slots, slot);
      const C energy = C(0.5) * (Warp::dot(at, g + slot * stride_, dim_) - Warp::dot(at, b, dim_));
      Warp::once([&] { e[slot] = energy; });
    });
    __syncthreads();
  }

  __device__ __forceinline__ void gradient_product(const Slots& slots, const C* y, const C* r, C* hr,
                                                   C* phi) {
    product(slots, r, stride_, matrix_, Nothing<C>(),
            [&](int slot, int j, C x) { hr[slot * stride_ + j] = x; });
    add_outer<C, 1>(slots, sums_, dim_, dim_, {{r, stride_, y, stride_}});
    __syncthreads();
    slots.each([&](int slot) {
      const C *change = r + slot * stride_, *b = linear(slots, slot);
      C* g_linear = static_cast<C*>(grad_.linear) + slots.row[slot] * dim_;
      const C along = Warp::dot(hr + slot * stride_, y + slot * stride_, dim_) - Warp::dot(b, change, dim_);
      Warp::each(dim_, [&](int j) { g_linear[j] -= change[j]; });
      Warp::once([&] { phi[slot] = along; });
    });
    __syncthreads();
  }

 private:
  __device__ __forceinline__ const C* linear(const Slots& slots, int slot) const {
    return static_cast<const C*>(e_.linear) + slots.row[slot] * e_.linear_stride;
  }

  const QuadraticEnergy& e_;
  const QuadraticEnergyGrad& grad_;
  int dim_;
  int stride_;
  Matrix<C> matrix_;
  C* sums_ = nullptr;
};

}  // namespace

void quadratic_descent_cuda(const Descent& a, const QuadraticEnergy& e, const DeviceScratch& scratch,
                            int64_t device, void* stream) {
  (a.wide ? descend_cuda<QuadraticTile<double>>
          : descend_cuda<QuadraticTile<float>>)("quadratic_descent", a, e, scratch, device, stream);
}

void quadratic_descent_backward_cuda(const DescentBackward& a, const QuadraticEnergy& e,
                                     const QuadraticEnergyGrad& grad, const DeviceScratch& scratch,
                                     int64_t device, void* stream) {
  (a.wide ? descend_backward_cuda<QuadraticTile<double>>
          : descend_backward_cuda<QuadraticTile<float>>)("quadratic_descent_backward", a, e, grad, scratch,
                                                         device, stream);
}

int64_t quadratic_descent_scratch_cuda(int64_t rows, int64_t dim, bool wide, const QuadraticEnergy& e,
                                       bool backward, int64_t device) {
  return (wide ? descent_scratch<QuadraticTile<double>>
               : descent_scratch<QuadraticTile<float>>)(rows, dim, e, backward, device);
}

}  // namespace adaptcomp
