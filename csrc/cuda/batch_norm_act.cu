// CUDA kernels of batch_norm_act: each op is one kernel that, where it can, reads its input only once.
#include "../ops/batch_norm_act.h"
#include "teams.cuh"

namespace auglocal {
namespace {

// act(BN(x) + residual) for a thread's share, the first `kept` vectors from shared memory. y may be x or residual.
// with_act: calls what it is given with the activation.
template <class T, int V, Order kOrder, class A, class WithAct>
__device__ __forceinline__ void apply_share(const Plan& plan, const Share<V, kOrder>& share, const ForwardArgs<T>& args,
                                            const Affine<A>* affines, int kept, const WithAct& with_act) {
  using Vec = Vector<T, V>;
  Affine<A> affine[kLanes<kOrder, V>];
#pragma unroll
  for (int i = 0; i < kLanes<kOrder, V>; ++i) affine[i] = affines[share.in_group + i];
  struct Loaded {
    Vec x, residual;
  };
  with_act([&](auto act) {
    for_each_vector<kInFlight<Vec, act.kCheap ? 3 : 2>, true>(
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
            set<A>(y, i, act.value(value));
          }
          write<V>(args.y + offset, y);
        });
  });
}

// What the forward kernel takes: another activation's code would need the registers of the sums.
template <class A>
struct ReluOrNone {
  static constexpr bool kCheap = true;
  bool relu;
  __device__ A value(A z) const { return relu ? auglocal::relu(z) : z; }
};

template <class T, int V, Order kOrder, class A = typename Compute<T>::type>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    forward_kernel(const Plan plan, const ForwardArgs<T> args, double2* partial, unsigned* arrivals) {
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

    if (args.y)
      apply_share(plan, share, args, affines, plan.kept,
                  [&](const auto& run) { run(ReluOrNone<A>{args.act == Act::relu}); });
  }
}

// The elementwise part alone, with statistics that are known already.
template <class T, int V, Order kOrder, class A = typename Compute<T>::type>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    apply_kernel(const Plan plan, const ForwardArgs<T> args, double2*, unsigned*) {
  SHARED(affines, kMaxChannels, Affine<A>);
  for (int64_t group = blockIdx.x / plan.parts; group < plan.groups; group += plan.teams) {
    const Share<V, kOrder> share(plan, group, blockIdx.x % plan.parts);
    const int64_t channel = share.channel + threadIdx.x;
    __syncthreads();  // the last group's constants have been read
    if (threadIdx.x < plan.group_channels && channel < plan.channels)
      affines[threadIdx.x] = args.norm().affine(channel);
    __syncthreads();
    apply_share(plan, share, args, affines, 0, [&](const auto& run) { with_activation(args.act, args.slope, run); });
  }
}

// ---- the backward: what its kernels, of both passes and of either alone, are made of ------------------

// Calls run(the activation that the gradient passes, recomputed from x).
template <Mask kMask, class T, class Run, class A = typename Compute<T>::type>
__device__ __forceinline__ void with_derivative(const BackwardArgs<T>& args, const Run& run) {
  if constexpr (kMask == Mask::activation)
    with_activation(args.act, args.slope, run);
  else
    run(Activation<kMask == Mask::from_input ? Act::relu : Act::none, A>{});
}

template <class Vec>
struct GradLoads {
  Vec grad, x, y;
};

// The sums over a thread's share, of g and of g * (x - mean); keeps the first vectors in shared memory.
template <Mask kMask, class T, int V, Order kOrder, class A>
__device__ __forceinline__ void grad_sums(const Plan& plan, const Share<V, kOrder>& share, const BackwardArgs<T>& args,
                                          const Affine<A> (&affine)[kLanes<kOrder, V>],
                                          double2 (&sums)[kLanes<kOrder, V>]) {
  using Vec = Vector<T, V>;
  constexpr bool kFromOutput = kMask == Mask::from_output;
  A sum[V] = {}, dot[V] = {};
  with_derivative<kMask>(args, [&](auto act) {
    for_each_vector<kInFlight<Vec, act.kCheap ? 4 : 2>, false>(
        plan, share,
        [&](int64_t offset, int, int64_t) {
          GradLoads<Vec> loaded;
          loaded.grad = read<V>(args.grad + offset);
          loaded.x = read<V>(args.x + offset);
          if (kFromOutput) loaded.y = read<V>(args.y + offset);
          return loaded;
        },
        [&](int64_t offset, int index, GradLoads<Vec>& loaded) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const Affine<A>& at = affine[lane_of<kOrder>(i)];
            const A x = get<A>(loaded.x, i);
            A g = get<A>(loaded.grad, i);
            if (kFromOutput) {
              g = relu_backward(g, get<A>(loaded.y, i));
              set<A>(loaded.grad, i, g);
            }
            g = act.backward(g, normalize(x, at));
            sum[i] += g;
            dot[i] = mul_add(g, x - at.mean, dot[i]);
          }
          if (kFromOutput) write<V>(args.masked + offset, loaded.grad);
          if (index >= plan.kept) return;
          slot<Vec>(2 * index) = loaded.grad;
          slot<Vec>(2 * index + 1) = loaded.x;
        });
  });
