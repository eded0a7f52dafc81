// CUDA kernels of batch_norm_act_max_pool: max-pool of relu(BN(x)), which is never stored.
//
// Every thread keeps to its channels and walks over pixels: of the output in the forward and in the backward's sums,
// of the input where dx is written. Windows overlap: the first-level cache serves what a block reads twice.
//
// Nothing is scattered and nothing is summed by atomics: two runs give the same bits.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../ops/batch_norm_act_max_pool.h"
#include "batch_norm.cuh"

namespace auglocal {
namespace {

constexpr int64_t kBlocks = 2048;       // a few times what a GPU holds: enough to fill it evenly
constexpr int64_t kThreadValues = 64;   // of a thread, at most, where no partial sums limit the number of blocks
constexpr int64_t kMaxImage = 1 << 30;  // values of an image: offsets within one take 32 bits

// Division by a number known at the launch: numbers below 2^31, a multiplication each.
struct Divisor {
  uint32_t divisor, magic;
  int shift;
  Divisor() = default;
  explicit Divisor(int64_t by) : divisor(uint32_t(by)), shift(31) {
    while (int64_t(1) << (shift - 31) < by) ++shift;
    magic = uint32_t(((uint64_t(1) << shift) + divisor - 1) / divisor);
  }
  __device__ int quotient(int value) const { return int(uint64_t(uint32_t(value)) * magic >> shift); }
};

// The windows along one axis.
struct Axis {
  int size, windows, kernel, stride, padding;
  Divisor by_kernel, by_stride;
  Axis(int64_t size, int64_t windows, int64_t kernel, int64_t given_stride, int64_t padding)
      : size(int(size)), windows(int(windows)), kernel(int(kernel)),
        stride(int(std::min(given_stride, size + padding))),  // a longer one, of one window, leaves the axis as well
        padding(int(padding)), by_kernel(kernel), by_stride(stride) {}

