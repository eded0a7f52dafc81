// CUDA kernels of batch_norm_act: each op is one kernel that, where it can, reads its input only once.
#include "teams.cuh"

namespace auglocal {
namespace {

template <class A, class T>
struct ForwardArgs {
  const T *x, *residual;  // residual: may be null
  T* y;                   // null: only the statistics are wanted
  const A *weight, *bias;
  A *mean, *var;  // written by the forward, read by the apply kernel
  double eps;
  bool relu;
};

// act(BN(x) + residual) for a thread's share, the first `kept` vectors from shared memory. y may be x or residual.
template <class T, int V, Order kOrder, class A>
__device__ __forceinline__ void apply_share(const Plan& plan, const Share<V, kOrder>& share,
                                            const ForwardArgs<A, T>& args, const Affine<A>* affines, int kept) {
  using Vec = Vector<T, V>;
  Affine<A> affine[kLanes<kOrder, V>];
#pragma unroll
  for (int i = 0; i < kLanes<kOrder, V>; ++i) affine[i] = affines[share.in_group + i];
  struct Loaded {
    Vec x, residual;
  };
  for_each_vector<kInFlight<Vec, 3>, true>(
      plan, share,
      [&](int64_t offset, int index, int64_t) {
        Loaded loaded;
        loaded.x = index < kept ? slot<Vec>(index) : read<V>(args.x + offset);
        if (args.residual) loaded.residual = read<V>(args.residual + offset);
        return loaded;
      },
      [&](int64_t offset, int, const Loaded& loaded) {
        Vec y{};
#pragma unroll
        for (int i = 0; i < V; ++i) {
          A value = normalize(get<A>(loaded.x, i), affine[lane_of<kOrder>(i)]);
          if (args.residual) value += get<A>(loaded.residual, i);
          set<A>(y, i, args.relu ? relu(value) : value);
        }
        write<V>(args.y + offset, y);
      });
}

template <class T, int V, Order kOrder, class A = typename Compute<T>::type>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    forward_kernel(const Plan plan, const ForwardArgs<A, T> args, double2* partial, unsigned* arrivals) {
  using Vec = Vector<T, V>;
  SHARED(origins, kMaxChannels, A);
  SHARED(affines, kMaxChannels, Affine<A>);
  Team team(plan, partial, arrivals);
  for (int64_t group = team.index; group < plan.groups; group += plan.teams) {
    const Share<V, kOrder> share(plan, group, team.part);
    // Thread c also looks after channel c of the group.
    const int64_t channel = share.channel + threadIdx.x;
    const bool owner = threadIdx.x < plan.group_channels && channel < plan.channels;
    const A origin = owner ? A(load(args.x[share.base + threadIdx.x])) : A(0);

    // Sums of x - pivot and of its square: the pivot, the thread's first value, keeps a large mean out.
    Vec pivot{};
    A first[V] = {}, second[V] = {};
    for_each_vector<kInFlight<Vec, 6>, false>(
        plan, share, [&](int64_t offset, int, int64_t) { return read<V>(args.x + offset); },
        [&](int64_t, int index, const Vec& x) {
          if (index < plan.kept) slot<Vec>(index) = x;
          if (index == 0) pivot = x;
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const A d = get<A>(x, i) - get<A>(pivot, i);
            first[i] += d;
            second[i] = mul_add(d, d, second[i]);
          }
        });

    // The same sums about the channel's first value instead, where all threads' can be added.
    if (owner) origins[threadIdx.x] = origin;
    __syncthreads();
    const bool affine = owner && args.y;
    const A weight = affine ? args.weight[channel] : A(0), bias = affine ? args.bias[channel] : A(0);
    double2 sums[kLanes<kOrder, V>] = {};
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (share.vectors == 0) continue;
      const int lane = lane_of<kOrder>(i);
      const double n = share.vectors, d = double(get<A>(pivot, i)) - double(origins[share.in_group + lane]);
      add(sums[lane], {first[i] + n * d, second[i] + d * (2 * double(first[i]) + n * d)});
    }
    const double2 sum = team.sum(group, share, sums, args.y != nullptr);
    if (owner) {
      const double count = plan.count, shift = sum.x / count;
      const double variance = sum.y / count - shift * shift;
      const A mean = A(double(origin) + shift), var = A(variance < 0 ? 0 : variance);  // NaN stays
      affines[threadIdx.x] = make_affine(mean, var, weight, bias, args.eps);
      if (team.writes) {
        args.mean[channel] = mean;
        args.var[channel] = var;
      }
    }
    __syncthreads();

