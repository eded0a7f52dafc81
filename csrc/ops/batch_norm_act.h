// batch_norm_act and its parts. Kernels brings
//   statistics(at, x, mean, var), forward(at, args), apply(at, args),
//   backward(at, args), and its two passes alone: backward_sums(at, args), backward_apply(at, args, means).
#pragma once

#include "op.h"

namespace auglocal {

// ---- what the kernels are given ------------------------------------------------------------------------

// y = act(BN(x) + residual). residual may be null; y may be x or residual.
template <class T, class A = typename Compute<T>::type>
struct ForwardArgs {
  const T *x, *residual;
  T* y;
  const A *weight, *bias;
  A *mean, *var;  // written by the forward, read by apply
  double eps;
  Act act;
  A slope;
  HD Norm<A> norm() const { return {weight, bias, mean, var, eps}; }
};

template <class T, class A = typename Compute<T>::type>
struct BackwardArgs {
  Norm<A> norm;
  Act act;
  A slope;
  const T *grad, *x, *y;  // y, dresidual, masked: where y, behind a residual, has the ReLU's mask; else null
  T *dx, *dresidual;      // may be grad, x or y themselves: each value is written by the thread that read it
  T* masked;              // where the masked gradient waits for the second pass: dresidual, or dx where dresidual is x
  A *dweight, *dbias;
  // Where the sums over g and g * (x - mean) go, of all channels one after the other; null where nobody asks.
  double* sums = nullptr;
};

inline void check_activation(const char* op, int64_t act, double negative_slope) {
  require(act >= 0 && act < kActs, op, ": act must be 0 to ", kActs - 1, ", given ", act);
  require(negative_slope >= 0, op, ": negative_slope must be at least 0, given ", negative_slope);
}

inline void check_mask(const char* op, const std::optional<Tensor>& y, int64_t act) {
  require(!y || Act(act) == Act::relu, op, ": y, behind a residual, has the mask of a ReLU (act 1), given act ", act);
}

// ---- the ops -------------------------------------------------------------------------------------------

struct BatchNormStatistics {
  static constexpr auto kName = "batch_norm_statistics";
  Tensor x;
  auto arguments() { return std::tie(x); }

  template <class Kernels>
  std::tuple<Tensor, Tensor> run() const {
    const Layout at = Check(kName, x).at;
    const Kernels kernels(x);
    const Tensor dense_x = dense(x, at.format);
    Tensor mean = empty_statistics(x), var = empty_statistics(x);
    if (x.numel() == 0) return {zeroed(mean), zeroed(var)};
    with_type(kName, x, [&](auto value) {
      using T = decltype(value);
      using A = typename Compute<T>::type;
      kernels.statistics(at, data<T>(dense_x), mutable_data<A>(mean), mutable_data<A>(var));
    });
    return {mean, var};
  }
};

struct BatchNormAct {
  static constexpr auto kName = "batch_norm_act";
  Tensor x, weight, bias;
  std::optional<Tensor> residual;
  double eps;
  int64_t act;
  double negative_slope;
  auto arguments() { return std::tie(x, weight, bias, residual, eps, act, negative_slope); }

  Layout check() const {
    const Check check(kName, x);
    check.channels("weight", weight);
    check.channels("bias", bias);
    if (residual) check.like_x("residual", *residual);
    check_activation(kName, act, negative_slope);
    return check.at;
  }

  template <class Kernels>
  std::tuple<Tensor, Tensor, Tensor> run() const {
    const Layout at = check();
    const Kernels kernels(x);
    const Tensor dense_x = dense(x, at.format);
    std::optional<Tensor> added = dense(residual, at.format);
    // The vectors, and with them the order of the sums, are to follow from x alone.
    if (added) added = kernels.for_any_vector(*added);
    Tensor y = empty(x, x.sizes(), at.format), mean = empty(weight, weight.sizes()),
           var = empty(weight, weight.sizes());
    if (x.numel() == 0) return {y, zeroed(mean), zeroed(var)};
    with_type(kName, x, [&](auto value) {
      using T = decltype(value);
      using A = typename Compute<T>::type;
      kernels.forward(
          at, ForwardArgs<T>{data<T>(dense_x), data<T>(added), mutable_data<T>(y), data<A>(weight), data<A>(bias),
                             mutable_data<A>(mean), mutable_data<A>(var), eps, Act(act), A(negative_slope)});
    });
    return {y, mean, var};
  }
};

struct BatchNormActApplyOut {
  static constexpr auto kName = "batch_norm_act_apply_out";
  Tensor x;
  NormTensors norm;
  std::optional<Tensor> residual;
  double eps;
  int64_t act;
  Tensor out;
  double negative_slope;
  auto arguments() {
    return std::tie(x, norm.weight, norm.bias, norm.mean, norm.var, residual, eps, act, out, negative_slope);
  }

