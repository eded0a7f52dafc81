// CPU kernels of batch_norm_act. Sums run in the tensor's precision over a few hundred values and in double
// beyond, in one fixed order, so that they are exact to about the last bit, and the same bits on every run and
// for every number of threads.
#include "../batch_norm_act.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../tensor.h"

// One binary serves every x86-64: the loops are compiled three times and chosen when loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif

namespace auglocal {
namespace {

constexpr int64_t kBlock = 4096;  // values a block holds: two passes over it stay in the first-level cache
constexpr int64_t kSpan = 512;    // values summed before their sum goes to double
constexpr int64_t kTile = 16;     // channels summed in registers at a time (channels_last)
constexpr int64_t kRows = 32;     // and rows of them, before the sums go to double

// ---- spans: one channel, consecutive values (contiguous layout) -----------------------------------

template <class A, class T>
VECTORISED void span_moments(const T* x, int64_t n, double* mean, double* m2) {
  double total = 0, first = 0, second = 0;
  for (int64_t begin = 0; begin < n; begin += kSpan) {
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < std::min(begin + kSpan, n); ++i) sum += load(x[i]);
    total += sum;
  }
  const A centre = A(total / double(n));
  for (int64_t begin = 0; begin < n; begin += kSpan) {
    A sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
    for (int64_t i = begin; i < std::min(begin + kSpan, n); ++i) {
      const A d = load(x[i]) - centre;
      sum += d;
      squares += d * d;
    }
    first += sum;
    second += squares;
  }
  *mean = centre + first / double(n);  // with what rounding left of the mean
  *m2 = second - first * first / double(n);
}

template <bool kResidual, bool kRelu, class T, class A>
VECTORISED void span_apply(const T* x, const T* residual, T* y, int64_t n, Affine<A> channel) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    A value = normalize(load(x[i]), channel);
    if (kResidual) value += load(residual[i]);
    store(&y[i], kRelu ? relu(value) : value);
  }
}

// The incoming gradient behind the ReLU's mask.
template <Mask kMask, class T, class A>
HD A masked(const T* grad, const T* y, int64_t i, A x, const Affine<A>& channel) {
  const A g = load(grad[i]);
  if (kMask == Mask::from_output) return relu_backward(g, A(load(y[i])));
  if (kMask == Mask::from_input) return relu_backward(g, normalize(x, channel));
  return g;
}

template <Mask kMask, class T, class A>
VECTORISED void span_grad_sums(const T* grad, const T* x, const T* y, int64_t n, Affine<A> channel, double* sum,
                               double* dot) {
  for (int64_t begin = 0; begin < n; begin += kSpan) {
    A s = 0, d = 0;
#pragma omp simd reduction(+ : s, d)
    for (int64_t i = begin; i < std::min(begin + kSpan, n); ++i) {
      const A value = load(x[i]);
      const A g = masked<kMask>(grad, y, i, value, channel);
      s += g;
      d += g * (value - channel.mean);
    }
    *sum += s;
    *dot += d;
  }
}

template <Mask kMask, class T, class A>
VECTORISED void span_input_grad(const T* grad, const T* x, const T* y, T* dx, T* dresidual, int64_t n,
                                Affine<A> channel, InputGrad<A> back) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A value = load(x[i]);
    const A g = masked<kMask>(grad, y, i, value, channel);
    if (kMask == Mask::from_output) store(&dresidual[i], g);
    store(&dx[i], input_grad(g, value - channel.mean, back));
  }
}

// ---- rows: a tile of channels, values `stride` apart (channels_last layout) ------------------------