    if (args.y) apply_share(plan, share, args, affines, plan.kept);
  }
}

// The elementwise part alone, with statistics that are known already.
template <class T, int V, Order kOrder, class A = typename Compute<T>::type>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    apply_kernel(const Plan plan, const ForwardArgs<A, T> args, double2*, unsigned*) {
  SHARED(affines, kMaxChannels, Affine<A>);
  for (int64_t group = blockIdx.x / plan.parts; group < plan.groups; group += plan.teams) {
    const Share<V, kOrder> share(plan, group, blockIdx.x % plan.parts);
    const int64_t channel = share.channel + threadIdx.x;
    __syncthreads();  // the last group's constants have been read
    if (threadIdx.x < plan.group_channels && channel < plan.channels)
      affines[threadIdx.x] = make_affine(args.mean[channel], args.var[channel], args.weight[channel],
                                         args.bias[channel], args.eps);
    __syncthreads();
    apply_share(plan, share, args, affines, 0);
  }
}

template <class A, class T>
struct BackwardArgs {
  const T *grad, *x, *y;  // y, dresidual, masked: only for Mask::from_output
  const A *weight, *bias, *mean, *var;
  T *dx, *dresidual;  // may be grad, x or y themselves: each value is written by the thread that read it
  T* masked;          // where the masked gradient waits for the second pass: dresidual, or dx where dresidual is x
  A *dweight, *dbias;
  double eps;
};

template <class T, int V, Order kOrder, Mask kMask, class A = typename Compute<T>::type>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    backward_kernel(const Plan plan, const BackwardArgs<A, T> args, double2* partial, unsigned* arrivals) {
  using Vec = Vector<T, V>;
  constexpr bool kFromOutput = kMask == Mask::from_output;
  SHARED(affines, kMaxChannels, Affine<A>);
  SHARED(backs, kMaxChannels, InputGrad<A>);
  Team team(plan, partial, arrivals);
  for (int64_t group = team.index; group < plan.groups; group += plan.teams) {
    const Share<V, kOrder> share(plan, group, team.part);
    const int64_t channel = share.channel + threadIdx.x;
    const bool owner = threadIdx.x < plan.group_channels && channel < plan.channels;
    if (owner)
      affines[threadIdx.x] = make_affine(args.mean[channel], args.var[channel], args.weight[channel],
                                         args.bias[channel], args.eps);
    __syncthreads();
    Affine<A> affine[kLanes<kOrder, V>];
#pragma unroll
    for (int i = 0; i < kLanes<kOrder, V>; ++i) affine[i] = affines[share.in_group + i];

    // The masked gradient; where the mask is y's, dresidual already is.
    const auto masked = [&](A grad, A x, const Affine<A>& at) {
      return kMask == Mask::from_input ? relu_backward(grad, normalize(x, at)) : grad;
    };
    struct Loaded {
      Vec grad, x, y;
    };
    A sum[V] = {}, dot[V] = {};  // of g and of g * (x - mean)
    for_each_vector<kInFlight<Vec, 4>, false>(
        plan, share,
        [&](int64_t offset, int, int64_t) {
          Loaded loaded;
          loaded.grad = read<V>(args.grad + offset);
          loaded.x = read<V>(args.x + offset);
          if (kFromOutput) loaded.y = read<V>(args.y + offset);
          return loaded;
        },
        [&](int64_t offset, int index, Loaded& loaded) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const Affine<A>& at = affine[lane_of<kOrder>(i)];
            const A x = get<A>(loaded.x, i);
            A g = get<A>(loaded.grad, i);
            if (kFromOutput) {
              g = relu_backward(g, get<A>(loaded.y, i));
              set<A>(loaded.grad, i, g);
            }
            g = masked(g, x, at);
            sum[i] += g;
            dot[i] = mul_add(g, x - at.mean, dot[i]);
          }
          if (kFromOutput) write<V>(args.masked + offset, loaded.grad);
          if (index >= plan.kept) return;
          slot<Vec>(2 * index) = loaded.grad;
          slot<Vec>(2 * index + 1) = loaded.x;
        });

    double2 sums[kLanes<kOrder, V>] = {};
