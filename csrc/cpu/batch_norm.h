// What the CPU kernels around BatchNorm share: walking a feature map, and its statistics. Sums run in the tensor's
// precision over a few hundred values and in double beyond, in one fixed order, so that they are exact to about
// the last bit, and the same bits on every run and for every number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../batch_norm_act.h"
#include "../tensor.h"

// One binary serves every x86-64: the loops are compiled three times and chosen when loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif

namespace auglocal {

constexpr int64_t kBlock = 4096;  // values a block holds: two passes over it stay in the first-level cache
constexpr int64_t kSpan = 512;    // values summed before their sum goes to double
constexpr int64_t kTile = 16;     // channels summed in registers at a time (channels_last)
constexpr int64_t kRows = 32;     // and rows of them, before the sums go to double

// ---- walking a feature map -------------------------------------------------------------------------

// The one formula of the scale, for every kernel: a backward finds the forward's ReLU mask to the bit.
template <class A>
Affine<A> affine(A mean, A var, A weight, A bias, double eps) {
  return {mean, A(weight / std::sqrt(double(var) + eps)), bias};
}

// Per-channel constants as arrays, one entry a channel.
template <class A>
struct Channels {
  std::vector<A> mean, scale, bias;
  Channels(int64_t n, const A* means, const A* var, const A* weight, const A* biases, double eps)
      : mean(means, means + n), scale(n), bias(biases, biases + n) {
    for (int64_t c = 0; c < n; ++c) scale[c] = affine(mean[c], var[c], weight[c], bias[c], eps).scale;
  }
  Affine<A> operator[](int64_t c) const { return {mean[c], scale[c], bias[c]}; }
};

// Some of a channel's values in the contiguous layout: whole planes, or a piece of one.
struct Block {
  int64_t begin, planes, stride, length;  // first value; planes, how far apart, and values of each
  int64_t count() const { return planes * length; }
};

// Calls f(block) for blocks of about kBlock values that make up the channel.
template <class F>
void for_each_block(const Layout& at, int64_t channel, const F& f) {
  const int64_t stride = at.channels * at.inner, at_once = std::max<int64_t>(kBlock / at.inner, 1);
  for (int64_t n = 0; n < at.outer; n += at_once)
    for (int64_t i = 0; i < at.inner; i += kBlock)
      f(Block{n * stride + channel * at.inner + i, std::min(at_once, at.outer - n), stride,
              std::min(kBlock, at.inner - i)});
}

// Rows are cut into blocks, blocks into at most this many runs, one run a task.
struct RowTasks {
  int64_t rows_per_block, blocks, tasks;
  explicit RowTasks(const Layout& at)
      : rows_per_block(std::max<int64_t>(kTile, 2 * kBlock / std::max<int64_t>(at.channels, 1))),
        blocks((at.outer + rows_per_block - 1) / rows_per_block),
        tasks(std::min<int64_t>(blocks, 64)) {}
  int64_t first_block(int64_t task) const { return task * blocks / tasks; }
};

template <class F>
void over_channels(const Layout& at, const F& f) {
  torch::stable::parallel_for(0, at.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(c);
  });
}

template <class F>
void over_rows(const Layout& at, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 2 * kBlock / std::max<int64_t>(at.channels, 1));
  torch::stable::parallel_for(0, at.outer, grain, f);
}

// ---- statistics ------------------------------------------------------------------------------------

// kTile neighbouring values in one register: arrays of sums would be kept in memory, where each addition waits for
// the last one's store.
template <class A>
struct LanesOf {
  typedef A type __attribute__((vector_size(kTile * sizeof(A))));
};
template <class A>
using Lanes = typename LanesOf<A>::type;

HD Lanes<float> load_tile(const float* from) {
  Lanes<float> lanes;
  memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}
HD Lanes<double> load_tile(const double* from) {
  Lanes<double> lanes;
  memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}
HD Lanes<float> load_tile(const bf16* from) {
  typedef uint16_t Narrow __attribute__((vector_size(kTile * sizeof(uint16_t))));
  typedef uint32_t Wide __attribute__((vector_size(kTile * sizeof(uint32_t))));
  Narrow narrow;
  memcpy(&narrow, from, sizeof(narrow));
  const Wide wide = __builtin_convertvector(narrow, Wide) << 16;
  Lanes<float> lanes;
  memcpy(&lanes, &wide, sizeof(lanes));
  return lanes;
}

