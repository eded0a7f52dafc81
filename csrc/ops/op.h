// What the hosts of the ops share: the checks of what a call is given, and how an op is registered.
//
// An op is a struct: its name, its arguments in the schema's order, check(), and run<Kernels>(), which allocates what
// the call returns and asks Kernels for the rest. There is one such host an op; the CPU's and CUDA's files bring the
// kernels alone, as the members of a class that is made for one call: see Cpu in cpu/batch_norm.h, Cuda in
// cuda/batch_norm.cuh.
#pragma once

#include <tuple>

#include "../batch_norm_act.h"
#include "../tensor.h"

namespace auglocal {

// ---- checks: one sentence for what does not fit --------------------------------------------------------

// x, a feature map, says what everything else has to be like.
struct Check {
  const char* op;
  const Tensor& x;
  Layout at;

  Check(const char* op, const Tensor& x) : op(op), x(x) {
    require(x.dim() == 4, op, ": x must be (N, C, H, W), given a tensor of ", x.dim(), " dimensions");
    at = layout_of(x);
  }

  bool laid_out(const Tensor& given) const {
    return at.format == MemoryFormat::Contiguous ? given.is_contiguous() : is_channels_last(given);
  }
  void like_x(const char* name, const Tensor& given) const {
    require(given.sizes().equals(x.sizes()) && given.scalar_type() == x.scalar_type() && given.device() == x.device(),
            op, ": ", name, " must have the shape, dtype and device of x");
  }
  // For what is written, or read without a copy: layouts must agree.
  void dense_like_x(const char* name, const Tensor& given) const {
    like_x(name, given);
    require(laid_out(given), op, ": ", name, " must be ",
            at.format == MemoryFormat::Contiguous ? "contiguous" : "channels_last", " like x");
  }
  void channels(const char* name, const Tensor& given) const {
    const ScalarType expected = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    require(given.dim() == 1 && given.size(0) == x.size(1) && given.scalar_type() == expected &&
                given.device() == x.device(),
            op, ": ", name, " must be a (", x.size(1), ",) tensor on the device of x, ",
            "float64 for float64 x and float32 otherwise");
  }
};

// Arguments that most ops have, next to one another in their schemas.
struct NormTensors {
  Tensor weight, bias, mean, var;

  void check(const Check& check) const {
    check.channels("weight", weight);
    check.channels("bias", bias);
    check.channels("mean", mean);
    check.channels("var", var);
  }
  template <class A>
  Norm<A> data(double eps) const {
    return {auglocal::data<A>(weight), auglocal::data<A>(bias), auglocal::data<A>(mean), auglocal::data<A>(var), eps};
  }
};

// ---- registration --------------------------------------------------------------------------------------

// (C,) tensors may have any strides: small as they are, they are made contiguous here.
template <class Argument>
const Argument& contiguous_channels(const Argument& argument) {
  return argument;
}
inline Tensor contiguous_channels(const Tensor& x) {
  return x.dim() == 1 && !x.is_contiguous() ? torch::stable::contiguous(x) : x;
}

template <class Op, class Kernels, class Arguments = decltype(std::declval<Op&>().arguments())>
struct Registered;
template <class Op, class Kernels, class... Arguments>
struct Registered<Op, Kernels, std::tuple<Arguments&...>> {
  static auto run(Arguments... arguments) { return Op{contiguous_channels(arguments)...}.template run<Kernels>(); }
};

template <class Kernels, class... Ops, class Library>
void implement(Library& library) {
  (library.impl(Ops::kName, TORCH_BOX((&Registered<Ops, Kernels>::run))), ...);
}

}  // namespace auglocal
