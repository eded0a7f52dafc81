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

// Calls f(begin, length) for each block of the channel's consecutive values.
template <class F>
void for_each_block(const Layout& at, int64_t channel, const F& f) {
  for (int64_t n = 0; n < at.outer; ++n)
    for (int64_t i = 0; i < at.inner; i += kBlock)
      f((n * at.channels + channel) * at.inner + i, std::min(kBlock, at.inner - i));
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

template <class A, class T>
VECTORISED void span_moments(const T* x, int64_t n, double* mean, double* m2) {
  double total = 0, first = 0, second = 0;
  for (int64_t begin = 0; begin < n; begin += kSpan) {
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < std::min(begin + kSpan, n); ++i) sum += load(x[i]);
    total += sum;
  }
  const A centre = A(total / double(n));
  for (int64_t begin = 0; begin < n; begin += kSpan) {
    A sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
    for (int64_t i = begin; i < std::min(begin + kSpan, n); ++i) {
      const A d = load(x[i]) - centre;
      sum += d;
      squares += d * d;
    }
    first += sum;
    second += squares;
  }
  *mean = centre + first / double(n);  // with what rounding left of the mean
  *m2 = second - first * first / double(n);
}

// kWidth > 0: that many channels, known to the compiler, so that sums stay in registers.
template <int64_t kWidth, class A, class T>
HD void tile_moments(const T* x, int64_t rows, int64_t stride, int64_t width, double* mean, double* m2) {
  const int64_t w = kWidth ? kWidth : width;
  double total[kTile] = {}, first[kTile] = {}, second[kTile] = {};
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    A sum[kTile] = {};
    for (int64_t r = begin; r < std::min(begin + kRows, rows); ++r)
      for (int64_t c = 0; c < w; ++c) sum[c] += load(x[r * stride + c]);
    for (int64_t c = 0; c < w; ++c) total[c] += sum[c];
  }
  A centre[kTile];
  for (int64_t c = 0; c < w; ++c) centre[c] = A(total[c] / double(rows));
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    A sum[kTile] = {}, squares[kTile] = {};
    for (int64_t r = begin; r < std::min(begin + kRows, rows); ++r)
      for (int64_t c = 0; c < w; ++c) {
        const A d = load(x[r * stride + c]) - centre[c];
        sum[c] += d;
        squares[c] += d * d;
      }
    for (int64_t c = 0; c < w; ++c) first[c] += sum[c], second[c] += squares[c];
  }
  for (int64_t c = 0; c < w; ++c) {
    mean[c] = centre[c] + first[c] / double(rows);
    m2[c] = second[c] - first[c] * first[c] / double(rows);
  }
}

template <class A, class T>
VECTORISED void rows_moments(const T* x, int64_t rows, int64_t channels, double* mean, double* m2) {
  int64_t c = 0;
  for (; c + kTile <= channels; c += kTile) tile_moments<kTile, A>(x + c, rows, channels, kTile, mean + c, m2 + c);
  if (c < channels) tile_moments<0, A>(x + c, rows, channels, channels - c, mean + c, m2 + c);
}

template <class A, class T>
Moments<double> channel_moments(const Layout& at, int64_t c, const T* x) {
  Moments<double> moments;
  for_each_block(at, c, [&](int64_t begin, int64_t n) {
    double mean, m2;
    span_moments<A>(x + begin, n, &mean, &m2);
    moments.merge(double(n), mean, m2);
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