#pragma unroll
    for (int i = 0; i < V; ++i) add(sums[lane_of<kOrder>(i)], {double(sum[i]), double(dot[i])});
    const double variance = owner ? double(args.var[channel]) : 0;
    const double2 total = team.sum(group, share, sums);
    if (owner) {
      const ChannelGrad<A> of_channel =
          channel_grad(total.x, total.y, double(plan.count), variance, affines[threadIdx.x].scale, args.eps);
      backs[threadIdx.x] = of_channel.back;
      if (team.writes) {
        args.dbias[channel] = of_channel.dbias;
        args.dweight[channel] = of_channel.dweight;
      }
    }
    __syncthreads();

    InputGrad<A> back[kLanes<kOrder, V>];
#pragma unroll
    for (int i = 0; i < kLanes<kOrder, V>; ++i) back[i] = backs[share.in_group + i];
    for_each_vector<kInFlight<Vec, 4>, true>(
        plan, share,
        [&](int64_t offset, int index, int64_t) {
          Loaded loaded;
          const bool kept = index < plan.kept;
          loaded.grad = kept ? slot<Vec>(2 * index) : read<V>((kFromOutput ? args.masked : args.grad) + offset);
          loaded.x = kept ? slot<Vec>(2 * index + 1) : read<V>(args.x + offset);
          return loaded;
        },
        [&](int64_t offset, int, const Loaded& loaded) {
          Vec dx{};
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const int lane = lane_of<kOrder>(i);
            const A x = get<A>(loaded.x, i);
            const A g = masked(get<A>(loaded.grad, i), x, affine[lane]);
            set<A>(dx, i, input_grad(g, x - affine[lane].mean, back[lane]));
          }
          write<V>(args.dx + offset, dx);
          if (kFromOutput && args.dresidual != args.masked) write<V>(args.dresidual + offset, loaded.grad);
        });
  }
}

// ---- the ops ---------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> batch_norm_statistics(const Tensor& given) {
  constexpr auto op = "batch_norm_statistics";
  require(given.dim() == 4, op, ": x must be (N, C, H, W), given a tensor of ", given.dim(), " dimensions");
  const Layout at = layout_of(given);
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const Tensor x = dense(given, at.format);
  Tensor mean = empty_statistics(x), var = empty_statistics(x);
  if (x.numel() == 0) return {zeroed(mean), zeroed(var)};
  AUGLOCAL_DISPATCH(op, x.scalar_type(), {
    using A = typename Compute<T>::type;
    const ForwardArgs<A, T> args{data<T>(x), nullptr, nullptr, nullptr, nullptr, mutable_data<A>(mean),
                                 mutable_data<A>(var), 0, false};
    // batch_norm_act's kernel, vectors and plan, so that the sums are its sums to the bit.
    with_shape<T>(at, {args.x}, [&](auto width, auto order) {
      launch<forward_kernel<T, width, order>, width, order, T>(at, 1, x, mean, args, false);
    });
  });
  return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(const Tensor& given, const Tensor& weight, const Tensor& bias,
                                                  const std::optional<Tensor>& given_residual, double eps, bool act) {
  constexpr auto op = "batch_norm_act";
  const Layout at = check_forward(op, given, weight, bias, given_residual);
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const Tensor x = dense(given, at.format);
  std::optional<Tensor> residual = dense(given_residual, at.format);
  // The vectors, and with them the order of the sums, are to follow from x alone.
  if (residual && !aligned({residual->const_data_ptr()}, 16)) residual = torch::stable::clone(*residual);
  Tensor y = empty(x, x.sizes(), at.format), mean = empty(weight, weight.sizes()), var = empty(weight, weight.sizes());
  if (x.numel() == 0) return {y, zeroed(mean), zeroed(var)};
  AUGLOCAL_DISPATCH(op, x.scalar_type(), {
    using A = typename Compute<T>::type;
    const ForwardArgs<A, T> args{data<T>(x), data<T>(residual), mutable_data<T>(y),
                                 data<A>(weight), data<A>(bias), mutable_data<A>(mean), mutable_data<A>(var), eps, act};
    with_shape<T>(at, {args.x, args.residual, args.y}, [&](auto width, auto order) {
      launch<forward_kernel<T, width, order>, width, order, T>(at, 1, x, weight, args);
    });
  });
  return {y, mean, var};
}

