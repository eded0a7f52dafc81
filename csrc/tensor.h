// Host-side helpers on torch's stable tensors: layouts, allocations, scalar types.
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
template <class T>
T* mutable_data(const std::optional<Tensor>& x) {
  return x ? mutable_data<T>(*x) : nullptr;
}

// Calls run(a value of x's element type).
template <class Run>
void with_type(const char* op, const Tensor& x, const Run& run) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return run(float());
    case ScalarType::Double: return run(double());
    case ScalarType::BFloat16: return run(bf16());
    case ScalarType::Half: return run(fp16());
    default: require(false, op, ": x must be float32, bfloat16, float16 or float64");
  }
}

}  // namespace auglocal
