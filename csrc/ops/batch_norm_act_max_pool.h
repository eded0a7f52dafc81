// batch_norm_act_max_pool's parts. Kernels brings forward(map, args) and backward(map, args).
#pragma once

#include "op.h"

namespace auglocal {

struct Pool {
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;

  void check(const char* op) const {
    require(kernel_h >= 1 && kernel_w >= 1 && kernel_h <= 16 && kernel_w <= 16, op,
            ": the window must be 1 to 16 taps high and wide, given ", kernel_h, " x ", kernel_w);
    require(stride_h >= 1 && stride_w >= 1, op, ": strides must be at least 1");
    require(padding_h >= 0 && padding_w >= 0 && 2 * padding_h <= kernel_h && 2 * padding_w <= kernel_w, op,
            ": padding must be at most half of the window");
  }
};

// A window that starts in the padding on the right, as ceil_mode can ask for, holds no value: not allowed, as in torch.
inline void check_windows(const char* op, int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t out) {
  require(out >= 1 && (out - 1) * stride < size + padding && (out - 1) * stride - padding + kernel > 0 && size >= 1, op,
          ": ", out, " windows of ", kernel, " taps and stride ", stride, " do not fit ", size, " values");
}

// A feature map's strides in values, in its own layout.
struct Strides {
  int64_t n, c, h, w;
  Strides(int64_t c, int64_t h, int64_t w, MemoryFormat format) : n(c * h * w), c(h * w), h(w), w(1) {
    if (format != MemoryFormat::ChannelsLast) return;
    this->c = 1, this->h = w * c, this->w = c;
  }
};

// Everything a kernel needs to find its way from outputs to inputs and back.
struct PoolMap {
  Layout at;
  Pool pool;
  int64_t n, c, h, w, out_h, out_w;
  Strides in, out;
  PoolMap(const Check& check, const Pool& pool, int64_t out_h, int64_t out_w)
      : at(check.at), pool(pool), n(check.x.size(0)), c(check.x.size(1)), h(check.x.size(2)), w(check.x.size(3)),
        out_h(out_h), out_w(out_w), in(c, h, w, at.format), out(c, out_h, out_w, at.format) {
    require(c >= 1, check.op, ": x must have channels");
    pool.check(check.op);
    check_windows(check.op, h, pool.kernel_h, pool.stride_h, pool.padding_h, out_h);
    check_windows(check.op, w, pool.kernel_w, pool.stride_w, pool.padding_w, out_w);
  }
  bool channels_last() const { return at.format == MemoryFormat::ChannelsLast; }
};

// ---- what the kernels are given; index: the byte an output keeps, its maximum's tap ------------------------

template <class T, class A = typename Compute<T>::type>
struct MaxPoolArgs {
  Norm<A> norm;
  const T* x;
  T* y;
  uint8_t* index;
};

template <class T, class A = typename Compute<T>::type>
struct MaxPoolBackwardArgs {
  Norm<A> norm;
  const T *grad, *x;
  const uint8_t* index;
  T* dx;  // may be x
  A *dweight, *dbias;
};

// ---- the ops -------------------------------------------------------------------------------------------

struct BatchNormActMaxPoolApply {
  static constexpr auto kName = "batch_norm_act_max_pool_apply";
  Tensor x;
  NormTensors norm;
  double eps;
  Pool pool;
  int64_t out_h, out_w;
  auto arguments() {
    return std::tie(x, norm.weight, norm.bias, norm.mean, norm.var, eps, pool.kernel_h, pool.kernel_w, pool.stride_h,
                    pool.stride_w, pool.padding_h, pool.padding_w, out_h, out_w);
  }

  PoolMap check() const {
    const Check check(kName, x);
    norm.check(check);
    return {check, pool, out_h, out_w};
  }

  template <class Kernels>
  std::tuple<Tensor, Tensor> run() const {
    const PoolMap map = check();
    const Kernels kernels(x);
    const MemoryFormat format = map.at.format;
    const Tensor dense_x = dense(x, format);
    Tensor y = empty(x, {map.n, map.c, out_h, out_w}, format);
    Tensor index = torch::stable::empty(y.sizes(), ScalarType::Byte, std::nullopt, x.device(), std::nullopt, format);
    if (x.numel() == 0) return {y, index};
    with_type(kName, x, [&](auto value) {
      using T = decltype(value);
      using A = typename Compute<T>::type;
      kernels.forward(
          map, MaxPoolArgs<T>{norm.data<A>(eps), data<T>(dense_x), mutable_data<T>(y), mutable_data<uint8_t>(index)});
    });
    return {y, index};
  }
};

struct BatchNormActMaxPoolBackwardOut {
  static constexpr auto kName = "batch_norm_act_max_pool_backward_out";
  Tensor grad, x, index;
  NormTensors norm;
  double eps;
  Pool pool;
  Tensor dx;
  auto arguments() {
    return std::tie(grad, x, index, norm.weight, norm.bias, norm.mean, norm.var, eps, pool.kernel_h, pool.kernel_w,
                    pool.stride_h, pool.stride_w, pool.padding_h, pool.padding_w, dx);
  }

  PoolMap check() const {
    require(grad.dim() == 4 && index.dim() == 4, kName, ": grad and index must be (N, C, H, W)");
    const Check check(kName, x);
    norm.check(check);
    const PoolMap map(check, pool, grad.size(2), grad.size(3));
    check.dense_like_x("x", x);
    check.dense_like_x("dx", dx);
    for (const auto& [name, given] : {std::pair<const char*, const Tensor&>{"grad", grad}, {"index", index}})
      require(given.size(0) == map.n && given.size(1) == map.c && given.sizes().equals(grad.sizes()) &&
                  check.laid_out(given) && given.device() == x.device(),
              kName, ": ", name, " must be (N, C, pooled H, pooled W), dense in the layout of x, on its device");
    require(grad.scalar_type() == x.scalar_type() && index.scalar_type() == ScalarType::Byte, kName,
            ": grad must have the dtype of x, index must be uint8");
    return map;
  }

  template <class Kernels>
  std::tuple<Tensor, Tensor> run() const {
    const PoolMap map = check();
    const Kernels kernels(x);
    Tensor dweight = empty(norm.weight, norm.weight.sizes()), dbias = empty(norm.weight, norm.weight.sizes());
    if (x.numel() == 0) return {zeroed(dweight), zeroed(dbias)};
    with_type(kName, x, [&](auto value) {
      using T = decltype(value);
      using A = typename Compute<T>::type;
      kernels.backward(map,
                       MaxPoolBackwardArgs<T>{norm.data<A>(eps), data<T>(grad), data<T>(x), data<uint8_t>(index),
                                              mutable_data<T>(dx), mutable_data<A>(dweight), mutable_data<A>(dbias)});
    });
    return {dweight, dbias};
  }
};

}  // namespace auglocal
