// CPU kernels of batch_norm_act_mean: the mean over each map of act(BN(x) [+ residual]), which is never stored.
// The map's gradient is never stored either: it is one value a map behind the ReLU's mask, recomputed from x.
#include "batch_norm.h"

namespace auglocal {
namespace {

// ---- sums over one map ------------------------------------------------------------------------------

enum class Pass { forward, backward };

template <class A>
struct Terms {
  A first, second;
};

// What one value adds to its map's sums. Forward: the activation. Backward, where the ReLU lets the gradient through:
// one, and x - mean.
template <Pass kPass, bool kResidual, bool kRelu, class T, class A>
HD Terms<A> terms(const T* x, const T* residual, int64_t i, const Affine<A>& channel) {
  const A value = load(x[i]);
  A y = normalize(value, channel);
  if (kResidual) y += load(residual[i]);
  if (kPass == Pass::forward) return {kRelu ? relu(y) : y, A(0)};
  const A centred = value - channel.mean;
  return {kRelu ? relu_backward(A(1), y) : A(1), kRelu ? relu_backward(centred, y) : centred};
}

// Consecutive values of one channel (contiguous layout).
template <Pass kPass, bool kResidual, bool kRelu, class T, class A>
VECTORISED void span_sums(const T* x, const T* residual, int64_t n, Affine<A> channel, double* first, double* second) {
  *first = *second = 0;
  for (int64_t begin = 0; begin < n; begin += kSpan) {
    A a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
    for (int64_t i = begin; i < std::min(begin + kSpan, n); ++i) {
      const Terms<A> add = terms<kPass, kResidual, kRelu>(x, residual, i, channel);
      a += add.first;
      b += add.second;
    }
    *first += a;
    *second += b;
  }
}

// A tile of channels, values `stride` apart (channels_last layout).
template <Pass kPass, bool kResidual, bool kRelu, int64_t kWidth, class T, class A>
HD void tile_sums(const T* x, const T* residual, int64_t rows, int64_t stride, int64_t width, const A* mean,
                  const A* scale, const A* bias, double* first, double* second) {
  const int64_t w = kWidth ? kWidth : width;
  for (int64_t c = 0; c < w; ++c) first[c] = second[c] = 0;
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    A a[kTile] = {}, b[kTile] = {};
    for (int64_t r = begin; r < std::min(begin + kRows, rows); ++r)
      for (int64_t c = 0; c < w; ++c) {
        const Affine<A> channel{mean[c], scale[c], bias[c]};
        const Terms<A> add = terms<kPass, kResidual, kRelu>(x, residual, r * stride + c, channel);
        a[c] += add.first;
        b[c] += add.second;
      }
    for (int64_t c = 0; c < w; ++c) first[c] += a[c], second[c] += b[c];
  }
}

template <Pass kPass, bool kResidual, bool kRelu, class T, class A>
VECTORISED void rows_sums(const T* x, const T* residual, int64_t rows, int64_t channels, const A* mean, const A* scale,
                          const A* bias, double* first, double* second) {
  for (int64_t c = 0; c < channels; c += kTile) {
    const auto tile = c + kTile <= channels ? tile_sums<kPass, kResidual, kRelu, kTile, T, A>
                                            : tile_sums<kPass, kResidual, kRelu, 0, T, A>;
    tile(x + c, kResidual ? residual + c : nullptr, rows, channels, std::min(kTile, channels - c), mean + c, scale + c,
         bias + c, first + c, second + c);
  }
}

// ---- the gradient of x over one map; g: the map's gradient, one value a channel ----------------------

template <bool kResidual, bool kRelu, class T, class A>
HD A masked(const T* x, const T* residual, int64_t i, A g, const Affine<A>& channel) {
  A y = normalize(A(load(x[i])), channel);
  if (kResidual) y += load(residual[i]);
  return kRelu ? relu_backward(g, y) : g;
}

template <bool kResidual, bool kRelu, class T, class A>
VECTORISED void span_input_grad(const T* x, const T* residual, A g, T* dx, T* dresidual, int64_t n, Affine<A> channel,
                                InputGrad<A> back) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A open = masked<kResidual, kRelu>(x, residual, i, g, channel);
    if (kResidual && dresidual) store(&dresidual[i], open);
    store(&dx[i], input_grad(open, load(x[i]) - channel.mean, back));
  }
}

