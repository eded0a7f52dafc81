// CPU kernels of batch_norm_act.
#include "batch_norm.h"

namespace auglocal {
namespace {

// ---- blocks of planes: one channel, consecutive values (contiguous layout); pointers are to the block's first ----

template <bool kResidual, bool kRelu, class T, class A>
VECTORISED void block_apply(const T* x, const T* residual, T* y, const Block block, Affine<A> channel) {
  for (int64_t p = 0; p < block.planes; ++p) {
    const int64_t begin = p * block.stride;
#pragma omp simd
    for (int64_t i = begin; i < begin + block.length; ++i) {
      A value = normalize(load(x[i]), channel);
      if (kResidual) value += load(residual[i]);
      store(&y[i], kRelu ? relu(value) : value);
    }
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

// The same for a tile of values and their gradients, given x - mean.
template <Mask kMask, class T, class A>
HD Lanes<A> masked_tile(Lanes<A> g, const T* y, int64_t width, Lanes<A> centred, Lanes<A> scale, Lanes<A> bias) {
  if (kMask == Mask::from_input) return centred * scale + bias <= A(0) ? Lanes<A>{} : g;
  if (kMask == Mask::from_output) return load_tile(y, width) <= A(0) ? Lanes<A>{} : g;
  return g;
}

template <Mask kMask, class T, class A>
VECTORISED void block_grad_sums(const T* grad, const T* x, const T* y, const Block block, Affine<A> channel,
                                double* sum, double* dot) {
  double sums[kTile] = {}, dots[kTile] = {};
  const Lanes<A> scale = Lanes<A>{} + channel.scale, bias = Lanes<A>{} + channel.bias;
  Lanes<A> s = {}, d = {};
  for_each_span(
      block,
      [&](int64_t i, int64_t end) {
        for (; i + kTile <= end; i += kTile) {
          const Lanes<A> centred = load_tile(x + i) - channel.mean;
          const Lanes<A> g = masked_tile<kMask, T, A>(load_tile(grad + i), y + i, kTile, centred, scale, bias);
          s += g;
          d += g * centred;
        }
        for (int64_t l = 0; i + l < end; ++l) {
          const A value = load(x[i + l]);
          const A g = masked<kMask>(grad, y, i + l, value, channel);
          s[l] += g;
          d[l] += g * (value - channel.mean);
        }
      },
      [&] {
        add<A>(sums, s);
        add<A>(dots, d);
        s = d = Lanes<A>{};
      });
  for (int64_t l = 0; l < kTile; ++l) *sum += sums[l], *dot += dots[l];
}

template <Mask kMask, class T, class A>
VECTORISED void block_input_grad(const T* grad, const T* x, const T* y, T* dx, T* dresidual, const Block block,
                                 Affine<A> channel, InputGrad<A> back) {
  for (int64_t p = 0; p < block.planes; ++p) {
    const int64_t begin = p * block.stride;
#pragma omp simd
    for (int64_t i = begin; i < begin + block.length; ++i) {
      const A value = load(x[i]);
      const A g = masked<kMask>(grad, y, i, value, channel);
      if (kMask == Mask::from_output) store(&dresidual[i], g);
      store(&dx[i], input_grad(g, value - channel.mean, back));
    }
  }
}

// ---- rows: a tile of channels, values `stride` apart (channels_last layout) ------------------------

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

template <Mask kMask, class T, class A>
HD void tile_grad_sums(const T* grad, const T* x, const T* y, int64_t rows, int64_t stride, int64_t width,
                       const A* mean, const A* scale, const A* bias, double* sum, double* dot) {
  const Lanes<A> means = load_tile(mean, width), scales = load_tile(scale, width), biases = load_tile(bias, width);
  double sums[kTile] = {}, dots[kTile] = {};
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    Lanes<A> s = {}, d = {};
    for (int64_t r = begin; r < std::min(begin + kRows, rows); ++r) {
      const int64_t i = r * stride;
      const Lanes<A> centred = load_tile(x + i, width) - means;
      const Lanes<A> g = masked_tile<kMask, T, A>(load_tile(grad + i, width), y + i, width, centred, scales, biases);
      s += g;
      d += g * centred;
    }
    add<A>(sums, s);
    add<A>(dots, d);
  }
  for (int64_t c = 0; c < width; ++c) sum[c] += sums[c], dot[c] += dots[c];
}

template <Mask kMask, class T, class A>
VECTORISED void rows_grad_sums(const T* grad, const T* x, const T* y, int64_t rows, int64_t channels,
                               const A* mean, const A* scale, const A* bias, double* sum, double* dot) {
  for (int64_t c = 0; c < channels; c += kTile) {
    const T* masks = kMask == Mask::from_output ? y + c : nullptr;
    tile_grad_sums<kMask>(grad + c, x + c, masks, rows, channels, std::min(kTile, channels - c), mean + c, scale + c,
                          bias + c, sum + c, dot + c);
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

template <bool kResidual, bool kRelu, class T, class A>
void apply_channel(const Layout& at, int64_t c, const T* x, const T* residual, T* y, const Affine<A>& channel) {
  for_each_block(at, c, [&](const Block& block) {
    const T* added = kResidual ? residual + block.begin : nullptr;
    block_apply<kResidual, kRelu>(x + block.begin, added, y + block.begin, block, channel);
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
  if (at.inner > 1)
    // A channel's values are normalised right after they were summed, while they are in the cache.
    return over_channels(at, [&](int64_t c) {
      store_moments(channel_moments<A>(at, c, x), &mean[c], &var[c]);
      apply_channel<kResidual, kRelu>(at, c, x, residual, y, affine(mean[c], var[c], weight[c], bias[c], eps));
    });
  const std::vector<Moments<double>> moments = row_moments<A>(at, x);
  for (int64_t c = 0; c < at.channels; ++c) store_moments(moments[c], &mean[c], &var[c]);
  apply<kResidual, kRelu>(at, x, residual, y, Channels<A>(at.channels, mean, var, weight, bias, eps));
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
      for_each_block(at, c, [&](const Block& block) {
        const int64_t i = block.begin;
        block_grad_sums<kMask>(grad + i, x + i, kFromOutput ? y + i : nullptr, block, channels[c], &sum, &dot);
      });
      finish(c, sum, dot);
      const InputGrad<A> back{channels.scale[c], grad_mean[c], projection[c]};
      for_each_block(at, c, [&](const Block& block) {
        const int64_t i = block.begin;
        block_input_grad<kMask>(grad + i, x + i, kFromOutput ? y + i : nullptr, dx + i,
                                kFromOutput ? dresidual + i : nullptr, block, channels[c], back);
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

std::tuple<Tensor, Tensor> batch_norm_statistics(const Tensor& given) {
  constexpr auto op = "batch_norm_statistics";
  STD_TORCH_CHECK(given.dim() == 4, op, ": x must be (N, C, H, W), given a tensor of ", given.dim(), " dimensions");
  const Layout at = layout_of(given);
  const Tensor x = dense(given, at.format);
  Tensor mean = empty_statistics(x), var = empty_statistics(x);
  AUGLOCAL_DISPATCH(op, x.scalar_type(), {
    using A = typename Compute<T>::type;
    A *means = mutable_data<A>(mean), *vars = mutable_data<A>(var);
    if (at.inner > 1) {
      over_channels(
          at, [&](int64_t c) { store_moments(channel_moments<A>(at, c, data<T>(x)), &means[c], &vars[c]); });
    } else {
      const auto moments = row_moments<A>(at, data<T>(x));
      for (int64_t c = 0; c < at.channels; ++c) store_moments(moments[c], &means[c], &vars[c]);
    }
  });
  return {mean, var};
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
  m.impl("batch_norm_statistics", TORCH_BOX(&auglocal::batch_norm_statistics));
  m.impl("batch_norm_act", TORCH_BOX(&auglocal::batch_norm_act));
  m.impl("batch_norm_act_apply_out", TORCH_BOX(&auglocal::batch_norm_act_apply_out));
  m.impl("batch_norm_act_backward_out", TORCH_BOX(&auglocal::batch_norm_act_backward_out));
}
