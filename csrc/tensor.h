// Host-side helpers on torch's stable tensors: layouts, checks, scalar types.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>

#include "scalar.h"

namespace auglocal {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One sentence for what does not fit; STD_TORCH_CHECK would begin it with the path of this file.
template <class... Words>
void require(bool holds, const Words&... words) {
  if (holds) return;
  std::ostringstream sentence;
  (sentence << ... << words);
  throw std::runtime_error(sentence.str());
}

// A 4-d feature map, dense in one of the two layouts, as (outer, channels, inner): for contiguous
// tensors (N, C, H*W), for channels_last ones (N*H*W, C, 1). Both are walked by the same loops.
struct Layout {
  MemoryFormat format;
  int64_t outer, channels, inner;
  int64_t count() const { return outer * inner; }  // values per channel
};

inline bool is_channels_last(const Tensor& x) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  return (c == 1 || x.stride(1) == 1) && (w == 1 || x.stride(3) == c) && (h == 1 || x.stride(2) == w * c) &&
         (n == 1 || x.stride(0) == h * w * c);
}

inline Layout layout_of(const Tensor& x) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const bool channels_last = !x.is_contiguous() && is_channels_last(x);
  const MemoryFormat format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  if (channels_last || h * w == 1) return {format, n * h * w, c, 1};
  return {format, n, c, h * w};
}

inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size,
                    MemoryFormat format = MemoryFormat::Contiguous) {
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format);
}

// (C,), in the type that statistics of x have.
inline Tensor empty_statistics(const Tensor& x) {
  const ScalarType type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::empty({x.size(1)}, type, std::nullopt, x.device());
}

// What sums over no values are.
inline Tensor zeroed(Tensor x) {
  torch::stable::zero_(x);
  return x;
}

