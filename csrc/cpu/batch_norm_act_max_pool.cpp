// CPU kernels of batch_norm_act_max_pool: max-pool of relu(BN(x)), which is never stored.
#include "../ops/batch_norm_act_max_pool.h"

#include <limits>

#include "batch_norm.h"

namespace auglocal {
namespace {

// A row is what the inner loops walk: one row of a plane in the contiguous layout, all channels of a pixel in
// channels_last. Calls f(n, first channel, y, x) for every row of a map `height` high and `width` wide, in parallel;
// x is 0 where a row has all of them.
template <class F>
void over_rows_of(const PoolMap& map, int64_t height, int64_t width, const F& f) {
  const bool channels_last = map.channels_last();
  const int64_t planes = map.n * (channels_last ? 1 : map.c), columns = channels_last ? width : 1;
  torch::stable::parallel_for(0, planes * height, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t x = 0; x < columns; ++x) {
        const int64_t plane = row / height;
        f(channels_last ? plane : plane / map.c, channels_last ? 0 : plane % map.c, row % height, x);
      }
  });
}

// One tap of a row of windows: takes x where it is larger than the best so far. NaN wins, as in torch.
template <bool kOfEach, class T, class A>
VECTORISED void take_larger(const T* x, int64_t step, int64_t count, Affines<A> affines, int32_t tap, A* best,
                            int32_t* taps) {
  const A *const mean = affines.mean, *const scale = affines.scale, *const bias = affines.bias;
#pragma omp simd
  for (int64_t l = 0; l < count; ++l) {
    const int64_t c = kOfEach ? l : 0;
    const A value = normalize(A(load(x[l * step])), Affine<A>{mean[c], scale[c], bias[c]});
    const bool larger = value > best[l] || value != value;
    best[l] = larger ? value : best[l];
    taps[l] = larger ? tap : taps[l];
  }
}

template <class T, class A>
VECTORISED void store_row(const A* best, const int32_t* taps, int64_t count, T* y, uint8_t* index) {
#pragma omp simd
  for (int64_t l = 0; l < count; ++l) {
    store(&y[l], relu(best[l]));
    index[l] = uint8_t(taps[l]);
  }
}

// The outputs ow whose tap j lies inside a row of `width` values.
struct Range {
  int64_t begin, end;
};
HD Range inside(int64_t j, int64_t stride, int64_t padding, int64_t width, int64_t out) {
  const int64_t first = padding > j ? (padding - j + stride - 1) / stride : 0;
  const int64_t last = width - 1 + padding - j < 0 ? -1 : (width - 1 + padding - j) / stride;
  return {first, std::min(last + 1, out)};
}

template <bool kChannelsLast, class T, class A = typename Compute<T>::type>
void forward(const PoolMap& map, const MaxPoolArgs<T>& args) {
  const Channels<A> channels(map.c, args.norm);
  const Pool& pool = map.pool;
  const int64_t lanes = kChannelsLast ? map.c : map.out_w;
  over_rows_of(map, map.out_h, map.out_w, [&](int64_t n, int64_t c, int64_t oh, int64_t ow) {
    std::vector<A> best(lanes, -std::numeric_limits<A>::infinity());
    std::vector<int32_t> taps(lanes, 0);
    const Affines<A> affines = channels.affines().from(c);
    for (int64_t i = 0; i < pool.kernel_h; ++i) {
      const int64_t h = oh * pool.stride_h - pool.padding_h + i;
      if (h < 0 || h >= map.h) continue;
      const T* row = args.x + n * map.in.n + c * map.in.c + h * map.in.h;
      for (int64_t j = 0; j < pool.kernel_w; ++j) {
        const int32_t tap = int32_t(i * pool.kernel_w + j);
        if (kChannelsLast) {
          const int64_t w = ow * pool.stride_w - pool.padding_w + j;
          if (w < 0 || w >= map.w) continue;
          take_larger<true>(row + w * map.c, 1, lanes, affines, tap, best.data(), taps.data());
        } else {
          const Range at = inside(j, pool.stride_w, pool.padding_w, map.w, map.out_w);
          if (at.begin >= at.end) continue;
          take_larger<false>(row + at.begin * pool.stride_w - pool.padding_w + j, pool.stride_w, at.end - at.begin,
                             affines, tap, best.data() + at.begin, taps.data() + at.begin);
        }
      }
    }
    const int64_t o = n * map.out.n + c * map.out.c + oh * map.out.h + ow * map.out.w;
    store_row(best.data(), taps.data(), lanes, args.y + o, args.index + o);
  });
}