// kWidth > 0: that many channels, known to the compiler, so that sums stay in registers.
template <int64_t kWidth, class A, class T>
HD void tile_moments(const T* x, int64_t rows, int64_t stride, int64_t width, double* mean, double* m2) {
  const int64_t w = kWidth ? kWidth : width;
  double total[kTile] = {}, first[kTile] = {}, second[kTile] = {};
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    A sum[kTile] = {};
    for (int64_t r = begin; r < std::min(begin + kRows, rows); ++r)
      for (int64_t c = 0; c < w; ++c) sum[c] += load(x[r * stride + c]);
    for (int64_t c = 0; c < w; ++c) total[c] += sum[c];
  }
  A centre[kTile];
  for (int64_t c = 0; c < w; ++c) centre[c] = A(total[c] / double(rows));
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    A sum[kTile] = {}, squares[kTile] = {};
    for (int64_t r = begin; r < std::min(begin + kRows, rows); ++r)
      for (int64_t c = 0; c < w; ++c) {
        const A d = load(x[r * stride + c]) - centre[c];
        sum[c] += d;
        squares[c] += d * d;
      }
    for (int64_t c = 0; c < w; ++c) first[c] += sum[c], second[c] += squares[c];
  }
  for (int64_t c = 0; c < w; ++c) {
    mean[c] = centre[c] + first[c] / double(rows);
    m2[c] = second[c] - first[c] * first[c] / double(rows);
  }
}

template <class A, class T>
VECTORISED void rows_moments(const T* x, int64_t rows, int64_t channels, double* mean, double* m2) {
  int64_t c = 0;
  for (; c + kTile <= channels; c += kTile) tile_moments<kTile, A>(x + c, rows, channels, kTile, mean + c, m2 + c);
  if (c < channels) tile_moments<0, A>(x + c, rows, channels, channels - c, mean + c, m2 + c);
}

template <bool kResidual, bool kRelu, class T, class A>
VECTORISED void rows_apply(const T* x, const T* residual, T* y, int64_t rows, int64_t channels,
                           const A* mean, const A* scale, const A* bias) {
  for (int64_t r = 0; r < rows; ++r, x += channels, y += channels, residual += kResidual ? channels : 0)
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      A value = normalize(load(x[c]), Affine<A>{mean[c], scale[c], bias[c]});
      if (kResidual) value += load(residual[c]);
      store(&y[c], kRelu ? relu(value) : value);
    }
}

template <Mask kMask, int64_t kWidth, class T, class A>
HD void tile_grad_sums(const T* grad, const T* x, const T* y, int64_t rows, int64_t stride, int64_t width,
                       const A* mean, const A* scale, const A* bias, double* sum, double* dot) {
  const int64_t w = kWidth ? kWidth : width;
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    A s[kTile] = {}, d[kTile] = {};
    for (int64_t r = begin; r < std::min(begin + kRows, rows); ++r)
      for (int64_t c = 0; c < w; ++c) {
        const int64_t i = r * stride + c;
        const A value = load(x[i]);
        const A g = masked<kMask>(grad, y, i, value, Affine<A>{mean[c], scale[c], bias[c]});
        s[c] += g;
        d[c] += g * (value - mean[c]);
      }
    for (int64_t c = 0; c < w; ++c) sum[c] += s[c], dot[c] += d[c];
  }
}

template <Mask kMask, class T, class A>
VECTORISED void rows_grad_sums(const T* grad, const T* x, const T* y, int64_t rows, int64_t channels,
                               const A* mean, const A* scale, const A* bias, double* sum, double* dot) {
  for (int64_t c = 0; c < channels; c += kTile) {
    const T* masks = kMask == Mask::from_output ? y + c : nullptr;
    const auto tile = c + kTile <= channels ? tile_grad_sums<kMask, kTile, T, A> : tile_grad_sums<kMask, 0, T, A>;
    tile(grad + c, x + c, masks, rows, channels, std::min(kTile, channels - c), mean + c, scale + c, bias + c, sum + c,
         dot + c);
  }
}

template <Mask kMask, class T, class A>
VECTORISED void rows_input_grad(const T* grad, const T* x, const T* y, T* dx, T* dresidual, int64_t rows,
                                int64_t channels, const A* mean, const A* scale, const A* bias,
                                const A* grad_mean, const A* projection) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = r * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = row + c;
      const A value = load(x[i]);
      const A g = masked<kMask>(grad, y, i, value, Affine<A>{mean[c], scale[c], bias[c]});
      if (kMask == Mask::from_output) store(&dresidual[i], g);
      store(&dx[i], input_grad(g, value - mean[c], InputGrad<A>{scale[c], grad_mean[c], projection[c]}));
    }
  }
}