inline Tensor dense(const Tensor& x, MemoryFormat format) { return torch::stable::contiguous(x, format); }
inline std::optional<Tensor> dense(const std::optional<Tensor>& x, MemoryFormat format) {
  return x ? std::optional<Tensor>(dense(*x, format)) : std::nullopt;
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
const T* data(const std::optional<Tensor>& x) {
  return x ? data<T>(*x) : nullptr;
}
template <class T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

inline void check_same_size(const char* op, const char* name, const Tensor& given, const Tensor& x) {
  require(given.sizes().equals(x.sizes()) && given.scalar_type() == x.scalar_type() && given.device() == x.device(),
          op, ": ", name, " must have the shape, dtype and device of x");
}

inline void check_channels(const char* op, const char* name, const Tensor& given, const Tensor& x) {
  const ScalarType expected = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  require(given.dim() == 1 && given.size(0) == x.size(1) && given.scalar_type() == expected &&
              given.device() == x.device(),
          op, ": ", name, " must be a (", x.size(1), ",) tensor on the device of x, ",
          "float64 for float64 x and float32 otherwise");
}

// The checks of batch_norm_act; both devices run them.
inline Layout check_forward(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias,
                            const std::optional<Tensor>& residual) {
  require(x.dim() == 4, op, ": x must be (N, C, H, W), given a tensor of ", x.dim(), " dimensions");
  check_channels(op, "weight", weight, x);
  check_channels(op, "bias", bias, x);
  if (residual) check_same_size(op, "residual", *residual, x);
  return layout_of(x);
}

// For the forms that write into given buffers: nothing may be copied on the way, so layouts must agree.
inline void check_same_layout(const char* op, const char* name, const Tensor& given, const Tensor& x,
                              const Layout& at) {
  check_same_size(op, name, given, x);
  const bool same = at.format == MemoryFormat::Contiguous ? given.is_contiguous() : is_channels_last(given);
  require(same, op, ": ", name, " must be ", at.format == MemoryFormat::Contiguous ? "contiguous" : "channels_last",
          " like x");
}

inline Layout check_statistics(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias,
                               const Tensor& mean, const Tensor& var) {
  const Layout at = check_forward(op, x, weight, bias, std::nullopt);
  check_same_layout(op, "x", x, x, at);
  check_channels(op, "mean", mean, x);
  check_channels(op, "var", var, x);
  return at;
}

inline Layout check_apply(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias,
                          const Tensor& mean, const Tensor& var, const std::optional<Tensor>& residual,
                          const Tensor& out) {
  const Layout at = check_statistics(op, x, weight, bias, mean, var);
  if (residual) check_same_layout(op, "residual", *residual, x, at);
  check_same_layout(op, "out", out, x, at);
  return at;
}

inline Layout check_backward(const char* op, const Tensor& grad, const Tensor& x, const Tensor& weight,
                             const Tensor& bias, const Tensor& mean, const Tensor& var,
                             const std::optional<Tensor>& y, const Tensor& dx,
                             const std::optional<Tensor>& dresidual) {
  const Layout at = check_statistics(op, x, weight, bias, mean, var);
  check_same_layout(op, "grad", grad, x, at);
  check_same_layout(op, "dx", dx, x, at);
  require(y.has_value() == dresidual.has_value(), op, ": y and dresidual go together, given one of them");
  if (y) check_same_layout(op, "y", *y, x, at);
  if (dresidual) check_same_layout(op, "dresidual", *dresidual, x, at);
  return at;
}

// N samples of C maps of `size` values.
struct Maps {
  Layout at;
  int64_t samples, channels, size;
};

inline Maps check_mean(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                       const Tensor& var, const std::optional<Tensor>& residual) {
  const Layout at = check_statistics(op, x, weight, bias, mean, var);
  if (residual) check_same_layout(op, "residual", *residual, x, at);
  return {at, x.size(0), x.size(1), x.size(2) * x.size(3)};
}

inline Maps check_mean_backward(const char* op, const Tensor& grad, const Tensor& x, const Tensor& weight,
                                const Tensor& bias, const Tensor& mean, const Tensor& var,
                                const std::optional<Tensor>& residual, bool act, const Tensor& dx,
                                const std::optional<Tensor>& dresidual) {
  const Maps maps = check_mean(op, x, weight, bias, mean, var, residual);
  require(grad.dim() == 2 && grad.size(0) == maps.samples && grad.size(1) == maps.channels &&
              grad.scalar_type() == weight.scalar_type() && grad.is_contiguous() && grad.device() == x.device(),
          op, ": grad must be a contiguous (", maps.samples, ", ", maps.channels,
          ") tensor in the dtype of weight on the device of x");
  require(act || !residual, op, ": residual is for the ReLU's mask, given one without a ReLU");
  require(residual || !dresidual, op, ": dresidual needs residual");
  check_same_layout(op, "dx", dx, x, maps.at);
  if (dresidual) check_same_layout(op, "dresidual", *dresidual, x, maps.at);
  return maps;
}

template <class Argument>
const Argument& contiguous_channels(const Argument& argument) {
  return argument;
}
inline Tensor contiguous_channels(const Tensor& x) {
  return x.dim() == 1 && !x.is_contiguous() ? torch::stable::contiguous(x) : x;
}

template <auto kOp>
struct AnyStrides;
template <class Result, class... Parameters, Result (*kOp)(Parameters...)>
struct AnyStrides<kOp> {
  static Result run(Parameters... parameters) { return kOp(contiguous_channels(parameters)...); }
};

}  // namespace auglocal

// How an op is registered. Its (C,) tensors may have any strides: small as they are, they are made contiguous here.
#define AUGLOCAL_IMPL(library, op) library.impl(#op, TORCH_BOX(&auglocal::AnyStrides<&auglocal::op>::run))

// Runs a statement with `T` bound to the element type of a tensor.
#define AUGLOCAL_DISPATCH(op, scalar_type, ...)                                                   \
  switch (scalar_type) {                                                                          \
    case torch::headeronly::ScalarType::Float: { using T = float; __VA_ARGS__; break; }           \
    case torch::headeronly::ScalarType::Double: { using T = double; __VA_ARGS__; break; }         \
    case torch::headeronly::ScalarType::BFloat16: { using T = auglocal::bf16; __VA_ARGS__; break; } \
    default: auglocal::require(false, op, ": x must be float32, bfloat16 or float64");             \
  }
