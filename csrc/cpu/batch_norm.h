// What the CPU kernels around BatchNorm share: walking a feature map, and its statistics. Sums run in the tensor's
// precision over a few hundred values and in double beyond, in one fixed order, so that they are exact to about
// the last bit, and the same bits on every run and for every number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../ops/op.h"

// One binary serves every x86-64: the loops are compiled three times and chosen when loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif

namespace auglocal {

constexpr int64_t kBlock = 4096;  // values a block holds: each has its own centre for its sums of squares
constexpr int64_t kSpan = 512;    // values summed before their sum goes to double
constexpr int64_t kTile = 16;     // values in registers at a time; channels_last: of as many channels
constexpr int64_t kRows = 32;     // and rows of them, before the sums go to double

// ---- walking a feature map -------------------------------------------------------------------------

// What a call of an op needs besides kernels: see ops/op.h. CUDA's counterpart is in cuda/batch_norm.cuh.
struct Cpu {
  explicit Cpu(const Tensor&) {}
  static Tensor for_any_vector(const Tensor& x) { return x; }
};

// Constants of neighbouring channels. Loops that the compiler is to vectorise take the pointers out first: it does not
// look through the structs.
template <class A>
struct Affines {
  const A *mean, *scale, *bias;
  HD Affine<A> operator[](int64_t c) const { return {mean[c], scale[c], bias[c]}; }
  HD Affines from(int64_t c) const { return {mean + c, scale + c, bias + c}; }
};
template <class A>
struct InputGrads {
  const A *scale, *grad_mean, *projection;
  HD InputGrad<A> operator[](int64_t c) const { return {scale[c], grad_mean[c], projection[c]}; }
  HD InputGrads from(int64_t c) const { return {scale + c, grad_mean + c, projection + c}; }
};

template <class A>
class Channels {
 public:
  Channels(int64_t n, const Norm<A>& norm) : n_(n), norm_(norm), scale_(n) {
    for (int64_t c = 0; c < n; ++c) scale_[c] = norm.affine(c).scale;
  }
  Affines<A> affines() const { return {norm_.mean, scale_.data(), norm_.bias}; }

 protected:
  int64_t n_;
  Norm<A> norm_;
  std::vector<A> scale_;
};

// With what dx needs, and the parameters' gradients: both follow from sums over the channels.
template <class A>
class BackwardChannels : public Channels<A> {
 public:
  // sums: null, or where the sums themselves go, those of g before those of g * (x - mean).
  BackwardChannels(const Layout& at, const Norm<A>& norm, A* dweight, A* dbias, double* sums = nullptr)
      : Channels<A>(at.channels, norm), count_(double(at.count())), dweight_(dweight), dbias_(dbias), sums_(sums),
        grad_mean_(at.channels), projection_(at.channels) {}

  void finish(int64_t c, double sum, double dot) {
    const ChannelGrad<A> made = keep(c, sum, dot, count_);
    dweight_[c] = made.dweight;
    dbias_[c] = made.dbias;
    if (sums_) sums_[c] = sum, sums_[this->n_ + c] = dot;
  }
  // Instead, where the sums divided by their counts are known already: those of g before those of g * (x - mean).
  void given(const double* means) {
    for (int64_t c = 0; c < this->n_; ++c) keep(c, means[c], means[this->n_ + c], 1);
  }
  // Of all channels: the sums of several parts, each with one a channel, added in order.
  void finish(const std::vector<double>& sums, const std::vector<double>& dots) {
    for (int64_t c = 0; c < this->n_; ++c) {
      double sum = 0, dot = 0;
      for (size_t i = c; i < sums.size(); i += this->n_) sum += sums[i], dot += dots[i];
      finish(c, sum, dot);
    }
  }
  InputGrads<A> input_grads() const { return {this->scale_.data(), grad_mean_.data(), projection_.data()}; }

 private:
  ChannelGrad<A> keep(int64_t c, double sum, double dot, double count) {
    const auto& norm = this->norm_;
    const ChannelGrad<A> made = channel_grad(sum, dot, count, double(norm.var[c]), this->scale_[c], norm.eps);
    grad_mean_[c] = made.back.grad_mean;
    projection_[c] = made.back.projection;
    return made;
  }