  __device__ bool has(int position) const { return position >= 0 && position < size; }
  __device__ int begin(int window) const { return window * stride - padding; }
  __device__ int first_holding(int position) const {
    const int before = position + padding - kernel;  // the last window start that does not hold it any more
    return before < 0 ? 0 : by_stride.quotient(before) + 1;
  }
  __device__ int last_holding(int position) const { return min(by_stride.quotient(position + padding), windows - 1); }
};

// Where the values of a feature map lie, in either layout.
struct Image {
  int64_t values;
  int of_channel, of_row, of_column;
  explicit Image(const Strides& strides)
      : values(strides.n), of_channel(int(strides.c)), of_row(int(strides.h)), of_column(int(strides.w)) {
    require(values <= kMaxImage, "batch_norm_act_max_pool: at most 2^30 values an image, given ", values);
  }
  __device__ int64_t at(int64_t n, int c, int h, int w) const {
    return n * values + (c * of_channel + h * of_row + w * of_column);
  }
};

struct Map {
  Axis rows, columns;
  Image in, out;
  explicit Map(const PoolMap& of)
      : rows(of.h, of.out_h, of.pool.kernel_h, of.pool.stride_h, of.pool.padding_h),
        columns(of.w, of.out_w, of.pool.kernel_w, of.pool.stride_w, of.pool.padding_w), in(of.in), out(of.out) {}
};

// ---- the walk --------------------------------------------------------------------------------------

// A block has a group of channels, `columns` vectors beside one another (contiguous: one channel), and a part of the
// pixels, `lanes` of them at a time, `steps` times. In channels_last it holds few at a time: pixels are counted down
// the columns of a band of rows, so that these are a square and not a line, and overlap in more.
struct Walk {
  int64_t pixels;  // of all images; in a contiguous tensor a pixel may be a vector of several
  int channels, columns, lanes, groups, parts, steps;
  int plane;                     // pixels of an image
  int step_images, step_pixels;  // from one pixel of a thread to its next
  int band_bits;                 // log2 of a band's rows, which divide the height
  Divisor width;
};

Walk make_walk(const Layout& at, int vector, int64_t images, int64_t height, int64_t width, int64_t most_steps) {
  const bool channels_last = at.format == MemoryFormat::ChannelsLast;
  Walk walk{};
  walk.pixels = images * height * width;
  walk.channels = int(at.channels);
  const int64_t vectors = at.channels / vector;
  walk.columns = channels_last ? int(ceil_div(vectors, ceil_div(vectors, kThreads))) : 1;
  walk.lanes = kThreads / walk.columns;
  walk.groups = int(ceil_div(vectors, walk.columns));
  const int64_t blocks = std::max<int64_t>(kBlocks / walk.groups, 1);
  walk.steps = int(std::min(ceil_div(walk.pixels, walk.lanes * blocks), most_steps));
  walk.parts = int(ceil_div(walk.pixels, int64_t(walk.lanes) * walk.steps));
  walk.plane = int(height * width);
  walk.step_images = walk.lanes / walk.plane;
  walk.step_pixels = walk.lanes % walk.plane;
  while (channels_last && walk.band_bits < 3 && (height >> walk.band_bits) % 2 == 0) ++walk.band_bits;
  walk.width = Divisor(width);
  return walk;
}

// A thread's place: its first channel and pixel, and how many pixels it has.
struct Place {
  int part, column, lane, channel, pixels;
  int64_t first;
  __device__ Place(const Walk& walk, int vector) {
    part = blockIdx.x / walk.groups;
    lane = threadIdx.x / walk.columns;
    column = threadIdx.x - lane * walk.columns;
    channel = ((blockIdx.x - part * walk.groups) * walk.columns + column) * vector;
    first = int64_t(part) * walk.steps * walk.lanes + lane;
    const int left = int(min(walk.pixels - first, int64_t(walk.steps) * walk.lanes));
    const bool works = lane < walk.lanes && channel < walk.channels && left > 0;
    pixels = works ? (left + walk.lanes - 1) / walk.lanes : 0;
  }
};

// Calls visit(image, row, column) for each pixel of a thread.
template <int kUnroll, class Visit>
__device__ __forceinline__ void for_each_pixel(const Walk& walk, const Place& place, const Visit& visit) {
  int64_t image = place.first / walk.plane;
  int pixel = int(place.first - image * walk.plane);
#pragma unroll kUnroll
  for (int i = 0; i < place.pixels; ++i) {
    // Of a band first every other row, then those between: pixels beside one another lie in as many windows.
    const int twice = 2 * (pixel & ((1 << walk.band_bits) - 1)), across = pixel >> walk.band_bits;
    const int in_band = (twice | twice >> walk.band_bits) & ((1 << walk.band_bits) - 1);
    const int band = walk.width.quotient(across);
    visit(image, (band << walk.band_bits) + in_band, across - band * int(walk.width.divisor));
    image += walk.step_images;
    pixel += walk.step_pixels;
    if (pixel >= walk.plane) {
      pixel -= walk.plane;
      ++image;
    }
  }
}

// ---- the kernels -----------------------------------------------------------------------------------

// Once for all blocks of the forward: each thread would repeat V square roots and divisions in double.
template <class A>
__global__ void __launch_bounds__(kThreads) affine_kernel(int channels, const Norm<A> norm, Affine<A>* affines) {
  const int channel = blockIdx.x * kThreads + threadIdx.x;
  if (channel < channels) affines[channel] = norm.affine(channel);
}

template <class T, int V, class A = typename Compute<T>::type>
__global__ void __launch_bounds__(kThreads, V == 8 ? 3 : 4)
    forward_kernel(const Walk walk, const Map map, const T* x, const Affine<A>* affines, T* y, uint8_t* index) {
  constexpr int kRows = V == 1 ? 3 : 1, kTaps = 3;  // of a window, whose loads are in flight together
  const Place place(walk, V);
  if (place.pixels == 0) return;
  Affine<A> affine[V];
#pragma unroll
  for (int v = 0; v < V; ++v) affine[v] = affines[place.channel + v];
  for_each_pixel<1>(walk, place, [&](int64_t n, int oh, int ow) {
    const int top = map.rows.begin(oh), left = map.columns.begin(ow);
    const int first_row = max(-top, 0), end_row = min(map.rows.kernel, map.rows.size - top);
    const int first_column = max(-left, 0), end_column = min(map.columns.kernel, map.columns.size - left);
    A best[V];
    int tap[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      best[v] = A(-INFINITY);
      tap[v] = first_row * map.columns.kernel + first_column;
    }
    // Of equal values the first wins: several rows at a time only where each of them is met at once.
    const int rows = map.columns.kernel <= kTaps ? kRows : 1;
    for (int i = first_row; i < end_row; i += rows) {
      const int end = min(i + rows, end_row);
      for (int j = first_column; j < end_column; j += kTaps) {
        const T* from = x + map.in.at(n, place.channel, top + i, left + j);
        Vector<T, V> loaded[kRows * kTaps];
#pragma unroll
        for (int k = 0; k < kRows * kTaps; ++k)
          if (i + k / kTaps < end && j + k % kTaps < end_column)
            loaded[k] = read<V>(from + (k / kTaps * map.in.of_row + k % kTaps * map.in.of_column));
#pragma unroll
        for (int k = 0; k < kRows * kTaps; ++k) {
          if (i + k / kTaps >= end || j + k % kTaps >= end_column) continue;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A value = normalize(get<A>(loaded[k], v), affine[v]);
            if (value > best[v] || value != value) {  // NaN wins, as in torch
              best[v] = value;
              tap[v] = (i + k / kTaps) * map.columns.kernel + j + k % kTaps;
            }
          }
        }
      }
    }
    const int64_t o = map.out.at(n, place.channel, oh, ow);
    Vector<T, V> values{};
    Vector<uint8_t, V> taps{};
#pragma unroll
    for (int v = 0; v < V; ++v) {
      set<A>(values, v, relu(best[v]));
      taps.set(v, uint8_t(tap[v]));
    }
    write<V>(y + o, values);
    write<V>(index + o, taps);
  });
}

// The same for contiguous maps under the windows of a ResNet's stem: 3 taps wide, stride 2, padding 1. A thread makes
// outputs beside one another: whole vectors of a row, and the value on their left, hold all their taps.
constexpr int kOutputs = 4;

bool in_rows(const Pool& pool, int64_t width, int64_t windows) {
  return pool.kernel_w == 3 && pool.stride_w == 2 && pool.padding_w == 1 && width == 2 * windows &&
         windows % kOutputs == 0;
}

template <class T, class A = typename Compute<T>::type>
__global__ void __launch_bounds__(kThreads, 4)
    forward_rows_kernel(const Walk walk, const Map map, const T* x, const Affine<A>* affines, T* y, uint8_t* index) {
  constexpr int kRows = 3, kTaps = 3, kWidth = kWide<T>, kVectors = 2 * kOutputs / kWidth;
  const Place place(walk, 1);
  if (place.pixels == 0) return;
  const Affine<A> affine = affines[place.channel];
  for_each_pixel<1>(walk, place, [&](int64_t n, int oh, int column) {
    const int ow = column * kOutputs, top = map.rows.begin(oh);
    const int first_row = max(-top, 0), end_row = min(map.rows.kernel, map.rows.size - top);
    const bool padded = ow == 0;
    A best[kOutputs];
    int tap[kOutputs];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      best[o] = A(-INFINITY);
      tap[o] = first_row * kTaps + (padded && o == 0 ? 1 : 0);
    }
    for (int i = first_row; i < end_row; i += kRows) {
      const T* from = x + map.in.at(n, place.channel, top + i, 2 * ow);
      T left[kRows];
      Vector<T, kWidth> loaded[kRows][kVectors];
#pragma unroll
      for (int row = 0; row < kRows; ++row, from += map.in.of_row) {
        if (i + row >= end_row) continue;
        if (!padded) left[row] = from[-1];
#pragma unroll
        for (int k = 0; k < kVectors; ++k) loaded[row][k] = read<kWidth>(from + k * kWidth);
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (i + row >= end_row) continue;
        A values[1 + 2 * kOutputs];
        values[0] = padded ? A(-INFINITY) : normalize(A(load(left[row])), affine);  // which never wins
#pragma unroll
        for (int k = 0; k < 2 * kOutputs; ++k)
          values[1 + k] = normalize(get<A>(loaded[row][k / kWidth], k % kWidth), affine);
#pragma unroll
        for (int o = 0; o < kOutputs; ++o)
#pragma unroll
          for (int j = 0; j < kTaps; ++j) {
            const A value = values[2 * o + j];
            if (value > best[o] || value != value) {  // NaN wins, as in torch
              best[o] = value;
              tap[o] = (i + row) * kTaps + j;
            }
          }
      }
    }
    const int64_t at = map.out.at(n, place.channel, oh, ow);
    Vector<T, kOutputs> outputs{};
    Vector<uint8_t, kOutputs> taps{};
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      set<A>(outputs, o, relu(best[o]));
      taps.set(o, uint8_t(tap[o]));
    }
    write<kOutputs>(y + at, outputs);
    write<kOutputs>(index + at, taps);
  });
}

