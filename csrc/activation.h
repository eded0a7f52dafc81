// The activations behind a BatchNorm: the value of each and its gradient, by formula. NaN passes as torch's do.
//
// z: what the activation is of. Where its derivative jumps, the gradient is torch's.
//   relu        max(z, 0)                            z <= 0: 0
//   silu        z s, s = 1 / (1 + exp(-z))           s (1 + z (1 - s))
//   hardswish   z min(max(z + 3, 0), 6) / 6          z <= -3: 0; z < 3: z / 3 + 1 / 2
//   relu6       min(max(z, 0), 6)                    z <= 0 or z >= 6: 0
//   leaky_relu  z, below 0 slope z                   z <= 0: slope
//   gelu        z P(z), P(z) = (1 + erf(z / r2)) / 2, r2 = sqrt(2)      P(z) + z exp(-z^2 / 2) / sqrt(2 pi)
#pragma once

#include <cmath>

#include "scalar.h"

namespace auglocal {

// The numbers are the ops' argument `act`, for which a bool will do; ACTIVATIONS in ops/batch_norm_act.py are the
// names.
enum class Act : int64_t { none, relu, silu, hardswish, relu6, leaky_relu, gelu };
constexpr int64_t kActs = int64_t(Act::gelu) + 1;

// Written so that NaN passes, as torch's ReLU does.
template <class A>
HD A relu(A value) {
  return value <= A{} ? A{} : value;
}
template <class A>
HD A relu_backward(A grad, A value) {
  return value <= A{} ? A{} : grad;
}

// On the CPU exp and erf of float without a call or a branch, so that loops over them are vectorised; to a unit or two
// in the last place. float64 is there for checking and does without.
HD double exp_of(double z) { return std::exp(z); }
HD double erf_of(double z) { return std::erf(z); }
#ifdef __CUDA_ARCH__
HD float exp_of(float z) { return expf(z); }
HD float erf_of(float z) { return erff(z); }
#else
// 2^n exp(r), n the nearest whole number to z / ln 2; infinite from 88.4 on, as small as 1e-38 at the least. Polynomial
// and the parts of ln 2: Cephes, expf.
HD float exp_of(float z) {
  z = z < -87.0f ? -87.0f : z;
  z = z > 88.5f ? 88.5f : z;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded, to its last bits
  const float rounded = z * 1.44269504f + kRound, n = rounded - kRound;
  const float r = (z - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  uint32_t bits;
  memcpy(&bits, &rounded, sizeof(bits));
  bits = (bits + 127) << 23;
  float scale;
  memcpy(&scale, &bits, sizeof(scale));
  return (p * r * r + r + 1.0f) * scale;
}

// Near 0 a polynomial times z, farther off 1 - exp(a polynomial), at 4 and beyond 1 to rounding: coefficients of
// N. Juffa's erff.
HD float erf_of(float z) {
  float t = z < 0.0f ? -z : z;
  t = t > 4.0f ? 4.0f : t;
  const float s = t * t;
  float near = -5.96761703e-4f;
  near = near * s + 4.99119423e-3f;
  near = near * s - 2.67681349e-2f;
  near = near * s + 1.12819925e-1f;
  near = near * s - 3.76125336e-1f;
  near = near * s + 1.28379166e-1f;
  near = near * t + t;
  float far = (-1.72853470e-5f * t + 3.83197126e-4f) * s + (-3.88396438e-3f * t + 2.42546219e-2f);
  far = far * t - 1.06777877e-1f;
  far = far * t - 6.34846687e-1f;
  far = far * t - 1.28717512e-1f;
  far = 1.0f - exp_of(far * t - t);
  const float size = t > 0.927734375f ? far : near;
  return z < 0.0f ? -size : size;
}
#endif

template <Act kAct, class A>
struct Activation {
  static constexpr bool kCheap = kAct == Act::none || kAct == Act::relu;  // takes next to no registers
  A slope;                                                                // leaky_relu's

  HD A value(A z) const {
    if constexpr (kAct == Act::none) return z;
    if constexpr (kAct == Act::relu) return relu(z);
    if constexpr (kAct == Act::silu) return z / (A(1) + exp_of(-z));
    if constexpr (kAct == Act::hardswish) return z * six_at_most(relu(z + A(3))) / A(6);
    if constexpr (kAct == Act::relu6) return six_at_most(relu(z));
    if constexpr (kAct == Act::leaky_relu) return z > A(0) ? z : z * slope;
    if constexpr (kAct == Act::gelu) return z * below(z);
  }

  // The gradient of z, from that of the value.
  HD A backward(A grad, A z) const {
    if constexpr (kAct == Act::none) return grad;
    if constexpr (kAct == Act::relu) return relu_backward(grad, z);
    if constexpr (kAct == Act::silu) {
      const A s = A(1) / (A(1) + exp_of(-z));
      return grad * s * (A(1) + z * (A(1) - s));
    }
    if constexpr (kAct == Act::hardswish) return relu_backward(z < A(3) ? grad * (z / A(3) + A(0.5)) : grad, z + A(3));
    if constexpr (kAct == Act::relu6) return relu_backward(z >= A(6) ? A(0) : grad, z);
    if constexpr (kAct == Act::leaky_relu) return z > A(0) ? grad : grad * slope;
    if constexpr (kAct == Act::gelu) {
      constexpr A kDensity = A(0.39894228040143267794);  // at 0: 1 / sqrt(2 pi)
      return grad * (below(z) + z * (kDensity * exp_of(A(-0.5) * z * z)));
    }
  }

 private:
  HD static A six_at_most(A z) { return z >= A(6) ? A(6) : z; }
  // The probability that a normally distributed number is below z.
  HD static A below(A z) { return A(0.5) * (A(1) + erf_of(z * A(0.70710678118654752440))); }
};

// Calls run(the activation).
template <class A, class Run>
HD void with_activation(Act act, A slope, const Run& run) {
  switch (act) {
    case Act::none: return run(Activation<Act::none, A>{slope});
    case Act::relu: return run(Activation<Act::relu, A>{slope});
    case Act::silu: return run(Activation<Act::silu, A>{slope});
    case Act::hardswish: return run(Activation<Act::hardswish, A>{slope});
    case Act::relu6: return run(Activation<Act::relu6, A>{slope});
    case Act::leaky_relu: return run(Activation<Act::leaky_relu, A>{slope});
    case Act::gelu: return run(Activation<Act::gelu, A>{slope});
  }
}

}  // namespace auglocal
