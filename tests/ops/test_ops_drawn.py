"""Drawn shapes, strides, dtypes and options of the ops, against their references.

A few hundred draws here; 10,000 of each with

    AUGLOCAL_DRAWS=10000 pytest tests/ops/test_ops_drawn.py --hypothesis-seed=0
"""

import os

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ops_helpers import rounding
from torch.nn.functional import batch_norm

from auglocal_ext import ops
from auglocal_ext.ops.batch_norm_act import ACTIVATIONS

drawn = settings(
    max_examples=int(os.environ.get("AUGLOCAL_DRAWS", "150")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
LAYOUTS = ["contiguous", "channels_last", "strided", "transposed"]


@st.composite
def feature_maps(draw):
    """(shape, how many, their layouts, dtype, a generator): everything a feature map can be."""
    n, c, h, w = (draw(st.integers(1, most)) for most in (5, 20, 9, 9))
    if n * h * w == 1:
        n = 2
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return (n, c, h, w), [draw(st.sampled_from(LAYOUTS)) for _ in range(3)], dtype, generator


def laid_out(values, layout):
    """The same values in other strides."""
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        n, c, h, w = values.shape
        wide = torch.zeros(2 * n, c, h, w + 3, dtype=values.dtype)
        wide[::2, :, :, 1 : w + 1] = values
        return wide[::2, :, :, 1 : w + 1]
    if layout == "transposed":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    return values.contiguous()


def affine(c, dtype, generator):
    """A weight, some of it negative and some zero, and a bias."""
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(c, generator=generator, dtype=torch.float64).to(statistics)
    return torch.where(weight.abs() < 0.1, 0, weight), torch.randn(c, generator=generator, dtype=torch.float64).to(
        statistics
    )


def compare(op, reference, inputs, grad_layout, generator, mask_is_stable):
    """Value and gradients against the reference: to rounding, or to twice plain torch's error where that is more.

    Gradients of other dtypes are compared where there is no ReLU: next to zero, its mask may fall either way.
    """
    results = []
    for function, dtype in ((op, None), (reference, None), (reference, torch.float64)):
        given = [t if dtype is None else t.to(dtype) for t in inputs]
        given = [t.detach().requires_grad_() for t in given]
        y, mean, var = function(*given)
        if not results:
            grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
        gradients = torch.autograd.grad(y, given, laid_out(grad.to(y.dtype), grad_layout))
        assert y.dtype == given[0].dtype and mean.shape == var.shape == (inputs[0].shape[1],)
        results.append((y.detach(), mean, var, *gradients))
    x, weight, bias, *_ = (t.double() for t in inputs)
    mean, std = results[2][1], (results[2][2] + 1e-5).sqrt()
    # What cancels on the way to a result: its rounding errors are of that size, however small the result is.
    terms = {
        0: ((1 + mean.abs() / std) * weight.abs() + bias.abs()).max() * results[2][0].numel() ** 0.5,
        1: std.norm(),
        2: std.square().norm(),
    }
    of_a_gradient = grad.double().norm() * (1 + 1 / std.min()) * (1 + x.norm())
    double = inputs[0].dtype == torch.float64
    for index, (ours, torchs, exact) in enumerate(zip(*results, strict=True)):
        assert ours.shape == exact.shape
        if index > 2 and not double and not mask_is_stable:
            continue
        scale = exact.norm() + terms.get(index, of_a_gradient) + 1e-30
        error, torchs_error = ((t.double() - exact).norm() / scale for t in (ours, torchs))
        rounded = 1e-9 if double else rounding(torch.float32 if index in (1, 2) else inputs[0].dtype)
        assert error <= max(2 * torchs_error, rounded), (index, error, torchs_error)


@given(
    feature_maps(),
    st.booleans(),
    st.sampled_from([False, True, False, True, *ACTIVATIONS[2:]]),
    st.sampled_from([1e-5, 1e-3, 1.0]),
    st.sampled_from([0.0, 1.0, 30.0]),
)
@drawn
def test_batch_norm_act(maps, residual, act, eps, mean):
    shape, layouts, dtype, generator = maps
    residual = residual and isinstance(act, bool)  # with one, other activations have no gradient
    smooth = act not in (True, "hardswish", "relu6", "leaky_relu")
    features = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
    inputs = [laid_out(features[0] + mean, layouts[0]), *affine(shape[1], dtype, generator)]
    if residual:
        inputs.append(laid_out(features[1], layouts[1]))

    def run(function):
        return lambda *args: function(*args, eps=eps, act=act)

    compare(run(ops.batch_norm_act), run(ops.batch_norm_act_reference), inputs, layouts[2], generator, smooth)


@given(feature_maps(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.data())
@drawn
def test_batch_norm_act_max_pool(maps, kernel_h, kernel_w, stride, ceil_mode, data):
    shape, layouts, dtype, generator = maps
    kernel = (min(kernel_h, shape[2]), min(kernel_w, shape[3]))
    padding = tuple(data.draw(st.integers(0, size // 2)) for size in kernel)
    window = {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}
    x = laid_out(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), layouts[0])
    weight, bias = affine(shape[1], dtype, generator)
    weight = torch.where(weight == 0, 0.5, weight)  # of equal values torch and we may choose different ones

    def run(function):
        return lambda *args: function(*args, **window)

    pooled = run(ops.batch_norm_act_max_pool), run(ops.batch_norm_act_max_pool_reference)
    compare(*pooled, [x, weight, bias], layouts[2], generator, False)


@given(feature_maps(), st.integers(1, 3), st.integers(1, 2), st.booleans(), st.booleans())
@drawn
def test_conv_batch_norm_act(maps, kernel, stride, relu, bias):
    shape, layouts, dtype, generator = maps
    # torch's own bfloat16 weight gradient on the CPU holds unwritten memory where a tap sees nothing but padding.
    assume(dtype != torch.bfloat16 or min(shape[2:]) >= kernel)
    filters = torch.randn(6, shape[1], kernel, kernel, generator=generator, dtype=torch.float64).to(dtype)
    x = laid_out(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), layouts[0])
    inputs = [x, *affine(shape[1], dtype, generator), filters]
    if bias:
        inputs.append(torch.randn(6, generator=generator, dtype=torch.float64).to(dtype))

    def run(function):
        return lambda *args: function(*args, stride=stride, padding=kernel // 2, relu=relu)

    convolved = run(ops.conv_batch_norm_act), run(ops.conv_batch_norm_act_reference)
    compare(*convolved, inputs, layouts[2], generator, not relu)


@st.composite
def heads(draw):
    """(tensors by name, labels, options of the op, eps of the second BatchNorm, a factor of the loss)."""
    (n, c, h, w), layouts, dtype, generator = draw(feature_maps())
    n = draw(st.sampled_from([0, n, n, n, n, n]))
    bn, residual, head_bn, linear_bias, transposed, relu = (draw(st.booleans()) for _ in range(6))
    classes, mean = draw(st.integers(1, 40)), draw(st.sampled_from([0.0, 1.0, 30.0]))
    parameters = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    linear_weight = normal(classes, c).to(parameters)
    tensors = {"linear_weight": linear_weight.t().contiguous().t() if transposed else linear_weight}
    if linear_bias:
        tensors["linear_bias"] = normal(classes).to(parameters)
    tensors["x"] = laid_out((normal(n, c, h, w) + mean).to(dtype), layouts[0])
    if bn:
        tensors["weight"], tensors["bias"] = affine(c, dtype, generator)
    if bn and residual:
        tensors["residual"] = laid_out(normal(n, c, h, w).to(dtype), layouts[1])
    if head_bn and n != 1:
        tensors["head_weight"], tensors["head_bias"] = affine(c, dtype, generator)
    ignored, smoothing = (draw(st.sampled_from(choices)) for choices in ([0.0, 0.3, 1.0], [0.0, 0.1, 1.0]))
    ignore_index = draw(st.sampled_from([-100, draw(st.integers(0, classes - 1)), classes + 3]))
    labels = torch.randint(classes, (n, 2), generator=generator)[:, 0]
    labels[torch.rand(n, generator=generator) < ignored] = ignore_index
    eps, head_eps = (draw(st.sampled_from([1e-5, 1e-3, 1.0])) for _ in range(2))
    options = {"relu": relu, "eps": eps, "label_smoothing": smoothing, "ignore_index": ignore_index}
    return tensors, labels, options, head_eps, draw(st.sampled_from([1.0, -3.0]))


def run_head(op, tensors, labels, options, head_eps, factor):
    """What op returns, and the gradients of factor * loss, by name."""
    t = {name: value.detach().requires_grad_() for name, value in tensors.items()}
    if "weight" in t:
        options = options | {"bn": (t["weight"], t["bias"]), "residual": t.get("residual")}
    if "head_weight" in t:
        options = options | {"head_bn": (t["head_weight"], t["head_bias"], head_eps)}
    result = op(t["x"], t["linear_weight"], t.get("linear_bias"), labels, **options)
    gradients = torch.autograd.grad(factor * result.loss, list(t.values()))
    values = {name: value.detach() for name, value in result._asdict().items() if value is not None}
    return values | {f"d{name}": gradient for name, gradient in zip(t, gradients, strict=True)}


def terms_of_a_head(t, exact, options, head_eps):
    """The size, by name, of what cancels on the way to a result; and whether the ReLU's mask is the same to rounding.

    t, exact: the head's tensors, and what it returns, in float64; at least one sample.
    """
    # Of the values so far, of a gradient of the map and of x on their way back; the pool divides by the map's size.
    size, of_the_map, of_x, stable = t["x"].abs().max(), 1 / t["x"][0, 0].numel(), 1.0, True
    terms = {"mean": size, "var": size**2}
    if "weight" in t:
        std = (exact["var"] + options["eps"]).sqrt()
        of_x = (1 + 1 / std.min()) * (1 + size / std.min()) * (1 + t["weight"].abs().max())
        size = ((1 + exact["mean"].abs() / std) * t["weight"].abs() + t["bias"].abs()).max()
        y = batch_norm(t["x"], None, None, t["weight"], t["bias"], training=True, eps=options["eps"])
        if "residual" in t:
            y, size = y + t["residual"], size + t["residual"].abs().max()
        stable = not options["relu"] or bool(y.abs().min() > 1e-5 * (size + y.abs().max()))
    terms |= {"head_mean": size, "head_var": size**2}
    if "head_weight" in t:
        std = (exact["head_var"] + head_eps).sqrt().min()
        of_the_map *= (1 + 1 / std) * (1 + size / std) * (1 + t["head_weight"].abs().max())
        size = (1 + size / std) * t["head_weight"].abs().max() + t["head_bias"].abs().max()
    size = (1 + size) * (1 + t["linear_weight"].abs().sum(1).max())
    if "linear_bias" in t:
        size = size + t["linear_bias"].abs().max()
    terms |= {"dresidual": size * of_the_map, "dx": size * of_the_map * of_x}
    terms |= dict.fromkeys(("dweight", "dbias"), terms["dx"] * t["x"][0, 0].numel())
    return {name: terms.get(name, size) * value.numel() ** 0.5 for name, value in exact.items()}, stable


@given(heads())
@drawn
def test_pooled_cross_entropy(drawn_head):
    tensors, labels, options, head_eps, factor = drawn_head
    as_double = {name: t.double() for name, t in tensors.items()}
    ours, torchs, exact = (
        run_head(op, given, labels, options, head_eps, factor)
        for op, given in (
            (ops.pooled_cross_entropy, tensors),
            (ops.pooled_cross_entropy_reference, tensors),
            (ops.pooled_cross_entropy_reference, as_double),
        )
    )
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        assert value.shape == exact[name].shape and value.dtype == torchs[name].dtype, name
    if not len(labels):  # torch's statistics of nothing are NaN, ours zero
        assert ours["loss"].isnan() and not any(ours[f"d{name}"].any() for name in tensors)
        return
    double, (terms, stable) = tensors["x"].dtype == torch.float64, terms_of_a_head(as_double, exact, options, head_eps)
    behind_the_mask = {f"d{name}" for name in ("x", "weight", "bias", "residual")}
    for name, value in exact.items():
        assert torch.equal(ours[name].isnan(), value.isnan()), name
        if value.isnan().any() or name in behind_the_mask and not (double or stable):
            continue
        error, torchs_error = ((t[name].double() - value).norm() for t in (ours, torchs))
        # Of a head only the gradients of feature maps are in their type; all else is float32 to the end.
        size = value.norm()
        rounded = 1e-9 * (size + terms[name]) if double else rounding(ours[name].dtype, size, terms[name])
        allowed = max(2 * torchs_error, rounded)
        assert error <= allowed, (name, error, torchs_error, allowed)
