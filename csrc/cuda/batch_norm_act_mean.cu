// CUDA kernels of batch_norm_act_mean: the mean over each map of act(BN(x) [+ residual]), which is never stored.
// The map's gradient is never stored either: it is one value a map behind the ReLU's mask, recomputed from x.
//
// Both read vectors of 16 bytes even where maps are not made of whole ones, as those of 7 x 7 values are not.
// Nothing is summed by atomics: two runs give the same bits.
#include "../ops/batch_norm_act_mean.h"
#include "teams.cuh"

namespace auglocal {
namespace {

// ---- the mean --------------------------------------------------------------------------------------

constexpr int kMaxLanes = 32;         // of a map
constexpr int kLaneVectors = 4;       // that a lane has of a map, if there are enough
constexpr int64_t kBlocks = 2048;     // a few times what a GPU holds: enough to fill it evenly
constexpr int64_t kMaxMap = 1 << 30;  // values

// A block has a chunk of channels, `columns` beside one another (pixels: vectors of channels), and walks over the
// images, `together` at a time. `lanes` threads share a map.
struct Walk {
  int64_t images, channels, values;  // values: of the tensor
  int64_t chunks, parts;
  int map, columns, lanes, together;  // map: values of one
};

Walk make_walk(const Layout& at, int vector, Order order, int64_t images, int64_t map) {
  const bool pixels = order == Order::pixels;
  Walk walk{};
  walk.images = images;
  walk.channels = at.channels;
  walk.map = int(map);
  walk.values = images * at.channels * map;
  const auto clamp = [](int64_t value, int64_t most) { return int(std::max<int64_t>(std::min(value, most), 1)); };
  const int64_t vectors = pixels ? map : ceil_div(map, vector);
  const int64_t columns = pixels ? ceil_div(at.channels, vector) : at.channels;
  if (pixels) walk.columns = clamp(columns, kMaxColumns);
  const int most_lanes = pixels ? std::min(kThreads / walk.columns, kMaxLanes) : kMaxLanes;
  walk.lanes = clamp(ceil_div(vectors, kLaneVectors), most_lanes);
  if (!pixels) walk.columns = clamp(columns, kThreads / walk.lanes);
  walk.together = kThreads / (walk.columns * walk.lanes);
  walk.chunks = ceil_div(columns, walk.columns);
  walk.parts = clamp(ceil_div(images, walk.together), std::max<int64_t>(kBlocks / walk.chunks, 1));
  return walk;
}

// What of a vector lies before the tensor's end.
template <int V, class T>
__device__ __forceinline__ Vector<T, V> read_before(const T* from, int64_t left) {
  if (left >= V) return read<V>(from);
  Vector<T, V> vector{};
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (i < left) vector.set(i, from[i]);
  return vector;
}

template <class T, int V, Order kOrder, class A = typename Compute<T>::type>
__global__ void __launch_bounds__(kThreads, 3) mean_kernel(const Walk walk, const MeanArgs<T> args) {
  using Vec = Vector<T, V>;
  constexpr bool kPixels = kOrder == Order::pixels, kJoined = kOrder == Order::joined;
  constexpr int kWidth = kPixels ? V : 1;  // channels of a thread
  constexpr int kBatch = kPixels ? (V == 8 ? 2 : 3) : (V == 1 && sizeof(T) < 8 ? 8 : kLaneVectors);  // in flight
  SHARED(affines, (kMaxColumns * V > kThreads ? kMaxColumns * V : kThreads), Affine<A>);
  SHARED(sums, kThreads, Vector<A, kWidth>);
  const int64_t part = blockIdx.x / walk.chunks, chunk = blockIdx.x % walk.chunks;
  const int64_t first_channel = chunk * walk.columns * kWidth;
  const int width = walk.columns * kWidth, thread = threadIdx.x;
  for (int i = thread; i < width && first_channel + i < walk.channels; i += kThreads)
    affines[i] = args.norm.affine(first_channel + i);
  // Neighbouring threads read neighbouring vectors: of a map, or of a pixel.
  const int column = kPixels ? thread % walk.columns : thread / walk.lanes % walk.columns;
  const int lane = kPixels ? thread / walk.columns % walk.lanes : thread % walk.lanes;
  const int beside = thread / (walk.columns * walk.lanes);  // which of the images
  const int64_t channel = first_channel + column * kWidth;
  __syncthreads();
  Affine<A> affine[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) affine[i] = affines[column * kWidth + i];

  const int64_t step = walk.parts * walk.together;
  for (int64_t first_image = part * walk.together; first_image < walk.images; first_image += step) {
    const int64_t image = first_image + beside;
    A sum[kWidth] = {};
    if (beside < walk.together && image < walk.images && channel < walk.channels) {
      // Joined, the map may begin and end within a vector, and the tensor may end within the last.
      const int64_t begin =
          kPixels ? image * walk.map * walk.channels + channel : (image * walk.channels + channel) * walk.map;
      const int skipped = kJoined ? int(begin % V) : 0;
      const int vectors = kPixels ? walk.map : (skipped + walk.map + V - 1) / V;
      const int64_t hop = kPixels ? walk.channels : V, left = walk.values - begin + skipped;
      const auto load = [&](const T* from, int vector) {
        const int64_t offset = vector * hop;
        from += begin - skipped + offset;
        return kJoined ? read_before<V>(from, left - offset) : read<V>(from);
      };
      for (int next = lane; next < vectors; next += kBatch * walk.lanes) {
        Vec x[kBatch], residual[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int vector = next + k * walk.lanes;
          if (vector >= vectors) continue;
          x[k] = load(args.x, vector);
          if (args.residual) residual[k] = load(args.residual, vector);
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int vector = next + k * walk.lanes, before = skipped - vector * V;
          if (vector >= vectors) continue;
#pragma unroll
          for (int i = 0; i < V; ++i) {
            A y = normalize(get<A>(x[k], i), affine[kPixels ? i : 0]);
            if (args.residual) y += get<A>(residual[k], i);
            if (args.relu) y = relu(y);
            if (!kJoined || (i >= before && i < before + walk.map)) sum[kPixels ? i : 0] += y;
          }
        }
      }
    }
    if (beside < walk.together) {
      Vector<A, kWidth>& mine = sums[(beside * walk.lanes + lane) * walk.columns + column];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) mine.set(i, sum[i]);
    }
    __syncthreads();
    const A* const all = reinterpret_cast<const A*>(sums);
    for (int i = thread; i < walk.together * width; i += kThreads) {
      const int of_image = i / width, c = i - of_image * width;
      if (first_image + of_image >= walk.images || first_channel + c >= walk.channels) continue;
      double total = 0;
#pragma unroll 4
      for (int k = 0; k < walk.lanes; ++k) total += all[(of_image * walk.lanes + k) * width + c];
      args.pooled[(first_image + of_image) * walk.channels + first_channel + c] = A(total / double(walk.map));
    }
    __syncthreads();
  }
}

// ---- its gradient ----------------------------------------------------------------------------------

template <class T>
struct BackwardArgs : MeanBackwardArgs<T> {
  double map;  // values of one
  WideDivisor by_map;
};

// kMask: none or from_input; with a residual that is added to BN(x) first. dresidual may be null.
template <class T, int V, Order kOrder, Mask kMask, bool kResidual, class A = typename Compute<T>::type>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    backward_kernel(const Plan plan, const BackwardArgs<T> args, double2* partial, unsigned* arrivals) {
  using Vec = Vector<T, V>;
  constexpr int kOperands = kResidual ? 2 : 1;
  constexpr int kGrads = kOrder == Order::maps ? 1 : (kOrder == Order::joined ? 2 : V);  // of a vector
  // As many as registers allow: eight values, with a gradient each or a residual, take many.
  constexpr int kBatch = kInFlight < Vec, V == 8 && kResidual ? 2 : (kGrads == 8 ? 3 : 4) > ;
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
    for (int i = 0; i < kLanes<kOrder, V>; ++i) affine[i] = affines[share.of(i)];

    struct Loaded {
      Vec x, residual;
      A grads[kGrads];
    };
    const A* const grads = args.grad + share.channel + share.in_group;
    const auto load = [&](int64_t offset, int index, int64_t row, bool kept) {
      Loaded loaded;
      loaded.x = kept ? slot<Vec>(kOperands * index) : read<V>(args.x + offset);
      if (kResidual) loaded.residual = kept ? slot<Vec>(kOperands * index + 1) : read<V>(args.residual + offset);
      const A* const from = grads + (kOrder == Order::pixels ? args.by_map.quotient(row) : row) * plan.channels;
      constexpr int kTogether = kOrder == Order::pixels && V > 1 ? 4 : 1;
#pragma unroll
      for (int i = 0; i < kGrads; i += kTogether) {
        if (kOrder == Order::joined && i == 1 && share.here >= V) continue;  // no other channel: it may not exist
        const Vector<A, kTogether> some = read<kTogether>(from + i);
#pragma unroll
        for (int j = 0; j < kTogether; ++j) loaded.grads[i + j] = some.get(j);
      }
      return loaded;
    };
    // The gradient of value i behind its mask, times the map's values.
    const auto masked = [&](const Loaded& loaded, int i) {
      const A grad = kOrder == Order::joined ? (i < share.here ? loaded.grads[0] : loaded.grads[kGrads - 1])
                                             : loaded.grads[kOrder == Order::pixels ? i : 0];
      if (kMask == Mask::none) return grad;
      A y = normalize(get<A>(loaded.x, i), affine[lane_of<kOrder>(i)]);
      if (kResidual) y += get<A>(loaded.residual, i);
      return relu_backward(grad, y);
    };

    A sum[V] = {}, dot[V] = {};  // of g and of g * (x - mean)
    for_each_vector<kBatch, false>(
        plan, share, [&](int64_t offset, int index, int64_t row) { return load(offset, index, row, false); },
        [&](int64_t, int index, const Loaded& loaded) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const A g = masked(loaded, i);
            sum[i] += g;
            dot[i] = mul_add(g, get<A>(loaded.x, i) - affine[lane_of<kOrder>(i)].mean, dot[i]);
          }
          if (index >= plan.kept) return;
          slot<Vec>(kOperands * index) = loaded.x;
          if (kResidual) slot<Vec>(kOperands * index + 1) = loaded.residual;
        });

    double2 sums[kLanes<kOrder, V>] = {};
