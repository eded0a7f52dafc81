// CUDA kernels of batch_norm_act: each op is one kernel that, where it can, reads its input only once.
//
// The channels are cut into groups: one channel of a contiguous tensor, some neighbouring channels of a
// channels_last one. A team of blocks works on a group: each block reads its share, sums it up and keeps it
// in shared memory; the team exchanges the sums; each block finishes what it kept and re-reads what did not
// fit. Then the team turns to its next group, so a tensor of any size passes through the chip. Two blocks
// share a multiprocessor: while one waits for its team, the other keeps the memory busy.
//
// A thread sums in Compute<T>::type, threads are summed in double, always in one order, never by atomics:
// two runs give the same bits.
#include <cooperative_groups.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "batch_norm.cuh"

namespace auglocal {
namespace {

constexpr int kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kMaxChannels = 64;    // of a group
constexpr int kMaxColumns = kWarp;  // of a channels_last group: its columns repeat within a warp

// ---- the plan: which block does what ---------------------------------------------------------------

// From one vector of a thread to its next: so many columns to the right, so many values on in memory.
struct Step {
  int64_t columns, values;
};

// A group is a matrix of vectors. contiguous: an image a row, all of one channel. channels_last: a pixel a
// row, V channels a column; there `columns` is a power of two, and the last group's may pass the tensor's end.
struct Plan {
  int64_t channels, count;                    // of the tensor; values a channel has
  int64_t groups, rows, columns;              // of a group
  int64_t row_stride, group_stride, row_gap;  // in values; row_gap: from a row's end to the next row
  Step forward, backward;
  int parts, teams;    // blocks of a team, teams
  int64_t share;       // vectors of a block: a multiple of kMaxColumns, so each block starts at column 0
  int kept;            // vectors a thread keeps in shared memory
  int period;          // threads after which the channels repeat: columns, or 1 if contiguous; a power of two
  int group_channels;  // period * V, or 1 if contiguous
};

// Estimates that only steer the plan: what beginning a round and waiting for a team cost, in bytes that a
// block could have moved meanwhile.
constexpr int64_t kRoundCost = 16 << 10, kTeamCost = 32 << 10;

// Groups and how to walk them; `columns` is for channels_last.
Plan make_groups(const Layout& layout, int vector, bool channels_last, int64_t columns) {
  Plan plan{};
  plan.channels = layout.channels;
  plan.count = layout.count();
  plan.rows = layout.outer;
  plan.columns = channels_last ? columns : layout.inner / vector;
  plan.period = channels_last ? int(columns) : 1;
  plan.group_channels = channels_last ? int(columns * vector) : 1;
  plan.groups = ceil_div(layout.channels, plan.group_channels);
  plan.group_stride = channels_last ? plan.group_channels : layout.inner;
  plan.row_stride = layout.channels * layout.inner;
  plan.row_gap = plan.row_stride - plan.columns * vector;
  if (plan.columns == 0) return plan;  // no values
  const int64_t rows = kThreads / plan.columns, right = kThreads % plan.columns;
  plan.forward = {right, rows * plan.row_stride + right * vector};
  // Left is right and a row up, so that one comparison finds the row's end in both directions.
  const int64_t left = right ? plan.columns - right : 0;
  plan.backward = {left, left * vector - (rows + (right ? 1 : 0)) * plan.row_stride};
  return plan;
}

// Cuts groups into shares: as few rounds, waits and second reads as they cost time. `operands` tensors are kept
// between the kernel's two passes; 0: it makes one pass.
Plan make_plan(const Layout& layout, int vector, int64_t value_bytes, bool channels_last, int operands, int blocks,
               int64_t kept_bytes, bool teams_can_wait) {
  Plan best{};
  int64_t best_cost = -1;
  const int64_t vector_bytes = vector * value_bytes;
  const int kept = operands ? int(kept_bytes / (kThreads * vector_bytes * operands)) : 0;
  // Rows of 128 bytes of a channels_last group use memory best, narrower ones fit more of them on the chip.
  for (const int64_t row_bytes : {128, 64}) {
    int64_t columns = std::min<int64_t>(row_bytes / vector_bytes, kMaxColumns);
    while (columns > 1 && columns / 2 * vector >= layout.channels) columns /= 2;
    Plan plan = make_groups(layout, vector, channels_last, columns);
    const int64_t vectors = plan.rows * plan.columns;
    const auto consider = [&](int64_t teams, int64_t parts) {
      plan.teams = int(teams);
      plan.parts = int(parts);
      plan.share = ceil_div(ceil_div(vectors, parts), kMaxColumns) * kMaxColumns;
      plan.kept = int(std::min<int64_t>(kept, ceil_div(plan.share, kThreads)));
      const int64_t reread = std::max<int64_t>(plan.share - int64_t(kept) * kThreads, 0);
      int64_t cost = vector_bytes * ((operands + 1) * plan.share + operands * reread) + kRoundCost;
      if (channels_last && row_bytes < 128) cost += cost / 16;
      if (parts > 1) cost += kTeamCost + parts * plan.group_channels * int64_t(sizeof(double2));
      cost *= ceil_div(plan.groups, teams);
      if (best_cost < 0 || cost < best_cost) best = plan, best_cost = cost;
    };
    const int64_t useful_parts = teams_can_wait ? std::max<int64_t>(ceil_div(vectors, kThreads), 1) : 1;
    for (int64_t rounds = ceil_div(plan.groups, blocks);;) {
      const int64_t teams = ceil_div(plan.groups, rounds), parts = std::min(blocks / teams, useful_parts);
      consider(teams, 1);
      if (parts > 1) consider(teams, parts);
      if (teams == 1 || useful_parts == 1) break;
      rounds = ceil_div(plan.groups, teams - 1);
    }
    if (!channels_last) break;
  }
  return best;
}

// ---- a thread's walk over its share ----------------------------------------------------------------

// The part of a group that falls to this thread: every kThreads-th vector of its block's share.
template <int V, bool kChannelsLast>
struct Share {
  int64_t begin;    // this thread's first vector
  int vectors;      // of this thread
  int64_t base;     // the group's first value
  int64_t channel;  // the group's first channel
  int in_group;     // from there to the first channel of this thread