// The first `width` of kTile values, zeros behind them.
template <class T>
HD Lanes<typename Compute<T>::type> load_tile(const T* from, int64_t width) {
  if (width == kTile) return load_tile(from);
  Lanes<typename Compute<T>::type> lanes = {};
  for (int64_t c = 0; c < width; ++c) lanes[c] = load(from[c]);
  return lanes;
}

template <class A>
HD void add(double (&to)[kTile], const Lanes<A>& lanes) {
  for (int64_t c = 0; c < kTile; ++c) to[c] += lanes[c];
}

// Calls f(first value, its plane's last + 1) for runs of up to kSpan values of a block, and flush() after about as many.
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

template <class A, class T>
VECTORISED void block_moments(const T* x, const Block block, double* mean, double* m2) {
  const double n = double(block.count());
  double totals[kTile] = {}, firsts[kTile] = {}, seconds[kTile] = {}, total = 0, first = 0, second = 0;
  Lanes<A> sum = {}, squares = {};
  for_each_span(
      block,
      [&](int64_t i, int64_t end) {
        for (; i + kTile <= end; i += kTile) sum += load_tile(x + i);
        for (int64_t l = 0; i + l < end; ++l) sum[l] += load(x[i + l]);
      },
      [&] {
        add<A>(totals, sum);
        sum = Lanes<A>{};
      });
  for (int64_t l = 0; l < kTile; ++l) total += totals[l];
  const A centre = A(total / n);
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
  *mean = centre + first / n;  // with what rounding left of the mean
  *m2 = second - first * first / n;
}

template <class A, class T>
HD void tile_moments(const T* x, int64_t rows, int64_t stride, int64_t width, double* mean, double* m2) {
  double total[kTile] = {}, first[kTile] = {}, second[kTile] = {};
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    Lanes<A> sum = {};
    for (int64_t r = begin; r < std::min(begin + kRows, rows); ++r) sum += load_tile(x + r * stride, width);
    add<A>(total, sum);
  }
  Lanes<A> centre = {};
  for (int64_t c = 0; c < width; ++c) centre[c] = A(total[c] / double(rows));
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    Lanes<A> sum = {}, squares = {};
    for (int64_t r = begin; r < std::min(begin + kRows, rows); ++r) {
      const Lanes<A> d = load_tile(x + r * stride, width) - centre;
      sum += d;
      squares += d * d;
    }
    add<A>(first, sum);
    add<A>(second, squares);
  }
  for (int64_t c = 0; c < width; ++c) {
    mean[c] = centre[c] + first[c] / double(rows);
    m2[c] = second[c] - first[c] * first[c] / double(rows);
  }
}

template <class A, class T>
VECTORISED void rows_moments(const T* x, int64_t rows, int64_t channels, double* mean, double* m2) {
  for (int64_t c = 0; c < channels; c += kTile)
    tile_moments<A>(x + c, rows, channels, std::min(kTile, channels - c), mean + c, m2 + c);
}

template <class A, class T>
Moments<double> channel_moments(const Layout& at, int64_t c, const T* x) {
  Moments<double> moments;
  for_each_block(at, c, [&](const Block& block) {
    double mean, m2;
    block_moments<A>(x + block.begin, block, &mean, &m2);
    moments.merge(double(block.count()), mean, m2);
  });
  return moments;
}

// The moments of every channel of a map in rows (at.inner == 1).
template <class A, class T>
std::vector<Moments<double>> row_moments(const Layout& at, const T* x) {
  const RowTasks rows(at);
  std::vector<Moments<double>> partial(rows.tasks * at.channels), moments(at.channels);
  torch::stable::parallel_for(0, rows.tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> mean(at.channels), m2(at.channels);
    for (int64_t task = begin; task < end; ++task)
      for (int64_t block = rows.first_block(task); block < rows.first_block(task + 1); ++block) {
        const int64_t row = block * rows.rows_per_block, n = std::min(rows.rows_per_block, at.outer - row);
        rows_moments<A>(x + row * at.channels, n, at.channels, mean.data(), m2.data());
        for (int64_t c = 0; c < at.channels; ++c) partial[task * at.channels + c].merge(double(n), mean[c], m2[c]);
      }
  });
  for (int64_t task = 0; task < rows.tasks; ++task)
    for (int64_t c = 0; c < at.channels; ++c) {
      const auto& part = partial[task * at.channels + c];
      moments[c].merge(part.count, part.mean, part.m2);
    }
  return moments;
}

template <class A>
void store_moments(const Moments<double>& moments, A* mean, A* var) {
  const double variance = moments.m2 / std::max(moments.count, 1.0);
  *mean = A(moments.mean);
  *var = A(variance < 0 ? 0 : variance);  // NaN stays
}

}  // namespace auglocal
