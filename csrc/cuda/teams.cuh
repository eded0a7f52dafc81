// How a cooperative kernel around BatchNorm, which sums over channels and then needs the sums, reads a feature map
// only once where it can.
//
// The channels are cut into groups: one channel of a contiguous tensor, some neighbouring channels of a
// channels_last one. A team of blocks works on a group: each block reads its share, sums it up and keeps it
// in shared memory; the team exchanges the sums; each block finishes what it kept and re-reads what did not
// fit. Then the team turns to its next group, so a tensor of any size passes through the chip. Two blocks
// share a multiprocessor: while one waits for its team, the other keeps the memory busy.
//
// A thread sums in Compute<T>::type, threads are summed in double, always in one order, never by atomics:
// two runs give the same bits.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>
#include <mutex>
#include <numeric>
#include <utility>

#include "batch_norm.cuh"

namespace auglocal {
namespace {

constexpr int kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kMaxChannels = 64;    // of a group
constexpr int kMaxColumns = kWarp;  // of a channels_last group: its columns repeat within a warp

// What a group is, in memory.
enum class Order {
  maps,    // contiguous: one channel, an image a row
  joined,  // contiguous: as many channels as it takes for rows of whole vectors, some of which straddle two channels
  pixels,  // channels_last: some neighbouring channels, a pixel a row
};

// ---- the plan: which block does what ---------------------------------------------------------------

// From one vector of a thread to its next: so many columns to the right and rows down, so many values on in memory.
struct Step {
  int64_t columns, rows, values;
};

// A group is a matrix of vectors. Where pixels are its rows, `columns` is a power of two, and the last group's may pass
// the tensor's end.
struct Plan {
  int64_t channels, count, map;               // of the tensor; values of a channel, and of one in an image or pixel
  int64_t groups, rows, columns;              // of a group
  int64_t row_stride, group_stride, row_gap;  // in values; row_gap: from a row's end to the next row
  Step forward, backward;
  int threads;         // of a block that walk: all, or joined so many that each keeps to its column
  int parts, teams;    // blocks of a team, teams
  int64_t share;       // vectors of a block: a multiple of kMaxColumns, joined of columns, to start at column 0
  int kept;            // vectors a thread keeps in shared memory
  int period;          // threads after which the channels repeat: columns where pixels are rows, else 1
  int group_channels;  // a power of two
};

// Estimates that only steer the plan: what beginning a round and waiting for a team cost, in bytes that a
// block could have moved meanwhile.
constexpr int64_t kRoundCost = 16 << 10, kTeamCost = 32 << 10;

// Channels that are whole vectors together; a power of two, as the vector is.
inline int64_t joined_channels(int64_t map, int vector) { return vector / std::gcd(map, int64_t(vector)); }

inline bool can_join(const Layout& layout, int vector) {
  const int64_t channels = joined_channels(layout.inner, vector);
  return layout.inner >= vector && layout.channels % channels == 0 && channels * layout.inner <= kThreads * vector;
}

// Groups and how to walk them; `columns` is for pixels.
inline Plan make_groups(const Layout& layout, int vector, Order order, int64_t columns) {
  const bool pixels = order == Order::pixels;
  Plan plan{};
  plan.channels = layout.channels;
  plan.count = layout.count();
  plan.map = layout.inner;
  plan.rows = layout.outer;
  plan.period = pixels ? int(columns) : 1;
  plan.group_channels =
      int(pixels ? columns * vector : (order == Order::joined ? joined_channels(plan.map, vector) : 1));
  plan.columns = pixels ? columns : plan.group_channels * plan.map / vector;
  plan.groups = ceil_div(layout.channels, plan.group_channels);
  plan.group_stride = plan.group_channels * plan.map;
  plan.row_stride = layout.channels * layout.inner;
  plan.row_gap = plan.row_stride - plan.columns * vector;
  plan.threads = kThreads;
  if (plan.columns == 0) return plan;  // no values
  if (order == Order::joined) plan.threads = int(kThreads / plan.columns * plan.columns);
  const int64_t rows = plan.threads / plan.columns, right = plan.threads % plan.columns;
  plan.forward = {right, rows, rows * plan.row_stride + right * vector};
  // Left is right and a row up, so that one comparison finds the row's end in both directions.
  const int64_t left = right ? plan.columns - right : 0, up = rows + (right ? 1 : 0);
  plan.backward = {left, -up, left * vector - up * plan.row_stride};
  return plan;
}

// Cuts groups into shares: as few rounds, waits and second reads as they cost time. `operands` tensors are kept
// between the kernel's two passes; 0: it makes one pass.
inline Plan make_plan(const Layout& layout, int vector, int64_t value_bytes, Order order, int operands, int blocks,
                      int64_t kept_bytes, bool teams_can_wait) {
  Plan best{};
  int64_t best_cost = -1;
  const int64_t vector_bytes = vector * value_bytes;
  const int kept = operands ? int(kept_bytes / (kThreads * vector_bytes * operands)) : 0;
  // Rows of 128 bytes of a channels_last group use memory best, narrower ones fit more of them on the chip.
  for (const int64_t row_bytes : {128, 64}) {
    int64_t columns = std::min<int64_t>(row_bytes / vector_bytes, kMaxColumns);
    while (columns > 1 && columns / 2 * vector >= layout.channels) columns /= 2;
    Plan plan = make_groups(layout, vector, order, columns);
    const int64_t vectors = plan.rows * plan.columns;
    const auto consider = [&](int64_t teams, int64_t parts) {
      plan.teams = int(teams);
      plan.parts = int(parts);
      const int64_t unit = order == Order::joined ? plan.columns : kMaxColumns;
      plan.share = ceil_div(ceil_div(vectors, parts), unit) * unit;
      plan.kept = int(std::min<int64_t>(kept, ceil_div(plan.share, plan.threads)));
      const int64_t reread = std::max<int64_t>(plan.share - int64_t(kept) * plan.threads, 0);
      int64_t cost = vector_bytes * ((operands + 1) * plan.share + operands * reread) + kRoundCost;
      if (order == Order::pixels && row_bytes < 128) cost += cost / 16;
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
    if (order != Order::pixels) break;
  }
  return best;
}

// ---- a thread's walk over its share ----------------------------------------------------------------

// The part of a group that falls to this thread: every kThreads-th vector of its block's share; joined, fewer threads
// take part and each keeps to a column.
template <int V, Order kOrder>
struct Share {
  int64_t begin;    // this thread's first vector
  int vectors;      // of this thread
  int64_t base;     // the group's first value
  int64_t channel;  // the group's first channel
  int in_group;     // from there to the first channel of this thread
  int here;         // joined: values of a vector that lie in that channel; the others lie in the next

  __device__ Share(const Plan& plan, int64_t group, int part) : begin(part * plan.share + threadIdx.x) {
    base = group * plan.group_stride;
    channel = group * plan.group_channels;
    const int64_t end = min((part + 1) * plan.share, plan.rows * plan.columns);
    bool inside = true;
    in_group = here = 0;
    if (kOrder == Order::pixels) {
      in_group = int(threadIdx.x & (plan.period - 1)) * V;
      inside = channel + in_group < plan.channels;
    }
    if (kOrder == Order::joined) {
      const int map = int(plan.map), first = int(threadIdx.x) % int(plan.columns) * V;
      in_group = first / map;
      here = (in_group + 1) * map - first;
      inside = threadIdx.x < plan.threads;
    }
    const int step = threads(plan);
    vectors = inside && begin < end ? int((end - begin + step - 1) / step) : 0;
  }

  __device__ static int threads(const Plan& plan) { return kOrder == Order::joined ? plan.threads : kThreads; }
  // The channel, counted from the group's first, of value i of this thread's vectors.
  __device__ int of(int i) const {
    return in_group + (kOrder == Order::pixels ? i : (kOrder == Order::joined && i >= here ? 1 : 0));
  }
};

// Constants that a thread needs: of its channel, or of the channel of each value of its vectors.
template <Order kOrder, int V>
constexpr int kLanes = kOrder == Order::maps ? 1 : V;
template <Order kOrder>
__device__ constexpr int lane_of(int i) {
  return kOrder == Order::maps ? 0 : i;
}

// Loads in flight that hide the memory's latency: narrow ones, of which more fit in registers, move less each.
template <class Vec, int kWide>
constexpr int kInFlight = sizeof(Vec) <= 4 ? 3 * kWide : kWide;

// Calls load(offset, slot, row) and then use(offset, slot, loaded) for each of the thread's vectors, kBatch loads
// at a time in flight. Backwards, the values read last, which the second-level cache still holds, come first.
template <int kBatch, bool kBackwards, int V, Order kOrder, class Load, class Use>
__device__ __forceinline__ void for_each_vector(const Plan& plan, const Share<V, kOrder>& share, const Load& load,
                                                const Use& use) {
  if (share.vectors == 0) return;
  const int64_t first = share.begin + (kBackwards ? int64_t(share.vectors - 1) * share.threads(plan) : 0);
  int64_t column = first % plan.columns, row = first / plan.columns;
  int64_t next = share.base + row * plan.row_stride + column * V;
  const Step step = kBackwards ? plan.backward : plan.forward;
  for (int done = 0; done < share.vectors; done += kBatch) {
    decltype(load(next, done, row)) loaded[kBatch];
    int64_t offset[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (done + i >= share.vectors) continue;
      offset[i] = next;
      loaded[i] = load(next, kBackwards ? share.vectors - 1 - done - i : done + i, row);
      column += step.columns;
      row += step.rows;
      next += step.values;
      if (column >= plan.columns) {
        column -= plan.columns;
        ++row;
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
  SHARED(sums, kWarps * kMaxChannels, double2);
  return sums;
}

// Sums over the threads `period` apart, kSums channels a thread. Thread c returns the sum of channel c.
template <int kSums>
__device__ double2 block_sum(double2 (&sums)[kSums], int period) {
  double2* of_warps = warp_sums();
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  for (int apart = kWarp / 2; apart >= period; apart /= 2)
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      add(sums[i], {__shfl_xor_sync(~0u, sums[i].x, apart), __shfl_xor_sync(~0u, sums[i].y, apart)});
  const int channels = period * kSums, of_a_warp = min(period, kWarp) * kSums;
  if (lane < period)
#pragma unroll
    for (int i = 0; i < kSums; ++i) of_warps[warp * of_a_warp + lane * kSums + i] = sums[i];
  __syncthreads();
  double2 total{0, 0};
  if (thread < channels)
#pragma unroll 4
    for (int i = thread; i < kWarps * of_a_warp; i += channels) add(total, of_warps[i]);
  return total;
}

// The same where vectors straddle channels: a warp sums a channel, over the threads of its columns.
template <int V>
__device__ double2 joined_sum(const Plan& plan, const Share<V, Order::joined>& share, const double2 (&sums)[V]) {
  static_assert(V <= kWarps && 2 * kThreads <= kWarps * kMaxChannels, "");
  SHARED(totals, kWarps, double2);
  double2 *here = warp_sums(), *next = here + kThreads;
  const int thread = threadIdx.x, channel = thread / kWarp, lane = thread % kWarp;
  double2 first{0, 0}, second{0, 0};
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (i < share.here)
      add(first, sums[i]);
    else
      add(second, sums[i]);
  }
  here[thread] = first;
  next[thread] = second;
  __syncthreads();
  if (channel < plan.group_channels) {
    const int map = int(plan.map), begin = channel * map, all = int(plan.columns);
    const int column = begin / V, columns = (begin + map - 1) / V + 1 - column, rows = plan.threads / all;
    double2 total{0, 0};
    for (int i = lane; i < rows * columns; i += kWarp) {
      const int right = i % columns, at = i / columns * all + column + right;
      add(total, right == 0 && column * V < begin ? next[at] : here[at]);
    }
    for (int apart = kWarp / 2; apart >= 1; apart /= 2)
      add(total, {__shfl_xor_sync(~0u, total.x, apart), __shfl_xor_sync(~0u, total.y, apart)});
    if (lane == 0) totals[channel] = total;
  }
  __syncthreads();
  return thread < plan.group_channels ? totals[thread] : double2{0, 0};
}

// The blocks that share a group. All blocks of the grid must be resident where parts > 1.
class Team {
 public:
  int index, part;
  bool writes;  // what the last sum() is for: one block of the team

  // The counters are not zero yet: the first block clears them while the others already read their shares.
  __device__ Team(const Plan& plan, double2* partial, unsigned* arrivals)
      : index(blockIdx.x / plan.parts), part(blockIdx.x % plan.parts), writes(part == 0), plan_(plan),
        partial_(partial), arrivals_(arrivals) {
    if (plan.parts == 1) return;
    if (blockIdx.x == 0)
      for (int64_t i = threadIdx.x; i < plan.groups; i += kThreads) arrivals[i] = 0;
    cleared_ = cooperative_groups::this_grid().barrier_arrive();
  }

  // Thread c returns the sum of the group's channel c over the team: in every block of the team, or, without waiting
  // for one another, in the block that comes last.
  template <int V, Order kOrder>
  __device__ double2 sum(int64_t group, const Share<V, kOrder>& share, double2 (&sums)[kLanes<kOrder, V>],
                         bool everywhere = true) {
    double2 of_block;
    if constexpr (kOrder == Order::joined)
      of_block = joined_sum(plan_, share, sums);
    else
      of_block = block_sum(sums, plan_.period);
    if (plan_.parts == 1) return of_block;
    const int channels = plan_.group_channels;  // divides kThreads
    double2* of_group = partial_ + group * plan_.parts * channels;
    if (threadIdx.x < channels) of_group[part * channels + threadIdx.x] = of_block;
    const bool last = arrive(group, everywhere);
    if (!everywhere) {
      writes = last;
      if (!last) return {0, 0};
    }
    double2 total[1] = {{0, 0}};
#pragma unroll 4
    for (int i = threadIdx.x; i < plan_.parts * channels; i += kThreads) add(total[0], __ldcg(&of_group[i]));
    return block_sum(total, channels);
  }

 private:
  // True in the block that comes last.
  __device__ bool arrive(int64_t group, bool wait) {
    const unsigned parts = plan_.parts;
    bool last = false;
    if (!all_cleared_) cooperative_groups::this_grid().barrier_wait(std::move(cleared_));
    all_cleared_ = true;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      last = atomicAdd(&arrivals_[group], 1u) + 1 == parts;
      while (wait && *const_cast<volatile unsigned*>(&arrivals_[group]) < parts) __nanosleep(20);
      __threadfence();
    }
    return __syncthreads_or(last);
  }

  const Plan& plan_;
  double2* partial_;
  unsigned* arrivals_;
  bool all_cleared_ = false;
  cooperative_groups::grid_group::arrival_token cleared_{};
};

// ---- shared memory ---------------------------------------------------------------------------------

// A thread's own part of the block's shared memory, which no other thread touches: the vectors it keeps.
template <class Vec>
__device__ __forceinline__ Vec& slot(int index) {
  DYNAMIC_SHARED(kept_bytes);
  return reinterpret_cast<Vec*>(kept_bytes)[index * kThreads + threadIdx.x];
}

// ---- launches --------------------------------------------------------------------------------------

// What a device holds of a kernel at a time; asked once.
struct Residency {
  int blocks = 0;
  int64_t kept_bytes = 0;  // shared memory of a block for kept vectors
  bool cooperative = false;
};

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

template <auto kKernel>
const Residency& residency(int device) {
  constexpr int kMaxDevices = 64;
  static Residency known[kMaxDevices];
  static std::once_flag once[kMaxDevices];
  require(device < kMaxDevices, "batch_norm_act: at most ", kMaxDevices, " devices");
  std::call_once(once[device], [&] {
    const auto kernel = reinterpret_cast<const void*>(kKernel);
    cudaFuncAttributes of_kernel;
    STD_CUDA_CHECK(cudaFuncGetAttributes(&of_kernel, kernel));
    const int64_t a_block = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) / kBlocksPerMultiprocessor -
                            attribute(cudaDevAttrReservedSharedMemoryPerBlock, device);
    const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    Residency found;
    found.kept_bytes = (std::min(a_block, most) - int64_t(of_kernel.sharedSizeBytes)) / 1024 * 1024;
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(found.kept_bytes)));
    // The first-level cache has nothing to cache here.
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    int blocks = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, found.kept_bytes));
    found.blocks = std::max(blocks, 1) * attribute(cudaDevAttrMultiProcessorCount, device);
    found.cooperative = attribute(cudaDevAttrCooperativeLaunch, device) != 0;
    known[device] = found;
  });
  return known[device];
}