  __device__ Share(const Plan& plan, int64_t group, int part) : begin(part * plan.share + threadIdx.x) {
    base = group * plan.group_stride;
    channel = group * plan.group_channels;
    in_group = kChannelsLast ? int(threadIdx.x & (plan.period - 1)) * V : 0;
    const int64_t end = min((part + 1) * plan.share, plan.rows * plan.columns);
    const bool inside = !kChannelsLast || channel + in_group < plan.channels;
    vectors = inside && begin < end ? int((end - begin + kThreads - 1) / kThreads) : 0;
  }
};

// Loads in flight that hide the memory's latency: narrow ones, of which more fit in registers, move less each.
template <class Vec, int kWide>
constexpr int kInFlight = sizeof(Vec) <= 4 ? 3 * kWide : kWide;

// Calls load(offset, slot) and then use(offset, slot, loaded) for each of the thread's vectors, kBatch loads
// at a time in flight. Backwards, the values read last, which the second-level cache still holds, come first.
template <int kBatch, bool kBackwards, int V, bool kChannelsLast, class Load, class Use>
__device__ __forceinline__ void for_each_vector(const Plan& plan, const Share<V, kChannelsLast>& share,
                                                const Load& load, const Use& use) {
  if (share.vectors == 0) return;
  const int64_t first = share.begin + (kBackwards ? int64_t(share.vectors - 1) * kThreads : 0);
  int64_t column = first % plan.columns;
  int64_t next = share.base + first / plan.columns * plan.row_stride + column * V;
  const Step step = kBackwards ? plan.backward : plan.forward;
  for (int done = 0; done < share.vectors; done += kBatch) {
    decltype(load(next, done)) loaded[kBatch];
    int64_t offset[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (done + i >= share.vectors) continue;
      offset[i] = next;
      loaded[i] = load(next, kBackwards ? share.vectors - 1 - done - i : done + i);
      column += step.columns;
      next += step.values;
      if (column >= plan.columns) {
        column -= plan.columns;
        next += plan.row_gap;
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (done + i < share.vectors) use(offset[i], kBackwards ? share.vectors - 1 - done - i : done + i, loaded[i]);
  }
}

// ---- sums over a block and over a team -------------------------------------------------------------

// For block_sum(), which exists for several widths.
__device__ __forceinline__ double2* warp_sums() {
  __shared__ double2 sums[kWarps * kMaxChannels];
  return sums;
}

// Sums over the threads `period` apart, kLanes channels a thread. Thread c returns the sum of channel c.
template <int kLanes>
__device__ double2 block_sum(double2 (&sums)[kLanes], int period) {
  double2* of_warps = warp_sums();
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  for (int apart = kWarp / 2; apart >= period; apart /= 2)
#pragma unroll
    for (int i = 0; i < kLanes; ++i)
      add(sums[i], {__shfl_xor_sync(~0u, sums[i].x, apart), __shfl_xor_sync(~0u, sums[i].y, apart)});
  const int channels = period * kLanes, of_a_warp = min(period, kWarp) * kLanes;
  if (lane < period)
#pragma unroll
    for (int i = 0; i < kLanes; ++i) of_warps[warp * of_a_warp + lane * kLanes + i] = sums[i];
  __syncthreads();
  double2 total{0, 0};
  if (thread < channels)
#pragma unroll 4
    for (int i = thread; i < kWarps * of_a_warp; i += channels) add(total, of_warps[i]);
  return total;
}

// The blocks that share a group. All blocks of the grid must be resident where parts > 1.
class Team {
 public:
  int index, part;

  // The counters are not zero yet: the first block clears them while the others already read their shares.
  __device__ Team(const Plan& plan, double2* partial, unsigned* arrivals)
      : index(blockIdx.x / plan.parts), part(blockIdx.x % plan.parts), plan_(plan), partial_(partial),
        arrivals_(arrivals) {
    if (plan.parts == 1) return;
    if (blockIdx.x == 0)
      for (int i = threadIdx.x; i < plan.teams; i += kThreads) arrivals[i] = 0;
    cleared_ = cooperative_groups::this_grid().barrier_arrive();
  }

  // The sum over the team of what block_sum() returns, to every block of the team.
  template <int kLanes>
  __device__ double2 sum(int64_t group, double2 (&sums)[kLanes]) {
    const double2 of_block = block_sum(sums, plan_.period);
    if (plan_.parts == 1) return of_block;
    const int channels = plan_.group_channels;  // divides kThreads
    double2* of_group = partial_ + group * plan_.parts * channels;
    if (threadIdx.x < channels) of_group[part * channels + threadIdx.x] = of_block;
    wait();
    double2 total[1] = {{0, 0}};
#pragma unroll 4
    for (int i = threadIdx.x; i < plan_.parts * channels; i += kThreads) add(total[0], __ldcg(&of_group[i]));
    return block_sum(total, channels);
  }

 private:
  __device__ void wait() {
    if (expected_ == 0) cooperative_groups::this_grid().barrier_wait(std::move(cleared_));
    expected_ += plan_.parts;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(&arrivals_[index], 1u);
      while (*const_cast<volatile unsigned*>(&arrivals_[index]) < expected_) __nanosleep(20);
      __threadfence();
    }
    __syncthreads();
  }

  const Plan& plan_;
  double2* partial_;
  unsigned* arrivals_;
  unsigned expected_ = 0;
  cooperative_groups::grid_group::arrival_token cleared_{};
};

// ---- the kernels -----------------------------------------------------------------------------------

// A thread's own part of the block's shared memory, which no other thread touches: the vectors it keeps.
template <class Vec>
__device__ __forceinline__ Vec& slot(int index) {
  extern __shared__ __align__(16) unsigned char kept_bytes[];
  return reinterpret_cast<Vec*>(kept_bytes)[index * kThreads + threadIdx.x];
}

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
template <class T, int V, bool kChannelsLast, class A>
__device__ __forceinline__ void apply_share(const Plan& plan, const Share<V, kChannelsLast>& share,
                                            const ForwardArgs<A, T>& args, const Affine<A>* affines, int kept) {
  using Vec = Vector<T, V>;
  constexpr int kLanes = kChannelsLast ? V : 1;
  Affine<A> affine[kLanes];
#pragma unroll
  for (int i = 0; i < kLanes; ++i) affine[i] = affines[share.in_group + i];
  struct Loaded {
    Vec x, residual;
  };
  for_each_vector<kInFlight<Vec, 3>, true>(
      plan, share,
      [&](int64_t offset, int index) {
        Loaded loaded;
        loaded.x = index < kept ? slot<Vec>(index) : read<V>(args.x + offset);
        if (args.residual) loaded.residual = read<V>(args.residual + offset);
        return loaded;
      },
      [&](int64_t offset, int, const Loaded& loaded) {
        Vec y{};
#pragma unroll
        for (int i = 0; i < V; ++i) {
          A value = normalize(get<A>(loaded.x, i), affine[kChannelsLast ? i : 0]);
          if (args.residual) value += get<A>(loaded.residual, i);
          set<A>(y, i, args.relu ? relu(value) : value);
        }
        write<V>(args.y + offset, y);
      });
}

template <class T, int V, bool kChannelsLast, class A = typename Compute<T>::type>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    forward_kernel(const Plan plan, const ForwardArgs<A, T> args, double2* partial, unsigned* arrivals) {
  using Vec = Vector<T, V>;
  constexpr int kLanes = kChannelsLast ? V : 1;  // channels of a vector
  __shared__ A origins[kMaxChannels];
  __shared__ Affine<A> affines[kMaxChannels];
  Team team(plan, partial, arrivals);
  for (int64_t group = team.index; group < plan.groups; group += plan.teams) {
    const Share<V, kChannelsLast> share(plan, group, team.part);
    // Thread c also looks after channel c of the group.
    const int64_t channel = share.channel + threadIdx.x;
    const bool owner = threadIdx.x < plan.group_channels && channel < plan.channels;
    const A origin = owner && plan.count ? A(load(args.x[share.base + threadIdx.x])) : A(0);

    // Sums of x - pivot and of its square: the pivot, the thread's first value, keeps a large mean out.
    Vec pivot{};
    A first[V] = {}, second[V] = {};
    for_each_vector<kInFlight<Vec, 6>, false>(
        plan, share, [&](int64_t offset, int) { return read<V>(args.x + offset); },
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
    double2 sums[kLanes] = {};
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (share.vectors == 0) continue;
      const int lane = kChannelsLast ? i : 0;
      const double n = share.vectors, d = double(get<A>(pivot, i)) - double(origins[share.in_group + lane]);
      add(sums[lane], {first[i] + n * d, second[i] + d * (2 * double(first[i]) + n * d)});
    }
    const double2 sum = team.sum(group, sums);
    if (owner) {
      const double count = max(plan.count, int64_t(1)), shift = sum.x / count;
      const double variance = sum.y / count - shift * shift;
      const A mean = A(double(origin) + shift), var = A(variance < 0 ? 0 : variance);  // NaN stays
      affines[threadIdx.x] = make_affine(mean, var, weight, bias, args.eps);
      if (team.part == 0) {
        args.mean[channel] = mean;
        args.var[channel] = var;
      }
    }
    __syncthreads();

    if (args.y) apply_share(plan, share, args, affines, plan.kept);
  }
}

// The elementwise part alone, with statistics that are known already.
template <class T, int V, bool kChannelsLast, class A = typename Compute<T>::type>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    apply_kernel(const Plan plan, const ForwardArgs<A, T> args, double2*, unsigned*) {
  __shared__ Affine<A> affines[kMaxChannels];
  for (int64_t group = blockIdx.x / plan.parts; group < plan.groups; group += plan.teams) {
    const Share<V, kChannelsLast> share(plan, group, blockIdx.x % plan.parts);
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

template <class T, int V, bool kChannelsLast, Mask kMask, class A = typename Compute<T>::type>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    backward_kernel(const Plan plan, const BackwardArgs<A, T> args, double2* partial, unsigned* arrivals) {
  using Vec = Vector<T, V>;
  constexpr int kLanes = kChannelsLast ? V : 1;
  constexpr bool kFromOutput = kMask == Mask::from_output;
  __shared__ Affine<A> affines[kMaxChannels];
  __shared__ InputGrad<A> backs[kMaxChannels];
  Team team(plan, partial, arrivals);
  for (int64_t group = team.index; group < plan.groups; group += plan.teams) {
    const Share<V, kChannelsLast> share(plan, group, team.part);
    const int64_t channel = share.channel + threadIdx.x;
    const bool owner = threadIdx.x < plan.group_channels && channel < plan.channels;
    if (owner)
      affines[threadIdx.x] = make_affine(args.mean[channel], args.var[channel], args.weight[channel],
                                         args.bias[channel], args.eps);
    __syncthreads();
    Affine<A> affine[kLanes];
#pragma unroll
    for (int i = 0; i < kLanes; ++i) affine[i] = affines[share.in_group + i];

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
        [&](int64_t offset, int) {
          Loaded loaded;
          loaded.grad = read<V>(args.grad + offset);
          loaded.x = read<V>(args.x + offset);
          if (kFromOutput) loaded.y = read<V>(args.y + offset);
          return loaded;
        },
        [&](int64_t offset, int index, Loaded& loaded) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const Affine<A>& at = affine[kChannelsLast ? i : 0];
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

    double2 sums[kLanes] = {};
#pragma unroll
    for (int i = 0; i < V; ++i) add(sums[kChannelsLast ? i : 0], {double(sum[i]), double(dot[i])});
    const double variance = owner ? double(args.var[channel]) : 0;
    const double2 total = team.sum(group, sums);
    if (owner) {
      const double invstd = 1 / sqrt(variance + args.eps), count = max(plan.count, int64_t(1));
      backs[threadIdx.x] = {affines[threadIdx.x].scale, A(total.x / count), A(total.y * invstd * invstd / count)};
      if (team.part == 0) {
        args.dbias[channel] = A(total.x);
        args.dweight[channel] = A(total.y * invstd);
      }
    }
    __syncthreads();

    InputGrad<A> back[kLanes];
#pragma unroll
    for (int i = 0; i < kLanes; ++i) back[i] = backs[share.in_group + i];
    for_each_vector<kInFlight<Vec, 4>, true>(
        plan, share,
        [&](int64_t offset, int index) {
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
            const int lane = kChannelsLast ? i : 0;
            const A x = get<A>(loaded.x, i);
            const A g = masked(get<A>(loaded.grad, i), x, affine[lane]);
            set<A>(dx, i, input_grad(g, x - affine[lane].mean, back[lane]));
          }
          write<V>(args.dx + offset, dx);
          if (kFromOutput && args.dresidual != args.masked) write<V>(args.dresidual + offset, loaded.grad);
        });
  }
}

// ---- launches --------------------------------------------------------------------------------------

// What a device holds of a kernel at a time; asked once.
struct Residency {
  int blocks = 0;
  int64_t kept_bytes = 0;  // shared memory of a block for kept vectors
  bool cooperative = false;
};

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

template <auto kKernel>
const Residency& residency(int device) {
  constexpr int kMaxDevices = 64;
  static Residency known[kMaxDevices];
  static std::once_flag once[kMaxDevices];
  STD_TORCH_CHECK(device < kMaxDevices, "batch_norm_act: at most ", kMaxDevices, " devices");
  std::call_once(once[device], [&] {
    const auto kernel = reinterpret_cast<const void*>(kKernel);
    cudaFuncAttributes of_kernel;
    STD_CUDA_CHECK(cudaFuncGetAttributes(&of_kernel, kernel));
    const int64_t a_block = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) / kBlocksPerMultiprocessor -
                            attribute(cudaDevAttrReservedSharedMemoryPerBlock, device);
    const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    Residency found;
    found.kept_bytes = (std::min(a_block, most) - int64_t(of_kernel.sharedSizeBytes)) / 1024 * 1024;
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(found.kept_bytes)));
    // The first-level cache has nothing to cache here.
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared));
    int blocks = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, found.kept_bytes));
    found.blocks = std::max(blocks, 1) * attribute(cudaDevAttrMultiProcessorCount, device);
    found.cooperative = attribute(cudaDevAttrCooperativeLaunch, device) != 0;
    known[device] = found;
  });
  return known[device];
}

