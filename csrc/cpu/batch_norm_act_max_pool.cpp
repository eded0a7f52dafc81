// CPU kernels of batch_norm_act_max_pool: max-pool of relu(BN(x)), which is never stored.
#include "../pool.h"
#include "batch_norm.h"

#include <limits>

namespace auglocal {
namespace {

// Everything a kernel needs to find its way from outputs to inputs and back.
struct Map {
  Layout at;
  Pool pool;
  Strides in, out;
  int64_t n, c, h, w, out_h, out_w;
};

Map make_map(const Tensor& x, const Layout& at, const Pool& pool, const Tensor& pooled) {
  return {at,        pool,      strides_of(x, at.format), strides_of(pooled, at.format), x.size(0), x.size(1), x.size(2),
          x.size(3), pooled.size(2), pooled.size(3)};
}

// Calls f(channel, row offset) for rows of `width` neighbouring values of a map, in memory order and in parallel,
// where f walks the row: along w in the contiguous layout, along the channels in channels_last.
template <class F>
void over_rows_of(const Map& map, int64_t height, const F& f) {
  const bool channels_last = map.at.format == MemoryFormat::ChannelsLast;
  const int64_t rows = map.n * height * (channels_last ? 1 : map.c);
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t y = row % height, plane = row / height;
      if (channels_last)
        f(plane, int64_t(0), map.c, y);
      else
        f(plane / map.c, plane % map.c, plane % map.c + 1, y);
    }
  });
}

template <class T, class A>
void forward(const Map& map, const T* x, const Channels<A>& channels, T* y, uint8_t* index) {
  const Pool& pool = map.pool;
  over_rows_of(map, map.out_h, [&](int64_t n, int64_t first_channel, int64_t end_channel, int64_t oh) {
    for (int64_t ow = 0; ow < map.out_w; ++ow)
      for (int64_t c = first_channel; c < end_channel; ++c) {
        const Affine<A> channel = channels[c];
        A best = -std::numeric_limits<A>::infinity();
        int64_t tap = 0;
        for (int64_t i = 0; i < pool.kernel_h; ++i)
          for (int64_t j = 0; j < pool.kernel_w; ++j) {
            const int64_t h = oh * pool.stride_h - pool.padding_h + i, w = ow * pool.stride_w - pool.padding_w + j;
            if (h < 0 || h >= map.h || w < 0 || w >= map.w) continue;
            const A value = normalize(A(load(x[n * map.in.n + c * map.in.c + h * map.in.h + w * map.in.w])), channel);
            if (value > best || value != value) best = value, tap = i * pool.kernel_w + j;  // NaN wins, as in torch
          }
        const int64_t o = n * map.out.n + c * map.out.c + oh * map.out.h + ow * map.out.w;
        store(&y[o], relu(best));
        index[o] = uint8_t(tap);
      }
  });
}

// The sum of the gradients of the windows that took their maximum from one input value.
template <class T, class A>
A gathered(const Map& map, const T* grad, const uint8_t* index, int64_t n, int64_t c, int64_t h, int64_t w) {
  const Pool& pool = map.pool;
  const Windows rows = windows_of(h, pool.kernel_h, pool.stride_h, pool.padding_h, map.out_h);
  const Windows columns = windows_of(w, pool.kernel_w, pool.stride_w, pool.padding_w, map.out_w);
  A sum = 0;
  for (int64_t oh = rows.first; oh <= rows.last; ++oh)
    for (int64_t ow = columns.first; ow <= columns.last; ++ow) {
      const int64_t o = n * map.out.n + c * map.out.c + oh * map.out.h + ow * map.out.w;
      const int64_t i = h - (oh * pool.stride_h - pool.padding_h), j = w - (ow * pool.stride_w - pool.padding_w);
      if (index[o] == i * pool.kernel_w + j) sum += load(grad[o]);
    }
  return sum;
}

