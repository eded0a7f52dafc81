// CPU kernels of batch_norm_act_mean: the mean over each map of act(BN(x) [+ residual]), which is never stored.
// The map's gradient is never stored either: it is one value a map behind the ReLU's mask, recomputed from x.
#include "../ops/batch_norm_act_mean.h"

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
HD void tile_sums(const T* x, const T* residual, int64_t rows, int64_t stride, int64_t width, Affines<A> affines,
                  double* first, double* second) {
  const int64_t w = kWidth ? kWidth : width;
  for (int64_t c = 0; c < w; ++c) first[c] = second[c] = 0;
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    A a[kTile] = {}, b[kTile] = {};
    for (int64_t r = begin; r < std::min(begin + kRows, rows); ++r)
      for (int64_t c = 0; c < w; ++c) {
        const Terms<A> add = terms<kPass, kResidual, kRelu>(x, residual, r * stride + c, affines[c]);
        a[c] += add.first;
        b[c] += add.second;
      }
    for (int64_t c = 0; c < w; ++c) first[c] += a[c], second[c] += b[c];
  }
}

template <Pass kPass, bool kResidual, bool kRelu, class T, class A>
VECTORISED void rows_sums(const T* x, const T* residual, int64_t rows, int64_t channels, Affines<A> affines,
                          double* first, double* second) {
  for (int64_t c = 0; c < channels; c += kTile) {
    const auto tile = c + kTile <= channels ? tile_sums<kPass, kResidual, kRelu, kTile, T, A>
                                            : tile_sums<kPass, kResidual, kRelu, 0, T, A>;
    tile(x + c, kResidual ? residual + c : nullptr, rows, channels, std::min(kTile, channels - c), affines.from(c),
         first + c, second + c);
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
                                int64_t channels, Affines<A> affines, InputGrads<A> back) {
  const A *const mean = affines.mean, *const scale = affines.scale, *const bias = affines.bias;
  const A *const grad_mean = back.grad_mean, *const projection = back.projection;
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

// The sums over each map of one sample.
template <Pass kPass, bool kResidual, bool kRelu, class T, class A>
void sample_sums(const Maps& maps, int64_t n, const T* x, const T* residual, Affines<A> affines, double* first,
                 double* second) {
  const int64_t begin = n * maps.channels * maps.size;
  const T *map = x + begin, *added = kResidual ? residual + begin : nullptr;
  if (maps.at.inner == 1)
    return rows_sums<kPass, kResidual, kRelu>(map, added, maps.size, maps.channels, affines, first, second);
  for (int64_t c = 0; c < maps.channels; ++c, map += maps.size, added += kResidual ? maps.size : 0)
    span_sums<kPass, kResidual, kRelu>(map, added, maps.size, affines[c], &first[c], &second[c]);
}

template <bool kResidual, bool kRelu, class T, class A = typename Compute<T>::type>
void forward(const Maps& maps, const MeanArgs<T>& args) {
  const Channels<A> channels(maps.channels, args.norm);
  over_samples(maps, [&](int64_t n) {
    std::vector<double> sum(maps.channels), unused(maps.channels);
    sample_sums<Pass::forward, kResidual, kRelu>(maps, n, args.x, args.residual, channels.affines(), sum.data(),
                                                 unused.data());
    for (int64_t c = 0; c < maps.channels; ++c) args.pooled[n * maps.channels + c] = A(sum[c] / double(maps.size));
  });
}

template <bool kResidual, bool kRelu, class T, class A = typename Compute<T>::type>
void backward(const Maps& maps, const MeanBackwardArgs<T>& args) {
  BackwardChannels<A> channels(maps.at, args.norm, args.dweight, args.dbias);
  const Affines<A> affines = channels.affines();
  const InputGrads<A> back = channels.input_grads();
  const auto grad_of = [&](int64_t n, int64_t c) {
    return double(args.grad[n * maps.channels + c]) / double(maps.size);
  };
  const int64_t values = maps.channels * maps.size, tasks = std::min<int64_t>(maps.samples, 64);
  // One task a run of samples; the tasks' sums are added in order, whatever the number of threads.
  std::vector<double> sums(tasks * maps.channels), dots(tasks * maps.channels);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> open(maps.channels), centred(maps.channels);
    for (int64_t task = begin; task < end; ++task)
      for (int64_t n = task * maps.samples / tasks; n < (task + 1) * maps.samples / tasks; ++n) {
        sample_sums<Pass::backward, kResidual, kRelu>(maps, n, args.x, args.residual, affines, open.data(),
                                                      centred.data());
        for (int64_t c = 0; c < maps.channels; ++c) {
          const double g = grad_of(n, c);
          sums[task * maps.channels + c] += g * open[c];
          dots[task * maps.channels + c] += g * centred[c];
        }
      }
  });
  channels.finish(sums, dots);
  over_samples(maps, [&](int64_t n) {
    std::vector<A> g(maps.channels);
    for (int64_t c = 0; c < maps.channels; ++c) g[c] = A(grad_of(n, c));
    const auto at_offset = [](auto* from, int64_t i) { return from ? from + i : nullptr; };
    int64_t i = n * values;
    if (maps.at.inner == 1)
      return rows_input_grad<kResidual, kRelu>(args.x + i, at_offset(args.residual, i), g.data(), args.dx + i,
                                               at_offset(args.dresidual, i), maps.size, maps.channels, affines, back);
    for (int64_t c = 0; c < maps.channels; ++c, i += maps.size)
      span_input_grad<kResidual, kRelu>(args.x + i, at_offset(args.residual, i), g[c], args.dx + i,
                                        at_offset(args.dresidual, i), maps.size, affines[c], back[c]);
  });
}

// Calls run(a, b) with two flags as constants.
template <class Run>
void with_flags(bool a, bool b, const Run& run) {
  if (a)
    b ? run(std::true_type(), std::true_type()) : run(std::true_type(), std::false_type());
  else
    b ? run(std::false_type(), std::true_type()) : run(std::false_type(), std::false_type());
}

struct Kernels : Cpu {
  using Cpu::Cpu;

  template <class T>
  void forward(const Maps& maps, const MeanArgs<T>& args) const {
    with_flags(args.residual, args.relu,
               [&](auto residual, auto relu) { auglocal::forward<residual, relu>(maps, args); });
  }
  template <class T>
  void backward(const Maps& maps, const MeanBackwardArgs<T>& args) const {
    with_flags(args.residual, args.relu,
               [&](auto residual, auto relu) { auglocal::backward<residual, relu || residual>(maps, args); });
  }
};

}  // namespace
}  // namespace auglocal

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  auglocal::implement<auglocal::Kernels, auglocal::BatchNormActMeanApply, auglocal::BatchNormActMeanBackwardOut>(m);
}