  double count_;
  A *dweight_, *dbias_;
  double* sums_;
  std::vector<A> grad_mean_, projection_;
};

// Some of a channel's values in the contiguous layout: whole planes, or a piece of one.
struct Block {
  int64_t begin, planes, stride, length;  // first value; planes, how far apart, and values of each
  int64_t count() const { return planes * length; }
};

// A second walk over the same values goes from the end: what the first one saw last is still in the cache.
enum class From { start, end };

// Calls f(block) for blocks of about kBlock values that make up the channel.
template <class F>
void for_each_block(const Layout& at, int64_t channel, From from, const F& f) {
  const int64_t stride = at.channels * at.inner, at_once = std::max<int64_t>(kBlock / at.inner, 1);
  const int64_t groups = (at.outer + at_once - 1) / at_once;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t n = (from == From::start ? group : groups - 1 - group) * at_once;
    for (int64_t i = 0; i < at.inner; i += kBlock)
      f(Block{n * stride + channel * at.inner + i, std::min(at_once, at.outer - n), stride,
              std::min(kBlock, at.inner - i)});
  }
}

// Into how many tasks the rows of a map are cut, however many threads there are.
inline int64_t row_tasks(const Layout& at) {
  const int64_t at_least = std::max<int64_t>(kRows, 2 * kBlock / std::max<int64_t>(at.channels, 1));
  return std::min<int64_t>((at.outer + at_least - 1) / at_least, 64);
}

// Calls f(task, first row, number of rows) for every task, in parallel.
template <class F>
void over_row_tasks(const Layout& at, From from, const F& f) {
  const int64_t tasks = row_tasks(at);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t task = from == From::start ? i : begin + end - 1 - i, row = task * at.outer / tasks;
      f(task, row, (task + 1) * at.outer / tasks - row);
    }
  });
}

template <class F>
void over_channels(const Layout& at, const F& f) {
  torch::stable::parallel_for(0, at.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(c);
  });
}

// ---- tiles -----------------------------------------------------------------------------------------

// kTile neighbouring values in one register: arrays of sums would be kept in memory, where each addition waits for
// the last one's store.
template <class A>
struct LanesOf {
  typedef A type __attribute__((vector_size(kTile * sizeof(A))));
};
template <class A>
using Lanes = typename LanesOf<A>::type;

typedef uint16_t NarrowBits __attribute__((vector_size(kTile * sizeof(uint16_t))));
typedef uint32_t WideBits __attribute__((vector_size(kTile * sizeof(uint32_t))));

// Calls f(first channel, how many) for every tile of the channels. How many is a constant, known when compiled, for
// whole tiles; the last one may be narrower. f has to be inlined: a call would be to the code for any x86-64.
#define INLINED __attribute__((always_inline))
using WholeTile = std::integral_constant<int64_t, kTile>;
template <class F>
HD void for_each_tile(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kTile <= channels; c += kTile) f(c, WholeTile());
  if (c < channels) f(c, channels - c);
}

template <class A>
HD Lanes<A> load_tile(const A* from) {
  Lanes<A> lanes;
  memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}
HD WideBits load_bits(const void* from) {
  NarrowBits narrow;
  memcpy(&narrow, from, sizeof(narrow));
  return __builtin_convertvector(narrow, WideBits);
}
HD Lanes<float> load_tile(const bf16* from) {
  const WideBits wide = load_bits(from) << 16;
  Lanes<float> lanes;
  memcpy(&lanes, &wide, sizeof(lanes));
  return lanes;
}
HD Lanes<float> load_tile(const fp16* from) { return from_fp16<Lanes<float>>(load_bits(from)); }

// The first `width` of kTile values, zeros behind them.
template <class T>
HD Lanes<typename Compute<T>::type> load_tile(const T* from, int64_t width) {
  if (width == kTile) return load_tile(from);
  Lanes<typename Compute<T>::type> lanes = {};
  for (int64_t c = 0; c < width; ++c) lanes[c] = load(from[c]);
  return lanes;
}

