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

// The incoming gradient behind the ReLU's mask, of one value or of a tile; y: the output, where the mask comes from it.
template <Mask kMask, class V>
HD V masked(V grad, V y, V x, const Affine<V>& channel) {
  if (kMask == Mask::from_output) return relu_backward(grad, y);
  if (kMask == Mask::from_input) return relu_backward(grad, normalize(x, channel));
  return grad;
}

// The sums over g and g * (x - mean), g behind the mask; from_output also stores g.
template <Mask kMask, class T, class A>
VECTORISED void block_grad_sums(const T* grad, const T* x, const T* y, T* masked_grad, const Block block,
                                Affine<A> channel, double* sum, double* dot) {
  constexpr bool kFromOutput = kMask == Mask::from_output;
  double sums[kTile] = {}, dots[kTile] = {};
  const Affine<Lanes<A>> channels{Lanes<A>{} + channel.mean, Lanes<A>{} + channel.scale, Lanes<A>{} + channel.bias};
  Lanes<A> s = {}, d = {};
  for_each_span(
      block,
      [&](int64_t i, int64_t end) {
        for (; i + kTile <= end; i += kTile) {
          const Lanes<A> value = load_tile(x + i), out = kFromOutput ? load_tile(y + i) : Lanes<A>{};
          const Lanes<A> g = masked<kMask>(load_tile(grad + i), out, value, channels);
          if (kFromOutput) store_tile(masked_grad + i, g);
          s += g;
          d += g * (value - channels.mean);
        }
        for (int64_t l = 0; i + l < end; ++l) {
          const A value = load(x[i + l]), out = kFromOutput ? load(y[i + l]) : A(0);
          const A g = masked<kMask>(A(load(grad[i + l])), out, value, channel);
          if (kFromOutput) store(&masked_grad[i + l], g);
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
VECTORISED void block_input_grad(const T* grad, const T* x, T* dx, T* dresidual, const Block block, Affine<A> channel,
                                 InputGrad<A> back) {
  for (int64_t p = 0; p < block.planes; ++p) {
    const int64_t begin = p * block.stride;
#pragma omp simd
    for (int64_t i = begin; i < begin + block.length; ++i) {
      const A value = load(x[i]);
      const A g = masked<kMask>(A(load(grad[i])), A(0), value, channel);
      if (dresidual) store(&dresidual[i], g);
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
VECTORISED void rows_grad_sums(const T* grad, const T* x, const T* y, T* masked_grad, int64_t rows, int64_t channels,
                               const A* mean, const A* scale, const A* bias, double* sum, double* dot) {
  constexpr bool kFromOutput = kMask == Mask::from_output;
  for (int64_t begin = 0; begin < rows; begin += kRows)
    for_each_tile(channels, [&](int64_t c, auto width) INLINED {
      const Affine<Lanes<A>> tile{load_tile(mean + c, width), load_tile(scale + c, width), load_tile(bias + c, width)};
      Lanes<A> s = {}, d = {};
      for (int64_t r = begin; r < std::min(begin + kRows, rows); ++r) {
        const int64_t i = r * channels + c;
        const Lanes<A> value = load_tile(x + i, width), out = kFromOutput ? load_tile(y + i, width) : Lanes<A>{};
        const Lanes<A> g = masked<kMask>(load_tile(grad + i, width), out, value, tile);
        if (kFromOutput) store_tile(masked_grad + i, g, width);
        s += g;
        d += g * (value - tile.mean);
      }
      add<A>(sum + c, s, width);
      add<A>(dot + c, d, width);
    });
}

template <Mask kMask, class T, class A>
VECTORISED void rows_input_grad(const T* grad, const T* x, T* dx, T* dresidual, int64_t rows, int64_t channels,
                                const A* mean, const A* scale, const A* bias, const A* grad_mean,
                                const A* projection) {
  for (int64_t begin = 0; begin < rows; begin += kRows)
    for_each_tile(channels, [&](int64_t c, auto width) INLINED {
      const Affine<Lanes<A>> tile{load_tile(mean + c, width), load_tile(scale + c, width), load_tile(bias + c, width)};
      const InputGrad<Lanes<A>> back{tile.scale, load_tile(grad_mean + c, width), load_tile(projection + c, width)};
      for (int64_t r = begin; r < std::min(begin + kRows, rows); ++r) {
        const int64_t i = r * channels + c;
        const Lanes<A> value = load_tile(x + i, width);
        const Lanes<A> g = masked<kMask>(load_tile(grad + i, width), Lanes<A>{}, value, tile);
        if (dresidual) store_tile(dresidual + i, g, width);
        store_tile(dx + i, input_grad(g, value - tile.mean, back), width);
      }
    });
}

// ---- the ops ---------------------------------------------------------------------------------------

template <bool kResidual, bool kRelu, class T, class A>
void apply_channel(const Layout& at, int64_t c, const T* x, const T* residual, T* y, const Affine<A>& channel) {
  for_each_block(at, c, From::end, [&](const Block& block) {
    const T* added = kResidual ? residual + block.begin : nullptr;
    block_apply<kResidual, kRelu>(x + block.begin, added, y + block.begin, block, channel);
  });
}

template <bool kResidual, bool kRelu, class T, class A>
void apply(const Layout& at, const T* x, const T* residual, T* y, const Channels<A>& channels) {
  if (at.inner > 1)
    return over_channels(at, [&](int64_t c) { apply_channel<kResidual, kRelu>(at, c, x, residual, y, channels[c]); });
  over_row_tasks(at, From::end, [&](int64_t, int64_t row, int64_t rows) {
    const int64_t i = row * at.channels;
    rows_apply<kResidual, kRelu>(x + i, kResidual ? residual + i : nullptr, y + i, rows, at.channels,
                                 channels.mean.data(), channels.scale.data(), channels.bias.data());
  });
}

template <bool kResidual, bool kRelu, class T, class A>
void forward(const Layout& at, const T* x, const T* residual, T* y, const A* weight, const A* bias, A* mean, A* var,
             double eps) {
  if (at.inner > 1)
    // A channel's values are normalised right after they were summed, while they are in the cache.
    return over_channels(at, [&](int64_t c) {
      channel_statistics(at, c, x, &mean[c], &var[c]);
      apply_channel<kResidual, kRelu>(at, c, x, residual, y, make_affine(mean[c], var[c], weight[c], bias[c], eps));
    });
  row_statistics(at, x, mean, var);
  apply<kResidual, kRelu>(at, x, residual, y, Channels<A>(at.channels, mean, var, weight, bias, eps));
}

template <Mask kMask, class T, class A>
void backward(const Layout& at, const T* grad, const T* x, const T* y, const A* weight, const A* bias, const A* mean,
              const A* var, double eps, T* dx, T* dresidual, A* dweight, A* dbias) {
  const Channels<A> channels(at.channels, mean, var, weight, bias, eps);
  InputGrads<A> back(channels, at.count(), var, eps, dweight, dbias);
  // With y, the first pass leaves the masked gradient in dresidual, which so spares the second one y; or, where
  // dresidual is x itself, which the second pass needs, in dx.
  constexpr bool kFromOutput = kMask == Mask::from_output;
  constexpr Mask kLeft = kFromOutput ? Mask::none : kMask;
  T* const masked_grad = dresidual == x ? dx : dresidual;
  const T* const left = kFromOutput ? masked_grad : grad;
  if (masked_grad == dresidual) dresidual = nullptr;  // written by the first pass
  const auto at_offset = [](auto* from, int64_t i) { return from ? from + i : nullptr; };
  if (at.inner > 1) {
    over_channels(at, [&](int64_t c) {
      double sum = 0, dot = 0;
      for_each_block(at, c, From::start, [&](const Block& block) {
        const int64_t i = block.begin;
        block_grad_sums<kMask>(grad + i, x + i, at_offset(y, i), at_offset(masked_grad, i), block, channels[c], &sum,
                               &dot);
      });
      const InputGrad<A> of_channel = back.finish(c, sum, dot);
      for_each_block(at, c, From::end, [&](const Block& block) {
        const int64_t i = block.begin;
        block_input_grad<kLeft>(left + i, x + i, dx + i, at_offset(dresidual, i), block, channels[c], of_channel);
      });
    });
    return;
  }
  const int64_t tasks = row_tasks(at);
  std::vector<double> sums(tasks * at.channels), dots(tasks * at.channels);
  over_row_tasks(at, From::start, [&](int64_t task, int64_t row, int64_t rows) {
    const int64_t i = row * at.channels;
    rows_grad_sums<kMask>(grad + i, x + i, at_offset(y, i), at_offset(masked_grad, i), rows, at.channels,
                          channels.mean.data(), channels.scale.data(), channels.bias.data(),
                          &sums[task * at.channels], &dots[task * at.channels]);
  });
  back.finish(sums, dots);
  over_row_tasks(at, From::end, [&](int64_t, int64_t row, int64_t rows) {
    const int64_t i = row * at.channels;
    rows_input_grad<kLeft>(left + i, x + i, dx + i, at_offset(dresidual, i), rows, at.channels, channels.mean.data(),
                           channels.scale.data(), channels.bias.data(), back.grad_mean.data(), back.projection.data());
  });
}

std::tuple<Tensor, Tensor> batch_norm_statistics(const Tensor& given) {
  constexpr auto op = "batch_norm_statistics";
  require(given.dim() == 4, op, ": x must be (N, C, H, W), given a tensor of ", given.dim(), " dimensions");
  const Layout at = layout_of(given);
  const Tensor x = dense(given, at.format);
  Tensor mean = empty_statistics(x), var = empty_statistics(x);
  if (x.numel() == 0) return {zeroed(mean), zeroed(var)};
  AUGLOCAL_DISPATCH(op, x.scalar_type(), {
    using A = typename Compute<T>::type;
    statistics(at, data<T>(x), mutable_data<A>(mean), mutable_data<A>(var));
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
  if (x.numel() == 0) return {y, zeroed(mean), zeroed(var)};
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
  if (x.numel() == 0) return;
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
  if (x.numel() == 0) return {zeroed(dweight), zeroed(dbias)};
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

// The functional form, which autograd calls: in C++ because on small maps the same from Python takes a fifth of the time.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(const Tensor& grad, const Tensor& given,
                                                                   const Tensor& weight, const Tensor& bias,
                                                                   const Tensor& mean, const Tensor& var,
                                                                   const std::optional<Tensor>& y, double eps,
                                                                   bool act) {
  const MemoryFormat format = check_forward("batch_norm_act_backward", given, weight, bias, std::nullopt).format;
  const Tensor x = dense(given, format);
  Tensor dx = empty(x, x.sizes(), format);
  std::optional<Tensor> dresidual;
  if (y) dresidual = empty(x, x.sizes(), format);
  auto [dweight, dbias] = batch_norm_act_backward_out(dense(grad, format), x, weight, bias, mean, var, dense(y, format),
                                                      eps, act, dx, dresidual);
  return {dx, y ? *dresidual : empty(x, {0}), dweight, dbias};
}

}  // namespace
}  // namespace auglocal

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  AUGLOCAL_IMPL(m, batch_norm_statistics);
  AUGLOCAL_IMPL(m, batch_norm_act);
  AUGLOCAL_IMPL(m, batch_norm_act_apply_out);
  AUGLOCAL_IMPL(m, batch_norm_act_backward_out);
  AUGLOCAL_IMPL(m, batch_norm_act_backward);
}