template <auto kKernel, int V, bool kChannelsLast, class T, class Args>
void launch(const Layout& layout, int operands, const Tensor& x, const Tensor& weight, Args args) {
  const int device = x.get_device_index();
  const Residency& held = residency<kKernel>(device);
  const Plan plan = make_plan(layout, V, sizeof(T), kChannelsLast, operands, held.blocks, held.kept_bytes,
                              held.cooperative);
  const int64_t partials = plan.parts == 1 ? 0 : plan.groups * plan.group_channels * plan.parts;
  const int64_t bytes = partials * sizeof(double2) + plan.teams * sizeof(unsigned);
  const Tensor workspace = empty(weight, {ceil_div(bytes, sizeof(float))});
  auto partial = static_cast<double2*>(workspace.mutable_data_ptr());
  auto arrivals = reinterpret_cast<unsigned*>(partial + partials);
  cudaLaunchAttribute together;  // only blocks that wait for one another must be resident together
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = plan.parts > 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.teams * plan.parts);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(plan.kept) * kThreads * sizeof(Vector<T, V>) * operands;
  config.stream = current_stream(device);
  config.attrs = &together;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kKernel, plan, args, partial, arrivals));
}

// Calls run(vector width, channels_last) as constants.
template <class T, class Run>
void with_shape(const Layout& layout, std::initializer_list<const void*> tensors, const Run& run) {
  if (layout.inner == 1)
    with_width<T>(layout.channels, tensors, [&](auto width) { run(width, std::true_type{}); });
  else
    with_width<T>(layout.inner, tensors, [&](auto width) { run(width, std::false_type{}); });
}