template <class A>
HD void store_tile(A* to, const Lanes<A>& lanes) {
  memcpy(to, &lanes, sizeof(lanes));
}
HD void store_bits(void* to, const WideBits& wide) {
  const NarrowBits narrow = __builtin_convertvector(wide, NarrowBits);
  memcpy(to, &narrow, sizeof(narrow));
}
HD void store_tile(bf16* to, const Lanes<float>& lanes) {
  WideBits bits;  // rounded as by store, which lane by lane would not be vectorised
  memcpy(&bits, &lanes, sizeof(bits));
  const WideBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  store_bits(to, lanes != lanes ? WideBits{} + 0x7fc0u : rounded);
}
HD void store_tile(fp16* to, const Lanes<float>& lanes) { store_bits(to, to_fp16<WideBits>(lanes)); }
template <class T, class A>
HD void store_tile(T* to, const A& lanes, int64_t width) {
  if (width == kTile) return store_tile(to, lanes);
  for (int64_t c = 0; c < width; ++c) store(&to[c], lanes[c]);
}

template <class A, class Width>
HD Affine<Lanes<A>> load_tile(const Affines<A>& from, Width width) {
  return {load_tile(from.mean, width), load_tile(from.scale, width), load_tile(from.bias, width)};
}
template <class A, class Width>
HD InputGrad<Lanes<A>> load_tile(const InputGrads<A>& from, Width width) {
  return {load_tile(from.scale, width), load_tile(from.grad_mean, width), load_tile(from.projection, width)};
}

// Adds the first `width` lanes to sums in double.
template <class A>
HD void add(double* to, const Lanes<A>& lanes, int64_t width = kTile) {
  if (width == kTile)
    for (int64_t c = 0; c < kTile; ++c) to[c] += lanes[c];
  else
    for (int64_t c = 0; c < width; ++c) to[c] += lanes[c];
}

// ---- statistics ------------------------------------------------------------------------------------

// Squares are summed in the same pass as the values, around a centre: the mean of the first few values. However far
// from the mean it is, those values are then as far, and the variance so large that nothing cancels.

// Calls f(first value, its plane's last + 1) for runs of up to kSpan values of a block, and flush() after about as
// many.
template <class Span, class Flush>
HD void for_each_span(const Block& block, const Span& f, const Flush& flush) {
  const int64_t at_once = std::max<int64_t>(kSpan / block.length, 1);
  for (int64_t first = 0; first < block.planes; first += at_once)
    for (int64_t begin = 0; begin < block.length; begin += kSpan) {
      for (int64_t p = first; p < std::min(first + at_once, block.planes); ++p)
        f(p * block.stride + begin, p * block.stride + std::min(begin + kSpan, block.length));
      flush();
    }
}

// The mean of a block's first span.
template <class A, class T>
HD A centre_of(const T* x, const Block& block) {
  const int64_t planes = std::min(std::max<int64_t>(kSpan / block.length, 1), block.planes);
  const int64_t length = std::min(kSpan, block.length);
  Lanes<A> sums = {};
  for (int64_t p = 0; p < planes; ++p) {
    int64_t i = p * block.stride;
    const int64_t end = i + length;
    for (; i + kTile <= end; i += kTile) sums += load_tile(x + i);
    for (int64_t l = 0; i + l < end; ++l) sums[l] += load(x[i + l]);
  }
  A sum = 0;
  for (int64_t l = 0; l < kTile; ++l) sum += sums[l];
  return sum / A(planes * length);
}

template <class A, class T>
VECTORISED void block_moments(const T* x, const Block block, double* mean, double* m2) {
  const double n = double(block.count());
  const A centre = centre_of<A>(x, block);
  double firsts[kTile] = {}, seconds[kTile] = {}, first = 0, second = 0;
  Lanes<A> sum = {}, squares = {};
  for_each_span(
      block,
      [&](int64_t i, int64_t end) {
        for (; i + kTile <= end; i += kTile) {
          const Lanes<A> d = load_tile(x + i) - centre;
          sum += d;
          squares += d * d;
        }
        for (int64_t l = 0; i + l < end; ++l) {
          const A d = load(x[i + l]) - centre;
          sum[l] += d;
          squares[l] += d * d;
        }
      },
      [&] {
        add<A>(firsts, sum);
        add<A>(seconds, squares);
        sum = squares = Lanes<A>{};
      });
  for (int64_t l = 0; l < kTile; ++l) first += firsts[l], second += seconds[l];
  *mean = centre + first / n;
  *m2 = second - first * first / n;
}