#pragma unroll
  for (int i = 0; i < V; ++i) add(sums[lane_of<kOrder>(i)], {double(sum[i]), double(dot[i])});
}

// The gradient of x for a thread's share, with what its channels' sums came to; what was kept from shared memory.
template <Mask kMask, class T, int V, Order kOrder, class A>
__device__ __forceinline__ void input_grad_share(const Plan& plan, const Share<V, kOrder>& share,
                                                 const BackwardArgs<T>& args,
                                                 const Affine<A> (&affine)[kLanes<kOrder, V>],
                                                 const InputGrad<A>* backs) {
  using Vec = Vector<T, V>;
  constexpr bool kFromOutput = kMask == Mask::from_output;
  InputGrad<A> back[kLanes<kOrder, V>];
#pragma unroll
  for (int i = 0; i < kLanes<kOrder, V>; ++i) back[i] = backs[share.in_group + i];
  with_derivative<kMask>(args, [&](auto act) {
    for_each_vector<kInFlight<Vec, act.kCheap ? 4 : 2>, true>(
        plan, share,
        [&](int64_t offset, int index, int64_t) {
          GradLoads<Vec> loaded;
          const bool kept = index < plan.kept;
          loaded.grad = kept ? slot<Vec>(2 * index) : read<V>((kFromOutput ? args.masked : args.grad) + offset);
          loaded.x = kept ? slot<Vec>(2 * index + 1) : read<V>(args.x + offset);
          return loaded;
        },
        [&](int64_t offset, int, const GradLoads<Vec>& loaded) {
          Vec dx{};
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const int lane = lane_of<kOrder>(i);
            const A x = get<A>(loaded.x, i);
            const A g = act.backward(get<A>(loaded.grad, i), normalize(x, affine[lane]));
            set<A>(dx, i, input_grad(g, x - affine[lane].mean, back[lane]));
          }
          write<V>(args.dx + offset, dx);
          if (kFromOutput && args.dresidual != args.masked) write<V>(args.dresidual + offset, loaded.grad);
        });
  });
}

// kBoth: whether it goes on to the second pass; else the sums themselves are written.
template <class T, int V, Order kOrder, Mask kMask, bool kBoth, class A = typename Compute<T>::type>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    backward_kernel(const Plan plan, const BackwardArgs<T> args, double2* partial, unsigned* arrivals) {
  SHARED(affines, kMaxChannels, Affine<A>);
  SHARED(backs, kMaxChannels, InputGrad<A>);
  Team team(plan, partial, arrivals);
  for (int64_t group = team.index; group < plan.groups; group += plan.teams) {
    const Share<V, kOrder> share(plan, group, team.part);
    const int64_t channel = share.channel + threadIdx.x;
    const bool owner = threadIdx.x < plan.group_channels && channel < plan.channels;
    if (owner) affines[threadIdx.x] = args.norm.affine(channel);
    __syncthreads();
    Affine<A> affine[kLanes<kOrder, V>];
#pragma unroll
    for (int i = 0; i < kLanes<kOrder, V>; ++i) affine[i] = affines[share.in_group + i];

    double2 sums[kLanes<kOrder, V>] = {};
    grad_sums<kMask>(plan, share, args, affine, sums);
    const double variance = owner ? double(args.norm.var[channel]) : 0;
    const double2 total = team.sum(group, share, sums, kBoth);
    if (owner) {
      const ChannelGrad<A> of_channel =
          channel_grad(total.x, total.y, double(plan.count), variance, affines[threadIdx.x].scale, args.norm.eps);
      if (kBoth) backs[threadIdx.x] = of_channel.back;
      if (team.writes) {
        args.dbias[channel] = of_channel.dbias;
        args.dweight[channel] = of_channel.dweight;
        if (!kBoth) {
          args.sums[channel] = total.x;
          args.sums[plan.channels + channel] = total.y;
        }
      }
    }
    if constexpr (kBoth) {
      __syncthreads();
      input_grad_share<kMask>(plan, share, args, affine, backs);
    }
  }
}

template <class T>
struct InputGradArgs {
  BackwardArgs<T> args;
  const double* means;
};