// Whether a kernel's blocks wait for one another, for which they must all be resident together: it then waits itself
// until the device has that much room, for instance behind a collective that is under way.
enum class Blocks { together, apart };

// `keeps`: false where a plan made for a second pass is only needed for the same sums.
template <auto kKernel, int V, Order kOrder, class T, class Args>
void launch_teams(const Cuda& cuda, const Layout& layout, int operands, const Args& args, bool keeps = true,
                  Blocks blocks = Blocks::together) {
  int device = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  const Residency& held = residency<kKernel>(device);
  Plan plan = make_plan(layout, V, sizeof(T), kOrder, operands, held.blocks, held.kept_bytes, held.cooperative);
  if (!keeps) plan.kept = 0;
  const int64_t partials = plan.parts == 1 ? 0 : plan.groups * plan.group_channels * plan.parts;
  const int64_t bytes = partials * sizeof(double2) + plan.groups * sizeof(unsigned);
  const Tensor workspace = cuda.workspace(bytes);
  auto partial = static_cast<double2*>(workspace.mutable_data_ptr());
  auto arrivals = reinterpret_cast<unsigned*>(partial + partials);
  cudaLaunchAttribute together;
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = blocks == Blocks::together && plan.parts > 1;
  cudaLaunchConfig_t config = cuda.launch_config(int64_t(plan.teams) * plan.parts);
  config.dynamicSmemBytes = size_t(plan.kept) * kThreads * sizeof(Vector<T, V>) * operands;
  config.attrs = &together;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kKernel, plan, args, partial, arrivals));
}

template <Order kOrder>
using OrderConstant = std::integral_constant<Order, kOrder>;

// Calls run(vector width, order) as constants.
template <class T, int kMost = kWide<T>, class Run>
void with_shape(const Layout& layout, std::initializer_list<const void*> tensors, const Run& run) {
  if (layout.inner == 1)
    with_width<T, kMost>(layout.channels, tensors, [&](auto width) { run(width, OrderConstant<Order::pixels>{}); });
  else
    with_width<T, kMost>(layout.inner, tensors, [&](auto width) { run(width, OrderConstant<Order::maps>{}); });
}

}  // namespace
}  // namespace auglocal