// ---- the ops ---------------------------------------------------------------------------------------

// Per-channel constants as arrays, one entry a channel.
template <class A>
struct Channels {
  std::vector<A> mean, scale, bias;
  explicit Channels(int64_t n) : mean(n), scale(n), bias(n) {}
  void set(int64_t c, A channel_mean, A var, A weight, A channel_bias, double eps) {
    mean[c] = channel_mean;
    scale[c] = A(weight / std::sqrt(double(var) + eps));
    bias[c] = channel_bias;
  }
  Channels(int64_t n, const A* mean, const A* var, const A* weight, const A* bias, double eps) : Channels(n) {
    for (int64_t c = 0; c < n; ++c) set(c, mean[c], var[c], weight[c], bias[c], eps);
  }
  Affine<A> operator[](int64_t c) const { return {mean[c], scale[c], bias[c]}; }
};

// Calls f(begin, length) for each block of the channel's consecutive values.
template <class F>
void for_each_block(const Layout& at, int64_t channel, const F& f) {
  for (int64_t n = 0; n < at.outer; ++n)
    for (int64_t i = 0; i < at.inner; i += kBlock)
      f((n * at.channels + channel) * at.inner + i, std::min(kBlock, at.inner - i));
}

// Rows are cut into blocks, blocks into at most this many runs, one run a task.
struct RowTasks {
  int64_t rows_per_block, blocks, tasks;
  explicit RowTasks(const Layout& at)
      : rows_per_block(std::max<int64_t>(kTile, 2 * kBlock / std::max<int64_t>(at.channels, 1))),
        blocks((at.outer + rows_per_block - 1) / rows_per_block),
        tasks(std::min<int64_t>(blocks, 64)) {}
  int64_t first_block(int64_t task) const { return task * blocks / tasks; }
};

template <class F>
void over_channels(const Layout& at, const F& f) {
  torch::stable::parallel_for(0, at.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(c);
  });
}

template <class F>
void over_rows(const Layout& at, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 2 * kBlock / std::max<int64_t>(at.channels, 1));
  torch::stable::parallel_for(0, at.outer, grain, f);
}

template <bool kResidual, bool kRelu, class T, class A>
void apply_channel(const Layout& at, int64_t c, const T* x, const T* residual, T* y, const Affine<A>& channel) {
  for_each_block(at, c, [&](int64_t begin, int64_t n) {
    span_apply<kResidual, kRelu>(x + begin, kResidual ? residual + begin : nullptr, y + begin, n, channel);
  });
}

template <bool kResidual, bool kRelu, class T, class A>
void apply(const Layout& at, const T* x, const T* residual, T* y, const Channels<A>& channels) {
  if (at.inner > 1)
    return over_channels(at, [&](int64_t c) { apply_channel<kResidual, kRelu>(at, c, x, residual, y, channels[c]); });
  over_rows(at, [&](int64_t begin, int64_t end) {
    const int64_t i = begin * at.channels;
    rows_apply<kResidual, kRelu>(x + i, kResidual ? residual + i : nullptr, y + i, end - begin, at.channels,
                                 channels.mean.data(), channels.scale.data(), channels.bias.data());
  });
}