  Layout check() const {
    const Check check(kName, x);
    norm.check(check);
    check.dense_like_x("x", x);
    if (residual) check.dense_like_x("residual", *residual);
    check.dense_like_x("out", out);
    check_activation(kName, act, negative_slope);
    return check.at;
  }

  template <class Kernels>
  void run() const {
    const Layout at = check();
    const Kernels kernels(x);
    if (x.numel() == 0) return;
    with_type(kName, x, [&](auto value) {
      using T = decltype(value);
      using A = typename Compute<T>::type;
      kernels.apply(at, ForwardArgs<T>{data<T>(x), data<T>(residual), mutable_data<T>(out), data<A>(norm.weight),
                                       data<A>(norm.bias), mutable_data<A>(norm.mean), mutable_data<A>(norm.var), eps,
                                       Act(act), A(negative_slope)});
    });
  }
};

struct BatchNormActBackwardOut {
  static constexpr auto kName = "batch_norm_act_backward_out";
  Tensor grad, x;
  NormTensors norm;
  std::optional<Tensor> y;
  double eps;
  int64_t act;
  Tensor dx;
  std::optional<Tensor> dresidual;
  double negative_slope;
  auto arguments() {
    return std::tie(grad, x, norm.weight, norm.bias, norm.mean, norm.var, y, eps, act, dx, dresidual, negative_slope);
  }

  Layout check() const {
    const Check check(kName, x);
    norm.check(check);
    check.dense_like_x("x", x);
    check.dense_like_x("grad", grad);
    check.dense_like_x("dx", dx);
    require(y.has_value() == dresidual.has_value(), kName, ": y and dresidual go together, given one of them");
    if (y) check.dense_like_x("y", *y);
    if (dresidual) check.dense_like_x("dresidual", *dresidual);
    check_activation(kName, act, negative_slope);
    check_mask(kName, y, act);
    return check.at;
  }

  template <class Kernels>
  std::tuple<Tensor, Tensor> run() const {
    const Layout at = check();
    const Kernels kernels(x);
    Tensor dweight = empty(norm.weight, norm.weight.sizes()), dbias = empty(norm.weight, norm.weight.sizes());
    if (x.numel() == 0) return {zeroed(dweight), zeroed(dbias)};
    with_type(kName, x, [&](auto value) {
      using T = decltype(value);
      using A = typename Compute<T>::type;
      T *const into_dx = mutable_data<T>(dx), *const into_dresidual = mutable_data<T>(dresidual);
      T* const masked = into_dresidual == data<T>(x) ? into_dx : into_dresidual;
      kernels.backward(
          at, BackwardArgs<T>{norm.data<A>(eps), Act(act), A(negative_slope), data<T>(grad), data<T>(x), data<T>(y),
                              into_dx, into_dresidual, masked, mutable_data<A>(dweight), mutable_data<A>(dbias)});
    });
    return {dweight, dbias};
  }
};

// The first pass of the backward alone, and the second: where a batch lies on several devices, the sums of all of them
// are added up in between.
struct BatchNormActBackwardSums {
  static constexpr auto kName = "batch_norm_act_backward_sums";
  Tensor grad, x;
  NormTensors norm;
  std::optional<Tensor> y;
  double eps;
  int64_t act;
  std::optional<Tensor> masked;
  double negative_slope;
  auto arguments() {
    return std::tie(grad, x, norm.weight, norm.bias, norm.mean, norm.var, y, eps, act, masked, negative_slope);
  }

  Layout check() const {
    const Check check(kName, x);
    norm.check(check);
    check.dense_like_x("x", x);
    check.dense_like_x("grad", grad);
    require(y.has_value() == masked.has_value(), kName, ": y and masked go together, given one of them");
    if (y) check.dense_like_x("y", *y);
    if (masked) check.dense_like_x("masked", *masked);
    check_activation(kName, act, negative_slope);
    check_mask(kName, y, act);
    return check.at;
  }