#pragma unroll
    for (int i = 0; i < V; ++i) add(sums[lane_of<kOrder>(i)], {double(sum[i]), double(dot[i])});
    const double variance = owner ? double(args.norm.var[channel]) : 0;
    const double2 total = team.sum(group, share, sums);
    if (owner) {
      const ChannelGrad<A> of_channel = channel_grad(total.x / args.map, total.y / args.map, double(plan.count),
                                                     variance, affines[threadIdx.x].scale, args.norm.eps);
      backs[threadIdx.x] = of_channel.back;
      if (team.writes) {
        args.dbias[channel] = of_channel.dbias;
        args.dweight[channel] = of_channel.dweight;
      }
    }
    __syncthreads();

    InputGrad<A> back[kLanes<kOrder, V>];
#pragma unroll
    for (int i = 0; i < kLanes<kOrder, V>; ++i) back[i] = backs[share.of(i)];
    const A a_value = A(1 / args.map);
    for_each_vector<kBatch, true>(
        plan, share,
        [&](int64_t offset, int index, int64_t row) { return load(offset, index, row, index < plan.kept); },
        [&](int64_t offset, int, const Loaded& loaded) {
          Vec dx{}, dresidual{};
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const int lane = lane_of<kOrder>(i);
            const A g = masked(loaded, i) * a_value;
            if (kResidual) set<A>(dresidual, i, g);
            set<A>(dx, i, input_grad(g, get<A>(loaded.x, i) - affine[lane].mean, back[lane]));
          }
          write<V>(args.dx + offset, dx);
          if (kResidual && args.dresidual) write<V>(args.dresidual + offset, dresidual);
        });
  }
}