// The sum over the lanes, `columns` values a lane, to lane 0; in one order.
__device__ __forceinline__ double2 block_sum(double2 value, int lane, int column, int lanes, int columns) {
  SHARED(sums, kThreads, double2);
  double2& mine = sums[threadIdx.x];
  mine = value;
  while (lanes > 1) {
    const int half = (lanes + 1) / 2;
    __syncthreads();
    if (lane + half < lanes) add(mine, sums[(lane + half) * columns + column]);
    lanes = half;
  }
  return mine;
}

// Sums over a block's outputs of g and of g * (x - mean), where g is the gradient behind the mask of the value that
// was the maximum. A thread has one channel: a warp's reads of x then fall into few lines, where with a vector of
// channels a thread each read would fall into another. Registers for the loads of four outputs in flight.
template <class T, class A = typename Compute<T>::type>
__global__ void __launch_bounds__(kThreads, 4) sums_kernel(const Walk walk, const Map map, const T* grad, const T* x,
                                                           const uint8_t* index, const Norm<A> norm, double2* partial) {
  const Place place(walk, 1);
  A sum = 0, dot = 0;
  if (place.pixels > 0) {
    const Affine<A> affine = norm.affine(place.channel);
    for_each_pixel<4>(walk, place, [&](int64_t n, int oh, int ow) {
      const int64_t o = map.out.at(n, place.channel, oh, ow);
      const int tap = index[o], i = map.columns.by_kernel.quotient(tap), j = tap - i * map.columns.kernel;
      const int h = map.rows.begin(oh) + i, w = map.columns.begin(ow) + j;
      // A tap outside the map, which no forward gives, is nobody's: dx does not find it either.
      const bool inside = i < map.rows.kernel && map.rows.has(h) && map.columns.has(w);
      const A value = inside ? A(load(x[map.in.at(n, place.channel, h, w)])) : affine.mean;
      const A g = inside ? relu_backward(A(load(grad[o])), normalize(value, affine)) : A(0);
      sum += g;
      dot = mul_add(g, value - affine.mean, dot);
    });
  }
  const double2 total = block_sum({double(sum), double(dot)}, place.lane, place.column, walk.lanes, walk.columns);
  if (place.lane == 0 && place.channel < walk.channels)
    partial[int64_t(place.channel) * walk.parts + place.part] = total;
}