template <bool kResidual, bool kRelu, class T, class A>
VECTORISED void rows_input_grad(const T* x, const T* residual, const A* g, T* dx, T* dresidual, int64_t rows,
                                int64_t channels, const A* mean, const A* scale, const A* bias, const A* grad_mean,
                                const A* projection) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = r * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = row + c;
      const A open = masked<kResidual, kRelu>(x, residual, i, g[c], Affine<A>{mean[c], scale[c], bias[c]});
      if (kResidual && dresidual) store(&dresidual[i], open);
      store(&dx[i], input_grad(open, load(x[i]) - mean[c], InputGrad<A>{scale[c], grad_mean[c], projection[c]}));
    }
  }
}

// ---- the ops ---------------------------------------------------------------------------------------

// Calls f(sample) in parallel.
template <class F>
void over_samples(const Maps& maps, const F& f) {
  const int64_t values = maps.channels * maps.size;
  torch::stable::parallel_for(0, maps.samples, std::max<int64_t>(1, 2 * kBlock / std::max<int64_t>(values, 1)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t n = begin; n < end; ++n) f(n);
                              });
}

template <bool kResidual, bool kRelu, class T, class A>
void forward(const Maps& maps, const T* x, const T* residual, const Channels<A>& channels, A* pooled) {
  const int64_t values = maps.channels * maps.size;
  over_samples(maps, [&](int64_t n) {
    std::vector<double> sum(maps.channels), unused(maps.channels);
    const T *map = x + n * values, *added = kResidual ? residual + n * values : nullptr;
    if (maps.at.inner > 1)
      for (int64_t c = 0; c < maps.channels; ++c, map += maps.size, added += kResidual ? maps.size : 0)
        span_sums<Pass::forward, kResidual, kRelu>(map, added, maps.size, channels[c], &sum[c], &unused[c]);
    else
      rows_sums<Pass::forward, kResidual, kRelu>(map, added, maps.size, maps.channels, channels.mean.data(),
                                                 channels.scale.data(), channels.bias.data(), sum.data(),
                                                 unused.data());
    for (int64_t c = 0; c < maps.channels; ++c) pooled[n * maps.channels + c] = A(sum[c] / double(maps.size));
  });
}