// Adds to g the gradients of a row of windows that took their maximum from one tap.
template <class T, class A>
VECTORISED void add_taken(const T* grad, const uint8_t* index, int64_t count, int64_t step, int32_t tap, A* g) {
#pragma omp simd
  for (int64_t l = 0; l < count; ++l) g[l * step] += index[l] == tap ? A(load(grad[l])) : A(0);
}

template <bool kOfEach, class T, class A>
VECTORISED void row_input_grad(const A* g, const T* x, T* dx, int64_t count, Affines<A> affines, InputGrads<A> back) {
  const A *const mean = affines.mean, *const scale = affines.scale, *const bias = affines.bias;
  const A *const grad_mean = back.grad_mean, *const projection = back.projection;
#pragma omp simd
  for (int64_t l = 0; l < count; ++l) {
    const int64_t c = kOfEach ? l : 0;
    const A value = load(x[l]);
    const A masked = relu_backward(g[l], normalize(value, Affine<A>{mean[c], scale[c], bias[c]}));
    store(&dx[l], input_grad(masked, value - mean[c], InputGrad<A>{scale[c], grad_mean[c], projection[c]}));
  }
}

// Where each tap of a window lies, and that every other byte lies outside of any map.
struct Taps {
  int64_t row[256], column[256];
  explicit Taps(const Pool& pool) {
    for (int64_t tap = 0; tap < 256; ++tap) {
      row[tap] = tap < pool.kernel_h * pool.kernel_w ? tap / pool.kernel_w : std::numeric_limits<int32_t>::min();
      column[tap] = tap % pool.kernel_w;
    }
  }
};

// The sums over a row of outputs of g and g (x - mean), at the inputs that they took. x: a plane, or an image's first
// channel; h, w: where the first window begins. A tap outside the map, which no forward gives, is nobody's: dx does not
// find it either.
template <bool kOfEach, class T, class A>
VECTORISED void add_row_sums(const T* grad, const uint8_t* index, const T* x, const PoolMap& map, const Taps& taps,
                             int64_t h, int64_t w, Affines<A> affines, double* sums, double* dots) {
  const int64_t count = kOfEach ? map.c : map.out_w;
  for (int64_t l = 0; l < count; ++l) {
    const int64_t c = kOfEach ? l : 0;
    const int64_t row = h + taps.row[index[l]];
    const int64_t column = w + taps.column[index[l]] + (kOfEach ? 0 : l * map.pool.stride_w);
    if (row < 0 || row >= map.h || column < 0 || column >= map.w) continue;
    const A value = load(x[row * map.in.h + column * map.in.w + c]);
    const A g = relu_backward(A(load(grad[l])), normalize(value, affines[c]));
    sums[c] += g;
    dots[c] += double(g) * (value - affines.mean[c]);
  }
}

// The windows over one axis that hold a position: first..last, inclusive; empty if first > last.
struct Windows {
  int64_t first, last;
};
Windows windows_of(int64_t position, int64_t kernel, int64_t stride, int64_t padding, int64_t windows) {
  const int64_t reach = position + padding - kernel + 1;  // the leftmost window start that still holds it
  const int64_t first = reach > 0 ? (reach + stride - 1) / stride : 0, last = (position + padding) / stride;
  return {first, last < windows - 1 ? last : windows - 1};
}