// A block a channel: adds up the partial sums and derives what dx needs.
template <class A>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const double2* partial, int parts, double count, const Norm<A> norm, Affine<A>* affines,
                  A* grad_means, A* projections, A* dweight, A* dbias) {
  const int channel = blockIdx.x;
  double2 sum{0, 0};
  for (int i = threadIdx.x; i < parts; i += kThreads) add(sum, partial[int64_t(channel) * parts + i]);
  const double2 total = block_sum(sum, threadIdx.x, 0, kThreads, 1);
  if (threadIdx.x > 0) return;
  const Affine<A> affine = norm.affine(channel);
  const ChannelGrad<A> of_channel = channel_grad(total.x, total.y, count, norm.var[channel], affine.scale, norm.eps);
  affines[channel] = affine;
  grad_means[channel] = of_channel.back.grad_mean;
  projections[channel] = of_channel.back.projection;
  dweight[channel] = of_channel.dweight;
  dbias[channel] = of_channel.dbias;
}

// Gathers for each input value the gradients of the windows whose maximum it was. A thread's vector lies across
// channels or, contiguous, along a row. dx may be x: a thread reads no other values of x than those it writes.
template <class T, int V, bool kChannelsLast, class A = typename Compute<T>::type>
__global__ void __launch_bounds__(kThreads, 3)
    input_grad_kernel(const Walk walk, const Map map, const T* grad, const T* x, const uint8_t* index,
                      const Affine<A>* affines, const A* grad_means, const A* projections, T* dx) {
  constexpr int kLanes = kChannelsLast ? V : 1;      // channels of a vector
  constexpr int kRight = kChannelsLast ? 0 : V - 1;  // from its first column to its last
  constexpr int kWindows = kRight / 2 + 2;           // whose loads are in flight together: a row's, at stride 2
  const Place place(walk, kLanes);
  if (place.pixels == 0) return;
  Affine<A> affine[kLanes];
#pragma unroll
  for (int v = 0; v < kLanes; ++v) affine[v] = affines[place.channel + v];
  for_each_pixel<1>(walk, place, [&](int64_t n, int h, int column) {
    const int w = kChannelsLast ? column : column * V;
    const int64_t at = map.in.at(n, place.channel, h, w);
    const Vector<T, V> values = read<V>(x + at);
    const int last_row = map.rows.last_holding(h);
    const int first_column = map.columns.first_holding(w), last_column = map.columns.last_holding(w + kRight);
    A sum[V] = {};
    for (int oh = map.rows.first_holding(h); oh <= last_row; ++oh) {
      const int first_tap = (h - map.rows.begin(oh)) * map.columns.kernel;
      int64_t o = map.out.at(n, place.channel, oh, first_column);
      for (int ow = first_column; ow <= last_column; ow += kWindows, o += kWindows * map.out.of_column) {
        Vector<T, kLanes> grads[kWindows];
        Vector<uint8_t, kLanes> taps[kWindows];
#pragma unroll
        for (int k = 0; k < kWindows; ++k) {
          if (ow + k > last_column) continue;
          grads[k] = read<kLanes>(grad + o + k * map.out.of_column);
          taps[k] = read<kLanes>(index + o + k * map.out.of_column);
        }
#pragma unroll
        for (int k = 0; k < kWindows; ++k) {
          if (ow + k > last_column) continue;
          const int from_window = w - map.columns.begin(ow + k);
          if constexpr (kChannelsLast) {
#pragma unroll
            for (int v = 0; v < V; ++v)
              if (taps[k].get(v) == first_tap + from_window) sum[v] += get<A>(grads[k], v);
          } else {
            const int tap = taps[k].get(0) - first_tap;  // in another row of the window if not in 0 .. kernel - 1
            const int taken = tap >= 0 && tap < map.columns.kernel ? tap - from_window : -1;
#pragma unroll
            for (int v = 0; v < V; ++v) sum[v] += taken == v ? get<A>(grads[k], 0) : A(0);
          }
        }
      }
    }
    // Read here, from the cache, as registers are short.
    const Vector<A, kLanes> grad_mean = read<kLanes>(grad_means + place.channel);
    const Vector<A, kLanes> projection = read<kLanes>(projections + place.channel);
    Vector<T, V> result{};
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int lane = kChannelsLast ? v : 0;
      const InputGrad<A> back{affine[lane].scale, grad_mean.get(lane), projection.get(lane)};
      const A value = get<A>(values, v), g = relu_backward(sum[v], normalize(value, affine[lane]));
      set<A>(result, v, input_grad(g, value - affine[lane].mean, back));
    }
    write<V>(dx + at, result);
  });
}