// The second pass alone. means: the sums divided by their counts, those of g before those of g * (x - mean).
template <class T, int V, Order kOrder, Mask kMask, class A = typename Compute<T>::type>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    input_grad_kernel(const Plan plan, const InputGradArgs<T> given, double2*, unsigned*) {
  SHARED(affines, kMaxChannels, Affine<A>);
  SHARED(backs, kMaxChannels, InputGrad<A>);
  const BackwardArgs<T>& args = given.args;
  for (int64_t group = blockIdx.x / plan.parts; group < plan.groups; group += plan.teams) {
    const Share<V, kOrder> share(plan, group, blockIdx.x % plan.parts);
    const int64_t channel = share.channel + threadIdx.x;
    __syncthreads();  // the last group's constants have been read
    if (threadIdx.x < plan.group_channels && channel < plan.channels) {
      const Affine<A> affine = affines[threadIdx.x] = args.norm.affine(channel);
      const double variance = double(args.norm.var[channel]);
      const double sum = given.means[channel], dot = given.means[plan.channels + channel];
      backs[threadIdx.x] = channel_grad(sum, dot, 1, variance, affine.scale, args.norm.eps).back;
    }
    __syncthreads();
    Affine<A> affine[kLanes<kOrder, V>];
#pragma unroll
    for (int i = 0; i < kLanes<kOrder, V>; ++i) affine[i] = affines[share.in_group + i];
    input_grad_share<kMask>(plan, share, args, affine, backs);
  }
}

// ---- the ops ---------------------------------------------------------------------------------------

template <Mask kMask>
using MaskConstant = std::integral_constant<Mask, kMask>;

struct Kernels : Cuda {
  using Cuda::Cuda;

  // batch_norm_act's kernel, vectors and plan, so that the sums are its sums to the bit.
  template <class T, class A>
  void statistics(const Layout& at, const T* x, A* mean, A* var) const {
    forward_of(at, ForwardArgs<T>{x, nullptr, nullptr, nullptr, nullptr, mean, var, 0, Act::none, 0}, false);
  }
  template <class T>
  void forward(const Layout& at, const ForwardArgs<T>& args) const {
    if (args.act == Act::none || args.act == Act::relu) return forward_of(at, args, true);
    statistics(at, args.x, args.mean, args.var);
    apply(at, args);
  }
  template <class T>
  void forward_of(const Layout& at, const ForwardArgs<T>& args, bool keeps) const {
    with_shape<T>(at, {args.x, args.residual, args.y}, [&](auto width, auto order) {
      launch_teams<forward_kernel<T, width, order>, width, order, T>(*this, at, 1, args, keeps);
    });
  }
  template <class T>
  void apply(const Layout& at, const ForwardArgs<T>& args) const {
    with_shape<T>(at, {args.x, args.residual, args.y}, [&](auto width, auto order) {
      launch_teams<apply_kernel<T, width, order>, width, order, T>(*this, at, 0, args, true, Blocks::apart);
    });
  }
  template <class T>
  void backward(const Layout& at, const BackwardArgs<T>& args) const {
    with_mask(args, [&](auto mask) {
      with_backward_shape<mask>(at, args, [&](auto width, auto order) {
        launch_teams<backward_kernel<T, width, order, mask, true>, width, order, T>(*this, at, 2, args);
      });
    });
  }
  template <class T>
  void backward_sums(const Layout& at, const BackwardArgs<T>& args) const {
    with_mask(args, [&](auto mask) {
      with_backward_shape<mask>(at, args, [&](auto width, auto order) {
        launch_teams<backward_kernel<T, width, order, mask, false>, width, order, T>(*this, at, 0, args);
      });
    });
  }
  template <class T>
  void backward_apply(const Layout& at, const BackwardArgs<T>& args, const double* means) const {
    with_mask(args, [&](auto mask) {
      if constexpr (mask != Mask::from_output)
        with_backward_shape<mask>(at, args, [&](auto width, auto order) {
          launch_teams<input_grad_kernel<T, width, order, mask>, width, order, T>(
              *this, at, 0, InputGradArgs<T>{args, means}, true, Blocks::apart);
        });
    });
  }

  // Calls run(the Mask) as a constant.
  template <class T, class Run>
  void with_mask(const BackwardArgs<T>& args, const Run& run) const {
    if (args.y) return run(MaskConstant<Mask::from_output>{});
    if (args.act == Act::relu) return run(MaskConstant<Mask::from_input>{});
    if (args.act == Act::none) return run(MaskConstant<Mask::none>{});
    run(MaskConstant<Mask::activation>{});
  }
  template <Mask kMask, class T, class Run>
  void with_backward_shape(const Layout& at, const BackwardArgs<T>& args, const Run& run) const {
    constexpr int kMost = kMask == Mask::activation ? std::min(kWide<T>, 4) : kWide<T>;  // of more, registers spill
    with_shape<T, kMost>(at, {args.grad, args.x, args.y, args.masked, args.dx, args.dresidual}, run);
  }
};

}  // namespace
}  // namespace auglocal

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CUDA, m) { auglocal::implement_batch_norm_act<auglocal::Kernels>(m); }
