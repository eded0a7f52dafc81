// The arithmetic of BatchNorm [+ residual] + activation, shared by the CPU and the CUDA kernels.
// Formulas: Ioffe & Szegedy 2015, with the backward in terms of the BatchNorm's input.
#pragma once

#include "activation.h"

namespace auglocal {

// What one channel needs to be normalised: (x - mean) * scale + bias. Subtracting the mean first
// keeps the digits that x * scale + shift would lose where the mean is large.
template <class A>
struct Affine {
  A mean, scale, bias;
};

// The one formula of the scale: every kernel calls it with the stored mean and variance, so that a backward finds its
// forward's ReLU mask to the bit.
template <class A>
HD Affine<A> make_affine(A mean, A var, A weight, A bias, double eps) {
  return {mean, A(weight / std::sqrt(double(var) + eps)), bias};
}

// BatchNorm's parameters and statistics, one of each a channel.
template <class A>
struct Norm {
  const A *weight, *bias, *mean, *var;
  double eps;
  HD Affine<A> affine(int64_t c) const { return make_affine(mean[c], var[c], weight[c], bias[c], eps); }
};

template <class A>
HD A normalize(A x, const Affine<A>& channel) {
  return mul_add(x - channel.mean, channel.scale, channel.bias);
}

// dx = scale * (g - mean(g) - (x - mean) * invstd^2 * mean(g * (x - mean))), g behind the mask.
template <class A>
struct InputGrad {
  A scale, grad_mean, projection;  // projection: invstd^2 * mean(g * (x - mean))
};

template <class A>
HD A input_grad(A grad, A centred, const InputGrad<A>& channel) {
  return channel.scale * (grad - mul_add(centred, channel.projection, channel.grad_mean));
}

// What the sums over a channel's `count` values, of g and of g * (x - mean), come to.
template <class A>
struct ChannelGrad {
  InputGrad<A> back;
  A dweight, dbias;
};

template <class A>
HD ChannelGrad<A> channel_grad(double sum, double dot, double count, double var, A scale, double eps) {
  const double invstd = 1 / std::sqrt(var + eps);
  return {{scale, A(sum / count), A(dot * invstd * invstd / count)}, A(dot * invstd), A(sum)};
}

// Mean and sum of squared deviations of `count` values; parts combine as in Chan et al. 1979.
template <class A>
struct Moments {
  A count = 0, mean = 0, m2 = 0;

  HD void merge(A other_count, A other_mean, A other_m2) {
    const A total = count + other_count;
    if (total == A(0)) return;
    const A delta = other_mean - mean, share = other_count / total;
    mean += delta * share;
    m2 += other_m2 + delta * delta * count * share;
    count = total;
  }
};

}  // namespace auglocal