// ---- the ops ---------------------------------------------------------------------------------------

int64_t blocks_of(const Walk& walk) { return int64_t(walk.parts) * walk.groups; }

struct Kernels : Cuda {
  using Cuda::Cuda;

  template <class T, class A = typename Compute<T>::type>
  void forward(const PoolMap& of, const MaxPoolArgs<T>& args) const {
    const Map map(of);
    const Tensor affines = workspace(of.c * sizeof(Affine<A>));
    const auto of_channels = static_cast<Affine<A>*>(affines.mutable_data_ptr());
    launch(affine_kernel<A>, ceil_div(of.c, kThreads), of.c, args.norm, of_channels);
    if constexpr (kWide<T> > 1) {
      if (!of.channels_last() && in_rows(of.pool, of.w, of.out_w) && aligned({args.x, args.y, args.index}, 16)) {
        const Walk walk = make_walk(of.at, 1, of.n, of.out_h, of.out_w / kOutputs, kThreadValues / kOutputs);
        launch(forward_rows_kernel<T>, blocks_of(walk), walk, map, args.x, of_channels, args.y, args.index);
        return;
      }
    }
    with_width<T>(of.channels_last() ? of.c : 1, {args.x, args.y, args.index}, [&](auto width) {
      const Walk walk = make_walk(of.at, width, of.n, of.out_h, of.out_w, kThreadValues / width);
      launch(forward_kernel<T, width>, blocks_of(walk), walk, map, args.x, of_channels, args.y, args.index);
    });
  }