template <bool kChannelsLast, class T, class A = typename Compute<T>::type>
void backward(const PoolMap& map, const MaxPoolBackwardArgs<T>& args) {
  BackwardChannels<A> channels(map.at, args.norm, args.dweight, args.dbias);
  const Affines<A> affines = channels.affines();
  const Pool& pool = map.pool;
  const Taps taps(pool);

  // One image after another, and images' sums in their order: no sum depends on the number of threads.
  std::vector<double> sums(map.n * map.c), dots(map.n * map.c);
  torch::stable::parallel_for(0, map.n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t c = 0; c < (kChannelsLast ? 1 : map.c); ++c)
        for (int64_t oh = 0; oh < map.out_h; ++oh)
          for (int64_t ow = 0; ow < (kChannelsLast ? map.out_w : 1); ++ow) {
            const int64_t o = n * map.out.n + c * map.out.c + oh * map.out.h + ow * map.out.w;
            add_row_sums<kChannelsLast>(args.grad + o, args.index + o, args.x + n * map.in.n + c * map.in.c, map, taps,
                                        oh * pool.stride_h - pool.padding_h, ow * pool.stride_w - pool.padding_w,
                                        affines.from(c), &sums[n * map.c + c], &dots[n * map.c + c]);
          }
  });
  channels.finish(sums, dots);

  const int64_t lanes = kChannelsLast ? map.c : map.w;
  over_rows_of(map, map.h, map.w, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    std::vector<A> g(lanes, A(0));
    const Windows rows = windows_of(h, pool.kernel_h, pool.stride_h, pool.padding_h, map.out_h);
    const Windows columns = windows_of(w, pool.kernel_w, pool.stride_w, pool.padding_w, map.out_w);
    for (int64_t oh = rows.first; oh <= rows.last; ++oh) {
      const int64_t i = h - (oh * pool.stride_h - pool.padding_h);
      const int64_t o = n * map.out.n + c * map.out.c + oh * map.out.h;
      if (kChannelsLast) {
        for (int64_t ow = columns.first; ow <= columns.last; ++ow) {
          const int64_t at = o + ow * map.out.w, j = w - (ow * pool.stride_w - pool.padding_w);
          add_taken(args.grad + at, args.index + at, lanes, 1, int32_t(i * pool.kernel_w + j), g.data());
        }
      } else {
        for (int64_t j = 0; j < pool.kernel_w; ++j) {
          const Range at = inside(j, pool.stride_w, pool.padding_w, map.w, map.out_w);
          if (at.begin >= at.end) continue;
          add_taken(args.grad + o + at.begin, args.index + o + at.begin, at.end - at.begin, pool.stride_w,
                    int32_t(i * pool.kernel_w + j), g.data() + at.begin * pool.stride_w - pool.padding_w + j);
        }
      }
    }
    const int64_t at = n * map.in.n + c * map.in.c + h * map.in.h + w * map.in.w;
    row_input_grad<kChannelsLast>(g.data(), args.x + at, args.dx + at, lanes, affines.from(c),
                                  channels.input_grads().from(c));
  });
}

struct Kernels : Cpu {
  using Cpu::Cpu;

  template <class T>
  void forward(const PoolMap& map, const MaxPoolArgs<T>& args) const {
    map.channels_last() ? auglocal::forward<true, T>(map, args) : auglocal::forward<false, T>(map, args);
  }
  template <class T>
  void backward(const PoolMap& map, const MaxPoolBackwardArgs<T>& args) const {
    map.channels_last() ? auglocal::backward<true, T>(map, args) : auglocal::backward<false, T>(map, args);
  }
};

}  // namespace
}  // namespace auglocal

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  auglocal::implement<auglocal::Kernels, auglocal::BatchNormActMaxPoolApply, auglocal::BatchNormActMaxPoolBackwardOut>(
      m);
}