// ---- the ops ---------------------------------------------------------------------------------------

// with_shape(), joined where whole vectors need it.
template <class T, class Run>
void with_shape_or_joined(const Layout& at, bool joinable, std::initializer_list<const void*> tensors, const Run& run) {
  if constexpr (kWide<T> > 1)
    if (joinable && at.inner > 1 && at.inner % kWide<T> && aligned(tensors, 16))
      return run(std::integral_constant<int, kWide<T>>{}, OrderConstant<Order::joined>{});
  with_shape<T>(at, tensors, run);
}

struct Kernels : Cuda {
  using Cuda::Cuda;

  template <class T>
  void forward(const Maps& maps, const MeanArgs<T>& args) const {
    require(maps.size <= kMaxMap, "batch_norm_act_mean_apply: at most 2^30 values a map, given ", maps.size);
    with_shape_or_joined<T>(maps.at, true, {args.x, args.residual}, [&](auto width, auto order) {
      const Walk walk = make_walk(maps.at, width, order, maps.samples, maps.size);
      launch(mean_kernel<T, width, order>, walk.chunks * walk.parts, walk, args);
    });
  }
  template <class T>
  void backward(const Maps& maps, const MeanBackwardArgs<T>& given) const {
    const Layout& at = maps.at;
    const BackwardArgs<T> args{given, double(maps.size), WideDivisor(maps.size)};
    const std::initializer_list<const void*> tensors{args.x, args.residual, args.dx, args.dresidual};
    with_shape_or_joined<T>(at, can_join(at, kWide<T>), tensors, [&](auto width, auto order) {
      const auto run = [&](auto mask, auto residual) {
        launch_teams<backward_kernel<T, width, order, mask, residual>, width, order, T>(*this, at, residual ? 2 : 1,
                                                                                        args);
      };
      if (args.residual) return run(std::integral_constant<Mask, Mask::from_input>{}, std::true_type{});
      if (args.relu) return run(std::integral_constant<Mask, Mask::from_input>{}, std::false_type{});
      run(std::integral_constant<Mask, Mask::none>{}, std::false_type{});
    });
  }
};

}  // namespace
}  // namespace auglocal

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CUDA, m) {
  auglocal::implement<auglocal::Kernels, auglocal::BatchNormActMeanApply, auglocal::BatchNormActMeanBackwardOut>(m);
}