  template <class T, class A = typename Compute<T>::type>
  void backward(const PoolMap& of, const MaxPoolBackwardArgs<T>& args) const {
    const Map map(of);
    const Walk outputs = make_walk(of.at, 1, of.n, of.out_h, of.out_w, std::numeric_limits<int>::max());
    const Tensor partials = workspace(of.c * outputs.parts * sizeof(double2));
    const Tensor affines = workspace(of.c * sizeof(Affine<A>));
    const Tensor grad_means = workspace(of.c * sizeof(A)), projections = workspace(of.c * sizeof(A));
    const auto partial = static_cast<double2*>(partials.mutable_data_ptr());
    const auto of_channels = static_cast<Affine<A>*>(affines.mutable_data_ptr());
    const auto grad_mean = static_cast<A*>(grad_means.mutable_data_ptr());
    const auto projection = static_cast<A*>(projections.mutable_data_ptr());
    launch(sums_kernel<T>, blocks_of(outputs), outputs, map, args.grad, args.x, args.index, args.norm, partial);
    launch(finish_kernel<A>, of.c, partial, outputs.parts, double(of.at.count()), args.norm, of_channels, grad_mean,
           projection, args.dweight, args.dbias);
    const auto run = [&](auto width, auto channels_last) {
      constexpr int kLanes = channels_last ? width : 1;
      const Walk inputs = make_walk(of.at, kLanes, of.n, of.h, of.w * kLanes / width, kThreadValues / width);
      launch(input_grad_kernel<T, width, channels_last>, blocks_of(inputs), inputs, map, args.grad, args.x, args.index,
             of_channels, grad_mean, projection, args.dx);
    };
    const std::initializer_list<const void*> tensors{args.grad, args.x, args.index, args.dx};
    if (of.channels_last())
      with_width<T>(of.c, tensors, [&](auto width) { run(width, std::true_type{}); });
    else
      with_width<T>(of.w, tensors, [&](auto width) { run(width, std::false_type{}); });
  }
};

}  // namespace
}  // namespace auglocal

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CUDA, m) {
  auglocal::implement<auglocal::Kernels, auglocal::BatchNormActMaxPoolApply, auglocal::BatchNormActMaxPoolBackwardOut>(
      m);
}