  template <class Kernels>
  std::tuple<Tensor, Tensor, Tensor> run() const {
    const Layout at = check();
    const Kernels kernels(x);
    Tensor sums = torch::stable::empty({2, x.size(1)}, ScalarType::Double, std::nullopt, x.device()),
           dweight = empty(norm.weight, norm.weight.sizes()), dbias = empty(norm.weight, norm.weight.sizes());
    if (x.numel() == 0) return {zeroed(sums), zeroed(dweight), zeroed(dbias)};
    with_type(kName, x, [&](auto value) {
      using T = decltype(value);
      using A = typename Compute<T>::type;
      T* const into_masked = mutable_data<T>(masked);
      kernels.backward_sums(
          at, BackwardArgs<T>{norm.data<A>(eps), Act(act), A(negative_slope), data<T>(grad), data<T>(x), data<T>(y),
                              nullptr, into_masked, into_masked, mutable_data<A>(dweight), mutable_data<A>(dbias),
                              mutable_data<double>(sums)});
    });
    return {sums, dweight, dbias};
  }
};

struct BatchNormActBackwardApplyOut {
  static constexpr auto kName = "batch_norm_act_backward_apply_out";
  Tensor grad, x;
  NormTensors norm;
  Tensor means;
  double eps;
  int64_t act;
  Tensor dx;
  double negative_slope;
  auto arguments() {
    return std::tie(grad, x, norm.weight, norm.bias, norm.mean, norm.var, means, eps, act, dx, negative_slope);
  }

  Layout check() const {
    const Check check(kName, x);
    norm.check(check);
    check.dense_like_x("x", x);
    check.dense_like_x("grad", grad);
    check.dense_like_x("dx", dx);
    require(means.dim() == 2 && means.size(0) == 2 && means.size(1) == x.size(1) && means.is_contiguous() &&
                means.scalar_type() == ScalarType::Double && means.device() == x.device(),
            kName, ": means must be a contiguous (2, ", x.size(1), ") tensor of float64 on the device of x");
    check_activation(kName, act, negative_slope);
    return check.at;
  }

  template <class Kernels>
  void run() const {
    const Layout at = check();
    const Kernels kernels(x);
    if (x.numel() == 0) return;
    with_type(kName, x, [&](auto value) {
      using T = decltype(value);
      using A = typename Compute<T>::type;
      const BackwardArgs<T> args{norm.data<A>(eps),   Act(act), A(negative_slope), data<T>(grad), data<T>(x), nullptr,
                                 mutable_data<T>(dx), nullptr,  nullptr,           nullptr,       nullptr};
      kernels.backward_apply(at, args, data<double>(means));
    });
  }
};

// The functional form, which autograd calls: on small maps the same from Python would take a fifth of the time.
struct BatchNormActBackward {
  static constexpr auto kName = "batch_norm_act_backward";
  Tensor grad, x;
  NormTensors norm;
  std::optional<Tensor> y;
  double eps;
  int64_t act;
  double negative_slope;
  auto arguments() {
    return std::tie(grad, x, norm.weight, norm.bias, norm.mean, norm.var, y, eps, act, negative_slope);
  }

  template <class Kernels>
  std::tuple<Tensor, Tensor, Tensor, Tensor> run() const {
    const MemoryFormat format = Check(kName, x).at.format;
    Tensor dx = empty(x, x.sizes(), format);
    std::optional<Tensor> dresidual;
    if (y) dresidual = empty(x, x.sizes(), format);
    const BatchNormActBackwardOut out{dense(grad, format), dense(x, format), norm, dense(y, format), eps, act, dx,
                                      dresidual,           negative_slope};
    auto [dweight, dbias] = out.run<Kernels>();
    return {dx, y ? *dresidual : empty(x, {0}), dweight, dbias};
  }
};

template <class Kernels, class Library>
void implement_batch_norm_act(Library& library) {
  implement<Kernels, BatchNormStatistics, BatchNormAct, BatchNormActApplyOut, BatchNormActBackwardOut,
            BatchNormActBackwardSums, BatchNormActBackwardApplyOut, BatchNormActBackward>(library);
}

}  // namespace auglocal