template <bool kResidual, bool kRelu, class T, class A>
void forward(const Layout& at, const T* x, const T* residual, T* y, const A* weight, const A* bias, A* mean, A* var,
             double eps) {
  Channels<A> channels(at.channels);
  const double count = double(at.count());
  const auto finish = [&](int64_t c, const Moments<double>& moments) {
    mean[c] = A(moments.mean);
    var[c] = A(std::max(moments.m2 / std::max(count, 1.0), 0.0));
    if (moments.m2 != moments.m2) var[c] = A(moments.m2);  // max() would hide a NaN
    channels.set(c, mean[c], var[c], weight[c], bias[c], eps);
  };
  if (at.inner > 1) {
    // A channel's values are normalised right after they were summed, while they are in the cache.
    over_channels(at, [&](int64_t c) {
      Moments<double> moments;
      for_each_block(at, c, [&](int64_t begin, int64_t n) {
        double block_mean, block_m2;
        span_moments<A>(x + begin, n, &block_mean, &block_m2);
        moments.merge(double(n), block_mean, block_m2);
      });
      finish(c, moments);
      apply_channel<kResidual, kRelu>(at, c, x, residual, y, channels[c]);
    });
    return;
  }
  const RowTasks rows(at);
  std::vector<Moments<double>> partial(rows.tasks * at.channels);
  torch::stable::parallel_for(0, rows.tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> block_mean(at.channels), block_m2(at.channels);
    for (int64_t task = begin; task < end; ++task)
      for (int64_t block = rows.first_block(task); block < rows.first_block(task + 1); ++block) {
        const int64_t row = block * rows.rows_per_block, n = std::min(rows.rows_per_block, at.outer - row);
        rows_moments<A>(x + row * at.channels, n, at.channels, block_mean.data(), block_m2.data());
        for (int64_t c = 0; c < at.channels; ++c)
          partial[task * at.channels + c].merge(double(n), block_mean[c], block_m2[c]);
      }
  });
  for (int64_t c = 0; c < at.channels; ++c) {
    Moments<double> moments;
    for (int64_t task = 0; task < rows.tasks; ++task) {
      const auto& part = partial[task * at.channels + c];
      moments.merge(part.count, part.mean, part.m2);
    }
    finish(c, moments);
  }
  apply<kResidual, kRelu>(at, x, residual, y, channels);
}

template <Mask kMask, class T, class A>
void backward(const Layout& at, const T* grad, const T* x, const T* y, const A* weight, const A* bias, const A* mean,
              const A* var, double eps, T* dx, T* dresidual, A* dweight, A* dbias) {
  const Channels<A> channels(at.channels, mean, var, weight, bias, eps);
  std::vector<A> grad_mean(at.channels), projection(at.channels);
  const auto finish = [&](int64_t c, double sum, double dot) {
    const double invstd = 1 / std::sqrt(double(var[c]) + eps), count = double(std::max<int64_t>(at.count(), 1));
    dbias[c] = A(sum);
    dweight[c] = A(dot * invstd);
    grad_mean[c] = A(sum / count);
    projection[c] = A(dot * invstd * invstd / count);
  };
  constexpr bool kFromOutput = kMask == Mask::from_output;
  if (at.inner > 1) {
    over_channels(at, [&](int64_t c) {
      double sum = 0, dot = 0;
      for_each_block(at, c, [&](int64_t begin, int64_t n) {
        span_grad_sums<kMask>(grad + begin, x + begin, kFromOutput ? y + begin : nullptr, n, channels[c], &sum, &dot);
      });
      finish(c, sum, dot);
      const InputGrad<A> back{channels.scale[c], grad_mean[c], projection[c]};
      for_each_block(at, c, [&](int64_t begin, int64_t n) {
        span_input_grad<kMask>(grad + begin, x + begin, kFromOutput ? y + begin : nullptr, dx + begin,
                               kFromOutput ? dresidual + begin : nullptr, n, channels[c], back);
      });
    });
    return;
  }
  const RowTasks rows(at);
  std::vector<double> sums(rows.tasks * at.channels), dots(rows.tasks * at.channels);
  torch::stable::parallel_for(0, rows.tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      for (int64_t block = rows.first_block(task); block < rows.first_block(task + 1); ++block) {
        const int64_t row = block * rows.rows_per_block, n = std::min(rows.rows_per_block, at.outer - row);
        const int64_t i = row * at.channels;
        rows_grad_sums<kMask>(grad + i, x + i, kFromOutput ? y + i : nullptr, n, at.channels, channels.mean.data(),
                              channels.scale.data(), channels.bias.data(), &sums[task * at.channels],
                              &dots[task * at.channels]);
      }
  });
  for (int64_t c = 0; c < at.channels; ++c) {
    double sum = 0, dot = 0;
    for (int64_t task = 0; task < rows.tasks; ++task) {
      sum += sums[task * at.channels + c];
      dot += dots[task * at.channels + c];
    }
    finish(c, sum, dot);
  }
  over_rows(at, [&](int64_t begin, int64_t end) {
    const int64_t i = begin * at.channels;
    rows_input_grad<kMask>(grad + i, x + i, kFromOutput ? y + i : nullptr, dx + i,
                           kFromOutput ? dresidual + i : nullptr, end - begin, at.channels, channels.mean.data(),
                           channels.scale.data(), channels.bias.data(), grad_mean.data(), projection.data());
  });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(const Tensor& given, const Tensor& weight, const Tensor& bias,
                                                  const std::optional<Tensor>& given_residual, double eps, bool act) {
  constexpr auto op = "batch_norm_act";
  const Layout at = check_forward(op, given, weight, bias, given_residual);
  const Tensor x = dense(given, at.format);
  const std::optional<Tensor> residual = dense(given_residual, at.format);
  Tensor y = empty(x, x.sizes(), at.format), mean = empty(weight, weight.sizes()), var = empty(weight, weight.sizes());
  AUGLOCAL_DISPATCH(op, x.scalar_type(), {
    using A = typename Compute<T>::type;
    const auto run = residual ? (act ? forward<true, true, T, A> : forward<true, false, T, A>)
                              : (act ? forward<false, true, T, A> : forward<false, false, T, A>);
    run(at, data<T>(x), data<T>(residual), mutable_data<T>(y), data<A>(weight), data<A>(bias), mutable_data<A>(mean),
        mutable_data<A>(var), eps);
  });
  return {y, mean, var};
}