// The moments of every channel over a task's rows; centre: room for one value a channel.
template <class A, class T>
VECTORISED void rows_moments(const T* x, int64_t rows, int64_t channels, A* centre, double* mean, double* m2) {
  const int64_t head = std::min(kRows, rows);
  for_each_tile(channels, [&](int64_t c, auto width) INLINED {
    Lanes<A> sum = {};
    for (int64_t r = 0; r < head; ++r) sum += load_tile(x + r * channels + c, width);
    store_tile(centre + c, sum / A(head), width);
  });
  for (int64_t c = 0; c < channels; ++c) mean[c] = m2[c] = 0;
  for (int64_t begin = 0; begin < rows; begin += kRows)
    for_each_tile(channels, [&](int64_t c, auto width) INLINED {
      const Lanes<A> centres = load_tile(centre + c, width);
      Lanes<A> sum = {}, squares = {};
      for (int64_t r = begin; r < std::min(begin + kRows, rows); ++r) {
        const Lanes<A> d = load_tile(x + r * channels + c, width) - centres;
        sum += d;
        squares += d * d;
      }
      add<A>(mean + c, sum, width);
      add<A>(m2 + c, squares, width);
    });
  for (int64_t c = 0; c < channels; ++c) {
    const double shift = mean[c] / double(rows);
    m2[c] -= mean[c] * shift;
    mean[c] = centre[c] + shift;
  }
}

template <class A>
void store_moments(double count, double mean, double m2, A* to_mean, A* to_var) {
  const double variance = m2 / std::max(count, 1.0);
  *to_mean = A(mean);
  *to_var = A(variance < 0 ? 0 : variance);  // NaN stays
}

// One channel of a contiguous map.
template <class A, class T>
void channel_statistics(const Layout& at, int64_t c, const T* x, A* mean, A* var) {
  Moments<double> moments;
  for_each_block(at, c, From::start, [&](const Block& block) {
    double block_mean, block_m2;
    block_moments<A>(x + block.begin, block, &block_mean, &block_m2);
    moments.merge(double(block.count()), block_mean, block_m2);
  });
  store_moments(moments.count, moments.mean, moments.m2, mean, var);
}

// All channels of a map in rows (at.inner == 1).
template <class A, class T>
void row_statistics(const Layout& at, const T* x, A* mean, A* var) {
  const int64_t tasks = row_tasks(at), channels = at.channels;
  std::vector<double> means(tasks * channels), m2s(tasks * channels), counts(tasks);
  over_row_tasks(at, From::start, [&](int64_t task, int64_t row, int64_t rows) {
    std::vector<A> centre(channels);
    counts[task] = double(rows);
    rows_moments(x + row * channels, rows, channels, centre.data(), &means[task * channels], &m2s[task * channels]);
  });
  // All at once: merged one by one, every task would cost each channel a division.
  const double count = double(at.outer);
  std::vector<double> total(channels), m2(channels);
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t c = 0; c < channels; ++c) total[c] += counts[task] * means[task * channels + c];
  for (int64_t c = 0; c < channels; ++c) total[c] /= std::max(count, 1.0);
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = means[task * channels + c] - total[c];
      m2[c] += m2s[task * channels + c] + counts[task] * delta * delta;
    }
  for (int64_t c = 0; c < channels; ++c) store_moments(count, total[c], m2[c], &mean[c], &var[c]);
}

template <class A, class T>
void statistics(const Layout& at, const T* x, A* mean, A* var) {
  if (at.inner == 1) return row_statistics(at, x, mean, var);
  over_channels(at, [&](int64_t c) { channel_statistics(at, c, x, &mean[c], &var[c]); });
}

}  // namespace auglocal