void batch_norm_act_apply_out(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                              const Tensor& var, const std::optional<Tensor>& residual, double eps, bool act,
                              Tensor out) {
  constexpr auto op = "batch_norm_act_apply_out";
  const Layout at = check_apply(op, x, weight, bias, mean, var, residual, out);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (x.numel() == 0) return;
  AUGLOCAL_DISPATCH(op, x.scalar_type(), {
    using A = typename Compute<T>::type;
    const ForwardArgs<A, T> args{data<T>(x),    data<T>(residual),     mutable_data<T>(out),  data<A>(weight),
                                 data<A>(bias), mutable_data<A>(mean), mutable_data<A>(var), eps, act};
    with_shape<T>(at, {args.x, args.residual, args.y}, [&](auto width, auto order) {
      launch<apply_kernel<T, width, order>, width, order, T>(at, 0, x, weight, args);
    });
  });
}

std::tuple<Tensor, Tensor> batch_norm_act_backward_out(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                       const Tensor& bias, const Tensor& mean, const Tensor& var,
                                                       const std::optional<Tensor>& y, double eps, bool act, Tensor dx,
                                                       const std::optional<Tensor>& dresidual) {
  constexpr auto op = "batch_norm_act_backward_out";
  const Layout at = check_backward(op, grad, x, weight, bias, mean, var, y, dx, dresidual);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor dweight = empty(weight, weight.sizes()), dbias = empty(weight, weight.sizes());
  if (x.numel() == 0) return {zeroed(dweight), zeroed(dbias)};
  AUGLOCAL_DISPATCH(op, x.scalar_type(), {
    using A = typename Compute<T>::type;
    T *const into_dx = mutable_data<T>(dx), *const into_dresidual = dresidual ? mutable_data<T>(*dresidual) : nullptr;
    const BackwardArgs<A, T> args{data<T>(grad), data<T>(x), data<T>(y), data<A>(weight), data<A>(bias),
                                  data<A>(mean), data<A>(var), into_dx, into_dresidual,
                                  into_dresidual == data<T>(x) ? into_dx : into_dresidual,
                                  mutable_data<A>(dweight), mutable_data<A>(dbias), eps};
    with_shape<T>(at, {args.grad, args.x, args.y, args.dx, args.dresidual}, [&](auto width, auto order) {
      const auto run = [&](auto mask) {
        launch<backward_kernel<T, width, order, mask>, width, order, T>(at, 2, x, weight, args);
      };
      if (y) return run(std::integral_constant<Mask, Mask::from_output>{});
      if (act) return run(std::integral_constant<Mask, Mask::from_input>{});
      run(std::integral_constant<Mask, Mask::none>{});
    });
  });
  return {dweight, dbias};
}

}  // namespace
}  // namespace auglocal

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CUDA, m) {
  AUGLOCAL_IMPL(m, batch_norm_statistics);
  AUGLOCAL_IMPL(m, batch_norm_act);
  AUGLOCAL_IMPL(m, batch_norm_act_apply_out);
  AUGLOCAL_IMPL(m, batch_norm_act_backward_out);
}