void batch_norm_act_apply_out(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                              const Tensor& var, const std::optional<Tensor>& residual, double eps, bool act,
                              Tensor out) {
  constexpr auto op = "batch_norm_act_apply_out";
  const Layout at = check_apply(op, x, weight, bias, mean, var, residual, out);
  AUGLOCAL_DISPATCH(op, x.scalar_type(), {
    using A = typename Compute<T>::type;
    const auto run = residual ? (act ? apply<true, true, T, A> : apply<true, false, T, A>)
                              : (act ? apply<false, true, T, A> : apply<false, false, T, A>);
    const Channels<A> channels(at.channels, data<A>(mean), data<A>(var), data<A>(weight), data<A>(bias), eps);
    run(at, data<T>(x), data<T>(residual), mutable_data<T>(out), channels);
  });
}

std::tuple<Tensor, Tensor> batch_norm_act_backward_out(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                       const Tensor& bias, const Tensor& mean, const Tensor& var,
                                                       const std::optional<Tensor>& y, double eps, bool act, Tensor dx,
                                                       const std::optional<Tensor>& dresidual) {
  constexpr auto op = "batch_norm_act_backward_out";
  const Layout at = check_backward(op, grad, x, weight, bias, mean, var, y, dx, dresidual);
  Tensor dweight = empty(weight, weight.sizes()), dbias = empty(weight, weight.sizes());
  AUGLOCAL_DISPATCH(op, x.scalar_type(), {
    using A = typename Compute<T>::type;
    const auto run = y ? backward<Mask::from_output, T, A>
                       : (act ? backward<Mask::from_input, T, A> : backward<Mask::none, T, A>);
    run(at, data<T>(grad), data<T>(x), data<T>(y), data<A>(weight), data<A>(bias), data<A>(mean), data<A>(var), eps,
        mutable_data<T>(dx), dresidual ? mutable_data<T>(*dresidual) : nullptr, mutable_data<A>(dweight),
        mutable_data<A>(dbias));
  });
  return {dweight, dbias};
}

}  // namespace
}  // namespace auglocal

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  m.impl("batch_norm_act", TORCH_BOX(&auglocal::batch_norm_act));
  m.impl("batch_norm_act_apply_out", TORCH_BOX(&auglocal::batch_norm_act_apply_out));
  m.impl("batch_norm_act_backward_out", TORCH_BOX(&auglocal::batch_norm_act_backward_out));
}