std::tuple<Tensor, Tensor> batch_norm_statistics(const Tensor& given) {
  constexpr auto op = "batch_norm_statistics";
  STD_TORCH_CHECK(given.dim() == 4, op, ": x must be (N, C, H, W), given a tensor of ", given.dim(), " dimensions");
  const Layout at = layout_of(given);
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const Tensor x = dense(given, at.format);
  Tensor mean = empty_statistics(x), var = empty_statistics(x);
  if (at.channels == 0) return {mean, var};
  AUGLOCAL_DISPATCH(op, x.scalar_type(), {
    using A = typename Compute<T>::type;
    const ForwardArgs<A, T> args{data<T>(x), nullptr, nullptr, nullptr, nullptr, mutable_data<A>(mean),
                                 mutable_data<A>(var), 0, false};
    with_shape<T>(at, {args.x}, [&](auto width, auto channels_last) {
      launch<forward_kernel<T, width, channels_last>, width, channels_last, T>(at, 0, x, mean, args);
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
  const std::optional<Tensor> residual = dense(given_residual, at.format);
  Tensor y = empty(x, x.sizes(), at.format), mean = empty(weight, weight.sizes()), var = empty(weight, weight.sizes());
  if (at.channels == 0) return {y, mean, var};
  AUGLOCAL_DISPATCH(op, x.scalar_type(), {
    using A = typename Compute<T>::type;
    const ForwardArgs<A, T> args{data<T>(x), data<T>(residual), mutable_data<T>(y),
                                 data<A>(weight), data<A>(bias), mutable_data<A>(mean), mutable_data<A>(var), eps, act};
    with_shape<T>(at, {args.x, args.residual, args.y}, [&](auto width, auto channels_last) {
      launch<forward_kernel<T, width, channels_last>, width, channels_last, T>(at, 1, x, weight, args);
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
    with_shape<T>(at, {args.x, args.residual, args.y}, [&](auto width, auto channels_last) {
      launch<apply_kernel<T, width, channels_last>, width, channels_last, T>(at, 0, x, weight, args);
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
  if (at.channels == 0) return {dweight, dbias};
  AUGLOCAL_DISPATCH(op, x.scalar_type(), {
    using A = typename Compute<T>::type;
    T *const into_dx = mutable_data<T>(dx), *const into_dresidual = dresidual ? mutable_data<T>(*dresidual) : nullptr;
    const BackwardArgs<A, T> args{data<T>(grad), data<T>(x), data<T>(y), data<A>(weight), data<A>(bias),
                                  data<A>(mean), data<A>(var), into_dx, into_dresidual,
                                  into_dresidual == data<T>(x) ? into_dx : into_dresidual,
                                  mutable_data<A>(dweight), mutable_data<A>(dbias), eps};
    with_shape<T>(at, {args.grad, args.x, args.y, args.dx, args.dresidual}, [&](auto width, auto channels_last) {
      const auto run = [&](auto mask) {
        launch<backward_kernel<T, width, channels_last, mask>, width, channels_last, T>(at, 2, x, weight, args);
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
  m.impl("batch_norm_statistics", TORCH_BOX(&auglocal::batch_norm_statistics));
  m.impl("batch_norm_act", TORCH_BOX(&auglocal::batch_norm_act));
  m.impl("batch_norm_act_apply_out", TORCH_BOX(&auglocal::batch_norm_act_apply_out));
  m.impl("batch_norm_act_backward_out", TORCH_BOX(&auglocal::batch_norm_act_backward_out));
}
