// The geometry of a max-pool window and its checks, shared by the CPU and the CUDA kernels.
#pragma once

#include "tensor.h"

namespace auglocal {

struct Pool {
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
};

// The windows over one axis that hold a position: first..last, inclusive; empty if first > last.
struct Windows {
  int64_t first, last;
};

HD Windows windows_of(int64_t position, int64_t kernel, int64_t stride, int64_t padding, int64_t windows) {
  const int64_t reach = position + padding - kernel + 1;  // the leftmost window start that still holds it
  const int64_t first = reach > 0 ? (reach + stride - 1) / stride : 0, last = (position + padding) / stride;
  return {first, last < windows - 1 ? last : windows - 1};
}

// A feature map's strides in values, in its own layout.
struct Strides {
  int64_t n, c, h, w;
};

inline Strides strides_of(const Tensor& x, MemoryFormat format) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  if (format == MemoryFormat::ChannelsLast) return {h * w * c, 1, w * c, c};
  return {c * h * w, h * w, w, 1};
}

inline void check_pool(const char* op, const Pool& pool) {
  require(pool.kernel_h >= 1 && pool.kernel_w >= 1 && pool.kernel_h <= 16 && pool.kernel_w <= 16, op,
          ": the window must be 1 to 16 taps high and wide, given ", pool.kernel_h, " x ", pool.kernel_w);
  require(pool.stride_h >= 1 && pool.stride_w >= 1, op, ": strides must be at least 1");
  require(pool.padding_h >= 0 && pool.padding_w >= 0 && 2 * pool.padding_h <= pool.kernel_h &&
              2 * pool.padding_w <= pool.kernel_w,
          op, ": padding must be at most half of the window");
}

// A window that starts in the padding on the right, as ceil_mode can ask for, holds no value: not allowed, as in torch.
inline void check_windows(const char* op, int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t out) {
  require(out >= 1 && (out - 1) * stride < size + padding && (out - 1) * stride - padding + kernel > 0 && size >= 1,
          op, ": ", out, " windows of ", kernel, " taps and stride ", stride, " do not fit ", size, " values");
}

inline Layout check_pooling(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias,
                            const Tensor& mean, const Tensor& var, const Pool& pool, int64_t out_h, int64_t out_w) {
  const Layout at = check_forward(op, x, weight, bias, std::nullopt);
  check_channels(op, "mean", mean, x);
  check_channels(op, "var", var, x);
  require(x.size(1) >= 1, op, ": x must have channels");
  check_pool(op, pool);
  check_windows(op, x.size(2), pool.kernel_h, pool.stride_h, pool.padding_h, out_h);
  check_windows(op, x.size(3), pool.kernel_w, pool.stride_w, pool.padding_w, out_w);
  return at;
}

inline Layout check_pooling_backward(const char* op, const Tensor& grad, const Tensor& x, const Tensor& index,
                                     const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var,
                                     const Pool& pool, const Tensor& dx) {
  require(grad.dim() == 4 && index.dim() == 4, op, ": grad and index must be (N, C, H, W)");
  const Layout at = check_pooling(op, x, weight, bias, mean, var, pool, grad.size(2), grad.size(3));
  check_same_layout(op, "x", x, x, at);
  check_same_layout(op, "dx", dx, x, at);
  for (const auto& [name, given] : {std::pair<const char*, const Tensor&>{"grad", grad}, {"index", index}}) {
    const bool dense = at.format == MemoryFormat::Contiguous ? given.is_contiguous() : is_channels_last(given);
    require(given.size(0) == x.size(0) && given.size(1) == x.size(1) && given.sizes().equals(grad.sizes()) &&
                dense && given.device() == x.device(),
            op, ": ", name, " must be (N, C, pooled H, pooled W), dense in the layout of x, on its device");
  }
  require(grad.scalar_type() == x.scalar_type() && index.scalar_type() == ScalarType::Byte, op,
          ": grad must have the dtype of x, index must be uint8");
  return at;
}

}  // namespace auglocal
