// CPU kernels of batch_norm_act.
#include "../ops/batch_norm_act.h"

#include "batch_norm.h"

namespace auglocal {
namespace {

// ---- blocks of planes: one channel, consecutive values (contiguous layout); pointers are to the block's first ----

template <bool kResidual, class Act, class T, class A>
VECTORISED void block_apply(Act act, const T* x, const T* residual, T* y, const Block block, Affine<A> channel) {
  for (int64_t p = 0; p < block.planes; ++p) {
    const int64_t begin = p * block.stride;
#pragma omp simd
    for (int64_t i = begin; i < begin + block.length; ++i) {
      A value = normalize(load(x[i]), channel);
      if (kResidual) value += load(residual[i]);
      store(&y[i], act.value(value));
    }
  }
}

// The gradient behind the activation; y: the output, where a ReLU's mask comes from it.
template <bool kFromOutput, Act kAct, class A>
HD A masked(const Activation<kAct, A>& act, A grad, A y, A x, const Affine<A>& channel) {
  return act.backward(grad, kFromOutput ? y : normalize(x, channel));
}
// The same of a tile.
template <bool kFromOutput, Act kAct, class A>
HD Lanes<A> masked(const Activation<kAct, A>& act, Lanes<A> grad, Lanes<A> y, Lanes<A> x,
                   const Affine<Lanes<A>>& channels) {
  if constexpr (kAct == Act::none) return grad;
  const Lanes<A> z = kFromOutput ? y : normalize(x, channels);
  if constexpr (kAct == Act::relu) return relu_backward(grad, z);
  A grads[kTile], of[kTile];
  store_tile(grads, grad);
  store_tile(of, z);
#pragma omp simd
  for (int64_t l = 0; l < kTile; ++l) grads[l] = act.backward(grads[l], of[l]);
  return load_tile(grads);
}

// The sums over g and g * (x - mean), g behind the activation; from the output also stores g.
template <bool kFromOutput, class Act, class T, class A>
VECTORISED void block_grad_sums(Act act, const T* grad, const T* x, const T* y, T* masked_grad, const Block block,
                                Affine<A> channel, double* sum, double* dot) {
  double sums[kTile] = {}, dots[kTile] = {};
  const Affine<Lanes<A>> channels{Lanes<A>{} + channel.mean, Lanes<A>{} + channel.scale, Lanes<A>{} + channel.bias};
  Lanes<A> s = {}, d = {};
  for_each_span(
      block,
      [&](int64_t i, int64_t end) INLINED {
        for (; i + kTile <= end; i += kTile) {
          const Lanes<A> value = load_tile(x + i), out = kFromOutput ? load_tile(y + i) : Lanes<A>{};
          const Lanes<A> g = masked<kFromOutput>(act, load_tile(grad + i), out, value, channels);
          if (kFromOutput) store_tile(masked_grad + i, g);
          s += g;
          d += g * (value - channels.mean);
        }
        for (int64_t l = 0; i + l < end; ++l) {
          const A value = load(x[i + l]), out = kFromOutput ? load(y[i + l]) : A(0);
          const A g = masked<kFromOutput>(act, A(load(grad[i + l])), out, value, channel);
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

template <bool kFromOutput, class Act, class T, class A>
VECTORISED void block_input_grad(Act act, const T* grad, const T* x, T* dx, T* dresidual, const Block block,
                                 Affine<A> channel, InputGrad<A> back) {
  for (int64_t p = 0; p < block.planes; ++p) {
    const int64_t begin = p * block.stride;
#pragma omp simd
    for (int64_t i = begin; i < begin + block.length; ++i) {
      const A value = load(x[i]);
      const A g = masked<false>(act, A(load(grad[i])), A(0), value, channel);
      if (kFromOutput && dresidual) store(&dresidual[i], g);
      store(&dx[i], input_grad(g, value - channel.mean, back));
    }
  }
}

// ---- rows: a tile of channels, values `stride` apart (channels_last layout) ------------------------

template <bool kResidual, class Act, class T, class A>
VECTORISED void rows_apply(Act act, const T* x, const T* residual, T* y, int64_t rows, int64_t channels,
                           Affines<A> affines) {
  const A *const mean = affines.mean, *const scale = affines.scale, *const bias = affines.bias;
  for (int64_t r = 0; r < rows; ++r, x += channels, y += channels, residual += kResidual ? channels : 0)
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      A value = normalize(load(x[c]), Affine<A>{mean[c], scale[c], bias[c]});
      if (kResidual) value += load(residual[c]);
      store(&y[c], act.value(value));
    }
}

template <bool kFromOutput, class Act, class T, class A>
VECTORISED void rows_grad_sums(Act act, const T* grad, const T* x, const T* y, T* masked_grad, int64_t rows,
                               int64_t channels, Affines<A> affines, double* sum, double* dot) {
  for (int64_t begin = 0; begin < rows; begin += kRows)
    for_each_tile(channels, [&](int64_t c, auto width) INLINED {
      const Affine<Lanes<A>> tile = load_tile(affines.from(c), width);
      Lanes<A> s = {}, d = {};
      for (int64_t r = begin; r < std::min(begin + kRows, rows); ++r) {
        const int64_t i = r * channels + c;
        const Lanes<A> value = load_tile(x + i, width), out = kFromOutput ? load_tile(y + i, width) : Lanes<A>{};
        const Lanes<A> g = masked<kFromOutput>(act, load_tile(grad + i, width), out, value, tile);
        if (kFromOutput) store_tile(masked_grad + i, g, width);
        s += g;
        d += g * (value - tile.mean);
      }
      add<A>(sum + c, s, width);
      add<A>(dot + c, d, width);
    });
}

template <bool kFromOutput, class Act, class T, class A>
VECTORISED void rows_input_grad(Act act, const T* grad, const T* x, T* dx, T* dresidual, int64_t rows, int64_t channels,
                                Affines<A> affines, InputGrads<A> grads) {
  for (int64_t begin = 0; begin < rows; begin += kRows)
    for_each_tile(channels, [&](int64_t c, auto width) INLINED {
      const Affine<Lanes<A>> tile = load_tile(affines.from(c), width);
      const InputGrad<Lanes<A>> back = load_tile(grads.from(c), width);
      for (int64_t r = begin; r < std::min(begin + kRows, rows); ++r) {
        const int64_t i = r * channels + c;
        const Lanes<A> value = load_tile(x + i, width);
        const Lanes<A> g = masked<false>(act, load_tile(grad + i, width), Lanes<A>{}, value, tile);
        if (kFromOutput && dresidual) store_tile(dresidual + i, g, width);
        store_tile(dx + i, input_grad(g, value - tile.mean, back), width);
      }
    });
}

// ---- the ops ---------------------------------------------------------------------------------------

template <bool kResidual, class Act, class T, class A = typename Compute<T>::type>
void apply_channel(const Layout& at, Act act, int64_t c, const ForwardArgs<T>& args, const Affine<A>& channel) {
  for_each_block(at, c, From::end, [&](const Block& block) {
    const T* added = kResidual ? args.residual + block.begin : nullptr;
    block_apply<kResidual>(act, args.x + block.begin, added, args.y + block.begin, block, channel);
  });
}

template <bool kResidual, class Act, class T, class A = typename Compute<T>::type>
void apply(const Layout& at, Act act, const ForwardArgs<T>& args) {
  const Channels<A> channels(at.channels, args.norm());
  const Affines<A> affines = channels.affines();
  if (at.inner > 1)
    return over_channels(at, [&](int64_t c) { apply_channel<kResidual>(at, act, c, args, affines[c]); });
  over_row_tasks(at, From::end, [&](int64_t, int64_t row, int64_t rows) {
    const int64_t i = row * at.channels;
    const T* added = kResidual ? args.residual + i : nullptr;
    rows_apply<kResidual>(act, args.x + i, added, args.y + i, rows, at.channels, affines);
  });
}

template <bool kResidual, class Act, class T>
void forward(const Layout& at, Act act, const ForwardArgs<T>& args) {
  if (at.inner > 1)
    // A channel's values are normalised right after they were summed, while they are in the cache.
    return over_channels(at, [&](int64_t c) {
      channel_statistics(at, c, args.x, &args.mean[c], &args.var[c]);
      apply_channel<kResidual>(at, act, c, args, args.norm().affine(c));
    });
  row_statistics(at, args.x, args.mean, args.var);
  apply<kResidual>(at, act, args);
}

// The two passes of the backward over a map: both, or either alone.
template <bool kFromOutput, class Given, class T, class A = typename Compute<T>::type>
class Backward {
 public:
  Backward(const Layout& at, Given act, const BackwardArgs<T>& args)
      : at_(at), act_(act), left_act_{act.slope}, args_(args), left_(kFromOutput ? args.masked : args.grad),
        dresidual_(args.dresidual == args.masked ? nullptr : args.dresidual),
        channels_(at, args.norm, args.dweight, args.dbias, args.sums), affines_(channels_.affines()),
        back_(channels_.input_grads()) {}

  void both() {
    if (at_.inner > 1)
      // A channel's gradient is made right after its sums, while its values are in the cache.
      return over_channels(at_, [&](int64_t c) {
        channel_sums(c);
        channel_input_grad(c);
      });
    sums();
    input_grad();
  }
  void sums() {
    if (at_.inner > 1) return over_channels(at_, [&](int64_t c) { channel_sums(c); });
    const int64_t tasks = row_tasks(at_), channels = at_.channels;
    std::vector<double> sums(tasks * channels), dots(tasks * channels);
    over_row_tasks(at_, From::start, [&](int64_t task, int64_t row, int64_t rows) {
      const int64_t i = row * channels;
      rows_grad_sums<kFromOutput>(act_, args_.grad + i, args_.x + i, at_offset(args_.y, i), at_offset(args_.masked, i),
                                  rows, channels, affines_, &sums[task * channels], &dots[task * channels]);
    });
    channels_.finish(sums, dots);
  }
  void input_grad(const double* means) {
    channels_.given(means);
    if (at_.inner > 1) return over_channels(at_, [&](int64_t c) { channel_input_grad(c); });
    input_grad();
  }

 private:
  template <class Pointer>
  static Pointer at_offset(Pointer from, int64_t i) {
    return from ? from + i : nullptr;
  }
  void channel_sums(int64_t c) {
    double sum = 0, dot = 0;
    for_each_block(at_, c, From::start, [&](const Block& block) {
      const int64_t i = block.begin;
      block_grad_sums<kFromOutput>(act_, args_.grad + i, args_.x + i, at_offset(args_.y, i), at_offset(args_.masked, i),
                                   block, affines_[c], &sum, &dot);
    });
    channels_.finish(c, sum, dot);
  }
  void channel_input_grad(int64_t c) {
    for_each_block(at_, c, From::end, [&](const Block& block) {
      const int64_t i = block.begin;
      block_input_grad<kFromOutput>(left_act_, left_ + i, args_.x + i, args_.dx + i, at_offset(dresidual_, i), block,
                                    affines_[c], back_[c]);
    });
  }
  void input_grad() {  // of rows
    over_row_tasks(at_, From::end, [&](int64_t, int64_t row, int64_t rows) {
      const int64_t i = row * at_.channels;
      rows_input_grad<kFromOutput>(left_act_, left_ + i, args_.x + i, args_.dx + i, at_offset(dresidual_, i), rows,
                                   at_.channels, affines_, back_);
    });
  }

  const Layout& at_;
  const Given act_;
  // With y, the first pass leaves the masked gradient, which so spares the second one y, and often is dresidual.
  const std::conditional_t<kFromOutput, Activation<Act::none, A>, Given> left_act_;
  const BackwardArgs<T>& args_;
  const T* const left_;
  T* const dresidual_;
  BackwardChannels<A> channels_;
  const Affines<A> affines_;
  const InputGrads<A> back_;
};

struct Kernels : Cpu {
  using Cpu::Cpu;

  template <class T, class A>
  void statistics(const Layout& at, const T* x, A* mean, A* var) const {
    auglocal::statistics(at, x, mean, var);
  }
  template <class T>
  void forward(const Layout& at, const ForwardArgs<T>& args) const {
    with_activation(args.act, args.slope, [&](auto act) {
      args.residual ? auglocal::forward<true>(at, act, args) : auglocal::forward<false>(at, act, args);
    });
  }
  template <class T>
  void apply(const Layout& at, const ForwardArgs<T>& args) const {
    with_activation(args.act, args.slope, [&](auto act) {
      args.residual ? auglocal::apply<true>(at, act, args) : auglocal::apply<false>(at, act, args);
    });
  }
  template <class T>
  void backward(const Layout& at, const BackwardArgs<T>& args) const {
    with_passes(at, args, [](auto& passes) { passes.both(); });
  }
  template <class T>
  void backward_sums(const Layout& at, const BackwardArgs<T>& args) const {
    with_passes(at, args, [](auto& passes) { passes.sums(); });
  }
  template <class T>
  void backward_apply(const Layout& at, const BackwardArgs<T>& args, const double* means) const {
    with_passes(at, args, [means](auto& passes) { passes.input_grad(means); });
  }
  template <class T, class Run, class A = typename Compute<T>::type>
  void with_passes(const Layout& at, const BackwardArgs<T>& args, const Run& run) const {
    using Relu = Activation<Act::relu, A>;
    if (args.y) {
      Backward<true, Relu, T> passes(at, Relu{}, args);
      return run(passes);
    }
    with_activation(args.act, args.slope, [&](auto act) {
      Backward<false, decltype(act), T> passes(at, act, args);
      run(passes);
    });
  }
};

}  // namespace
}  // namespace auglocal

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) { auglocal::implement_batch_norm_act<auglocal::Kernels>(m); }