template <class T, class A>
void backward(const Map& map, const T* grad, const T* x, const uint8_t* index, const A* weight, const A* bias,
              const A* mean, const A* var, double eps, T* dx, A* dweight, A* dbias) {
  const Channels<A> channels(map.c, mean, var, weight, bias, eps);
  std::vector<InputGrad<A>> back(map.c);
  const double count = double(std::max<int64_t>(map.at.count(), 1));
  // One task a channel, over its outputs in one order: no sum depends on the number of threads.
  torch::stable::parallel_for(0, map.c, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Affine<A> channel = channels[c];
      double sum = 0, dot = 0;
      for (int64_t n = 0; n < map.n; ++n)
        for (int64_t oh = 0; oh < map.out_h; ++oh)
          for (int64_t ow = 0; ow < map.out_w; ++ow) {
            const int64_t o = n * map.out.n + c * map.out.c + oh * map.out.h + ow * map.out.w;
            const int64_t h = oh * map.pool.stride_h - map.pool.padding_h + index[o] / map.pool.kernel_w;
            const int64_t w = ow * map.pool.stride_w - map.pool.padding_w + index[o] % map.pool.kernel_w;
            const A value = load(x[n * map.in.n + c * map.in.c + h * map.in.h + w * map.in.w]);
            const A g = relu_backward(A(load(grad[o])), normalize(value, channel));
            sum += g;
            dot += double(g) * (value - channel.mean);
          }
      const double invstd = 1 / std::sqrt(double(var[c]) + eps);
      dbias[c] = A(sum);
      dweight[c] = A(dot * invstd);
      back[c] = {channel.scale, A(sum / count), A(dot * invstd * invstd / count)};
    }
  });
  over_rows_of(map, map.h, [&](int64_t n, int64_t first_channel, int64_t end_channel, int64_t h) {
    for (int64_t w = 0; w < map.w; ++w)
      for (int64_t c = first_channel; c < end_channel; ++c) {
        const int64_t i = n * map.in.n + c * map.in.c + h * map.in.h + w * map.in.w;
        const A value = load(x[i]);
        const A g = relu_backward(gathered<T, A>(map, grad, index, n, c, h, w), normalize(value, channels[c]));
        store(&dx[i], input_grad(g, value - channels.mean[c], back[c]));
      }
  });
}

std::tuple<Tensor, Tensor> batch_norm_act_max_pool_apply(const Tensor& given, const Tensor& weight, const Tensor& bias,
                                                         const Tensor& mean, const Tensor& var, double eps,
                                                         int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                                                         int64_t stride_w, int64_t padding_h, int64_t padding_w,
                                                         int64_t out_h, int64_t out_w) {
  constexpr auto op = "batch_norm_act_max_pool_apply";
  const Pool pool{kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w};
  const Layout at = check_pooling(op, given, weight, bias, mean, var, pool, out_h, out_w);
  const Tensor x = dense(given, at.format);
  Tensor y = empty(x, {x.size(0), x.size(1), out_h, out_w}, at.format);
  Tensor index = torch::stable::empty(y.sizes(), ScalarType::Byte, std::nullopt, x.device(), std::nullopt, at.format);
  AUGLOCAL_DISPATCH(op, x.scalar_type(), {
    using A = typename Compute<T>::type;
    const Channels<A> channels(at.channels, data<A>(mean), data<A>(var), data<A>(weight), data<A>(bias), eps);
    forward(make_map(x, at, pool, y), data<T>(x), channels, mutable_data<T>(y), mutable_data<uint8_t>(index));
  });
  return {y, index};
}

std::tuple<Tensor, Tensor> batch_norm_act_max_pool_backward_out(
    const Tensor& grad, const Tensor& x, const Tensor& index, const Tensor& weight, const Tensor& bias,
    const Tensor& mean, const Tensor& var, double eps, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
    int64_t stride_w, int64_t padding_h, int64_t padding_w, Tensor dx) {
  constexpr auto op = "batch_norm_act_max_pool_backward_out";
  const Pool pool{kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w};
  const Layout at = check_pooling_backward(op, grad, x, index, weight, bias, mean, var, pool, dx);
  Tensor dweight = empty(weight, weight.sizes()), dbias = empty(weight, weight.sizes());
  AUGLOCAL_DISPATCH(op, x.scalar_type(), {
    using A = typename Compute<T>::type;
    backward(make_map(x, at, pool, grad), data<T>(grad), data<T>(x), data<uint8_t>(index), data<A>(weight),
             data<A>(bias), data<A>(mean), data<A>(var), eps, mutable_data<T>(dx), mutable_data<A>(dweight),
             mutable_data<A>(dbias));
  });
  return {dweight, dbias};
}

}  // namespace
}  // namespace auglocal

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  m.impl("batch_norm_act_max_pool_apply", TORCH_BOX(&auglocal::batch_norm_act_max_pool_apply));
  m.impl("batch_norm_act_max_pool_backward_out", TORCH_BOX(&auglocal::batch_norm_act_max_pool_backward_out));
}