template <bool kResidual, bool kRelu, class T, class A>
void backward(const Maps& maps, const A* grad, const T* x, const T* residual, const A* weight, const A* bias,
              const A* mean, const A* var, double eps, T* dx, T* dresidual, A* dweight, A* dbias) {
  const Channels<A> channels(maps.channels, mean, var, weight, bias, eps);
  const int64_t values = maps.channels * maps.size, tasks = std::min<int64_t>(maps.samples, 64);
  // One task a run of samples; the tasks' sums are added in order, whatever the number of threads.
  std::vector<double> sums(tasks * maps.channels), dots(tasks * maps.channels);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> open(maps.channels), centred(maps.channels);
    for (int64_t task = begin; task < end; ++task)
      for (int64_t n = task * maps.samples / tasks; n < (task + 1) * maps.samples / tasks; ++n) {
        const T *map = x + n * values, *added = kResidual ? residual + n * values : nullptr;
        if (maps.at.inner > 1)
          for (int64_t c = 0; c < maps.channels; ++c, map += maps.size, added += kResidual ? maps.size : 0)
            span_sums<Pass::backward, kResidual, kRelu>(map, added, maps.size, channels[c], &open[c], &centred[c]);
        else
          rows_sums<Pass::backward, kResidual, kRelu>(map, added, maps.size, maps.channels, channels.mean.data(),
                                                      channels.scale.data(), channels.bias.data(), open.data(),
                                                      centred.data());
        for (int64_t c = 0; c < maps.channels; ++c) {
          const double g = double(grad[n * maps.channels + c]) / double(maps.size);
          sums[task * maps.channels + c] += g * open[c];
          dots[task * maps.channels + c] += g * centred[c];
        }
      }
  });
  InputGrads<A> back(channels, maps.at.count(), var, eps, dweight, dbias);
  back.finish(sums, dots);
  over_samples(maps, [&](int64_t n) {
    std::vector<A> g(maps.channels);
    for (int64_t c = 0; c < maps.channels; ++c) g[c] = A(double(grad[n * maps.channels + c]) / double(maps.size));
    const int64_t i = n * values;
    if (maps.at.inner > 1)
      for (int64_t c = 0; c < maps.channels; ++c) {
        const int64_t map = i + c * maps.size;
        span_input_grad<kResidual, kRelu>(x + map, kResidual ? residual + map : nullptr, g[c], dx + map,
                                          dresidual ? dresidual + map : nullptr, maps.size, channels[c],
                                          back[c]);
      }
    else
      rows_input_grad<kResidual, kRelu>(x + i, kResidual ? residual + i : nullptr, g.data(), dx + i,
                                        dresidual ? dresidual + i : nullptr, maps.size, maps.channels,
                                        channels.mean.data(), channels.scale.data(), channels.bias.data(),
                                        back.grad_mean.data(), back.projection.data());
  });
}

Tensor batch_norm_act_mean_apply(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                                 const Tensor& var, const std::optional<Tensor>& residual, double eps, bool act) {
  constexpr auto op = "batch_norm_act_mean_apply";
  const Maps maps = check_mean(op, x, weight, bias, mean, var, residual);
  Tensor pooled = empty(weight, {maps.samples, maps.channels});
  if (x.numel() == 0) return torch::stable::fill_(pooled, NAN);
  AUGLOCAL_DISPATCH(op, x.scalar_type(), {
    using A = typename Compute<T>::type;
    const auto run = residual ? (act ? forward<true, true, T, A> : forward<true, false, T, A>)
                              : (act ? forward<false, true, T, A> : forward<false, false, T, A>);
    const Channels<A> channels(maps.channels, data<A>(mean), data<A>(var), data<A>(weight), data<A>(bias), eps);
    run(maps, data<T>(x), data<T>(residual), channels, mutable_data<A>(pooled));
  });
  return pooled;
}

std::tuple<Tensor, Tensor> batch_norm_act_mean_backward_out(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                            const Tensor& bias, const Tensor& mean, const Tensor& var,
                                                            const std::optional<Tensor>& residual, double eps,
                                                            bool act, Tensor dx,
                                                            const std::optional<Tensor>& dresidual) {
  constexpr auto op = "batch_norm_act_mean_backward_out";
  const Maps maps = check_mean_backward(op, grad, x, weight, bias, mean, var, residual, act, dx, dresidual);
  Tensor dweight = empty(weight, weight.sizes()), dbias = empty(weight, weight.sizes());
  if (x.numel() == 0) return {zeroed(dweight), zeroed(dbias)};
  AUGLOCAL_DISPATCH(op, x.scalar_type(), {
    using A = typename Compute<T>::type;
    const auto run = residual ? backward<true, true, T, A>
                              : (act ? backward<false, true, T, A> : backward<false, false, T, A>);
    run(maps, data<A>(grad), data<T>(x), data<T>(residual), data<A>(weight), data<A>(bias), data<A>(mean), data<A>(var),
        eps, mutable_data<T>(dx), dresidual ? mutable_data<T>(*dresidual) : nullptr, mutable_data<A>(dweight),
        mutable_data<A>(dbias));
  });
  return {dweight, dbias};
}

}  // namespace
}  // namespace auglocal

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  AUGLOCAL_IMPL(m, batch_norm_act_mean_apply);
  AUGLOCAL_IMPL(m, batch_norm_act_mean_backward_out);
}
