// batch_norm_act_mean's parts. Kernels brings forward(maps, args) and backward(maps, args).
#pragma once

#include <cmath>

#include "op.h"

namespace auglocal {

// N samples of C maps of `size` values.
struct Maps {
  Layout at;
  int64_t samples, channels, size;
};

// ---- what the kernels are given; residual may be null --------------------------------------------------

template <class T, class A = typename Compute<T>::type>
struct MeanArgs {
  Norm<A> norm;
  const T *x, *residual;
  A* pooled;  // (N, C)
  bool relu;
};

template <class T, class A = typename Compute<T>::type>
struct MeanBackwardArgs {
  Norm<A> norm;
  bool relu;
  const A* grad;  // (N, C)
  const T *x, *residual;
  T *dx, *dresidual;  // may be x and residual themselves: each value is written by the thread that read it
  A *dweight, *dbias;
};

// ---- the ops -------------------------------------------------------------------------------------------

struct BatchNormActMeanApply {
  static constexpr auto kName = "batch_norm_act_mean_apply";
  Tensor x;
  NormTensors norm;
  std::optional<Tensor> residual;
  double eps;
  bool act;
  auto arguments() { return std::tie(x, norm.weight, norm.bias, norm.mean, norm.var, residual, eps, act); }

  Maps check() const {
    const Check check(kName, x);
    norm.check(check);
    check.dense_like_x("x", x);
    if (residual) check.dense_like_x("residual", *residual);
    return {check.at, x.size(0), x.size(1), x.size(2) * x.size(3)};
  }

  template <class Kernels>
  Tensor run() const {
    const Maps maps = check();
    const Kernels kernels(x);
    Tensor pooled = empty(norm.weight, {maps.samples, maps.channels});
    if (x.numel() == 0) return torch::stable::fill_(pooled, NAN);
    with_type(kName, x, [&](auto value) {
      using T = decltype(value);
      using A = typename Compute<T>::type;
      kernels.forward(maps,
                      MeanArgs<T>{norm.data<A>(eps), data<T>(x), data<T>(residual), mutable_data<A>(pooled), act});
    });
    return pooled;
  }
};

struct BatchNormActMeanBackwardOut {
  static constexpr auto kName = "batch_norm_act_mean_backward_out";
  Tensor grad, x;
  NormTensors norm;
  std::optional<Tensor> residual;
  double eps;
  bool act;
  Tensor dx;
  std::optional<Tensor> dresidual;
  auto arguments() {
    return std::tie(grad, x, norm.weight, norm.bias, norm.mean, norm.var, residual, eps, act, dx, dresidual);
  }

  Maps check() const {
    const Check check(kName, x);
    norm.check(check);
    check.dense_like_x("x", x);
    if (residual) check.dense_like_x("residual", *residual);
    const Maps maps{check.at, x.size(0), x.size(1), x.size(2) * x.size(3)};
    require(grad.dim() == 2 && grad.size(0) == maps.samples && grad.size(1) == maps.channels &&
                grad.scalar_type() == norm.weight.scalar_type() && grad.is_contiguous() && grad.device() == x.device(),
            kName, ": grad must be a contiguous (", maps.samples, ", ", maps.channels,
            ") tensor in the dtype of weight on the device of x");
    require(act || !residual, kName, ": residual is for the ReLU's mask, given one without a ReLU");
    require(residual || !dresidual, kName, ": dresidual needs residual");
    check.dense_like_x("dx", dx);
    if (dresidual) check.dense_like_x("dresidual", *dresidual);
    return maps;
  }

  template <class Kernels>
  std::tuple<Tensor, Tensor> run() const {
    const Maps maps = check();
    const Kernels kernels(x);
    Tensor dweight = empty(norm.weight, norm.weight.sizes()), dbias = empty(norm.weight, norm.weight.sizes());
    if (x.numel() == 0) return {zeroed(dweight), zeroed(dbias)};
    const Tensor grads = kernels.for_any_vector(grad);  // vectors of channels read vectors of gradients
    with_type(kName, x, [&](auto value) {
      using T = decltype(value);
      using A = typename Compute<T>::type;
      kernels.backward(maps, MeanBackwardArgs<T>{norm.data<A>(eps), act, data<A>(grads), data<T>(x), data<T>(residual),
                                                 mutable_data<T>(dx), mutable_data<T>(dresidual),
                                                 mutable_data<A>(dweight), mutable_data<A>(dbias)});
    });
    return {dweight, dbias};
  }
};

}  // namespace auglocal
