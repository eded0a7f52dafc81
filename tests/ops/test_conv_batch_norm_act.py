"""The conv_batch_norm_act op: value, gradient, error, geometries, layouts, what it holds, bad input."""

import pytest
import torch
from ops_helpers import DEVICES, DISPATCHED, LAYOUTS, error, make, rounding
from torch.library import opcheck

from auglocal_ext.common.memory import LiveBytes
from auglocal_ext.ops import conv_batch_norm_act, conv_batch_norm_act_reference

# kernel, then options of the convolution
GEOMETRIES = [
    ((3, 3), {"padding": 1}),
    ((3, 3), {"stride": 2, "padding": 1}),
    ((1, 1), {"stride": 2}),
    ((3, 2), {"stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)}),
    ((3, 3), {"padding": 1, "groups": 4}),
]


def make_conv(shape, kernel, options, dtype, layout, bias, device="cpu"):
    x, weight, shift, _, _ = make(shape, dtype, layout, False, device=device)
    generator = torch.Generator().manual_seed(7)
    filters = (
        torch.randn(8, shape[1] // options.get("groups", 1), *kernel, generator=generator, dtype=torch.float64) / 4
    )
    conv_bias = torch.randn(8, generator=generator, dtype=torch.float64).to(device, dtype) if bias else None
    return x, weight, shift, filters.to(device, dtype), conv_bias


def run(op, arguments, options):
    """y, mean, var and the gradients of every tensor given."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in arguments]
    y, mean, var = op(*inputs, **options)
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)
    return [y.detach(), mean, var, *torch.autograd.grad(y, [t for t in inputs if t is not None], grad)]


@pytest.mark.covering(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "options"), GEOMETRIES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_equals_the_reference_in_float64(kernel, options, layout, bias, relu, device):
    arguments = make_conv((3, 12, 7, 6), kernel, options, torch.float64, layout, bias, device)
    options = options | {"relu": relu}
    ours, reference = (
        run(conv_batch_norm_act, arguments, options),
        run(conv_batch_norm_act_reference, arguments, options),
    )
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert ours[0].stride() == reference[0].stride()


@pytest.mark.many_blocks
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_is_at_most_twice_torchs(layout, dtype, device):
    kernel, options = GEOMETRIES[0]
    arguments = make_conv((16, 24, 14, 14), kernel, options, dtype, layout, True, device)
    ours = run(conv_batch_norm_act, arguments, options)
    torchs = run(conv_batch_norm_act_reference, arguments, options)
    exact = run(conv_batch_norm_act_reference, [t.double() for t in arguments], options)
    names = ["y", "mean", "var", "dx", "dweight", "dbias", "dconv_weight", "dconv_bias"]
    for name, a, b, c in zip(names, ours, torchs, exact, strict=True):
        assert error(a, c) <= max(2 * error(b, c), rounding(a.dtype)), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "options"), GEOMETRIES)
def test_gradcheck(kernel, options, layout):
    arguments = make_conv((2, 4, 5, 4), kernel, options, torch.float64, layout, True)
    inputs = [t.requires_grad_() for t in arguments]
    assert torch.autograd.gradcheck(lambda *args: conv_batch_norm_act(*args, **options)[0], inputs, fast_mode=True)


@pytest.mark.covering(1)
@pytest.mark.parametrize("device", DISPATCHED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 5, 4), (2, 1, 1, 1)])
def test_opcheck(shape, layout, bias, device):
    arguments = make_conv(shape, (1, 1), {}, torch.float32, layout, bias, device)
    geometry, ops = (1, 1, 0, 0, 1, 1, 1), torch.ops.auglocal_ext
    differentiable = [None if t is None else t.clone().requires_grad_() for t in arguments]
    opcheck(ops.conv_batch_norm_act.default, (*differentiable, 1e-5, True, *geometry))
    y, mean, var = ops.conv_batch_norm_act(*arguments, 1e-5, True, *geometry)
    x, weight, shift, filters, _ = arguments
    backward = (torch.randn_like(y), x, weight, shift, filters, bias, mean, var, 1e-5, True, *geometry)
    opcheck(ops.conv_batch_norm_act_backward.default, backward)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_give_the_same_bits(layout, device):
    if device == "cuda":
        torch.backends.cudnn.deterministic = True
    arguments = make_conv((8, 8, 9, 9), (3, 3), {"padding": 1}, torch.float32, layout, True, device)
    runs = [run(conv_batch_norm_act, arguments, {"padding": 1}) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_it_keeps_and_holds(layout):
    """Kept: x. In the backward, never the activation together with its gradient."""
    x, weight, bias, filters, _ = make_conv((16, 8, 16, 16), (3, 3), {}, torch.float32, layout, False)
    inputs = [t.requires_grad_() for t in (x, weight, bias, filters)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, _, _ = conv_batch_norm_act(*inputs, padding=1)
    assert {t.data_ptr() for t in kept if t.numel() >= x.numel()} == {x.data_ptr()}
    grad = torch.randn_like(y)
    with LiveBytes([x, grad]) as live:
        torch.autograd.grad(y, inputs, grad)
    assert live.peak < 3.1 * x.nbytes  # x, the incoming gradient, and one more feature map


def test_autocast_weights_take_the_dtype_of_the_features():
    x, weight, bias, filters, _ = make_conv((2, 4, 5, 5), (3, 3), {}, torch.float32, LAYOUTS[0], False)
    y, _, _ = conv_batch_norm_act(x.bfloat16(), weight, bias, filters.requires_grad_(), padding=1)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert filters.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda w: w[:, :2],
            r"conv_weight must be \(K, 4 / 1 groups, kernel H, kernel W\), given shape \(8, 2, 3, 3\)",
        ),
        (lambda w: w[0], r"conv_weight must be .* given shape \(4, 3, 3\)"),
        (lambda w: w.to("meta"), "conv_weight must be on cpu like x, given meta"),
    ],
)
def test_bad_input_is_named(spoil, message):
    x, weight, bias, filters, _ = make_conv((2, 4, 5, 5), (3, 3), {}, torch.float32, LAYOUTS[0], False)
    with pytest.raises(ValueError, match=message):
        conv_batch_norm_act(x, weight, bias, spoil(filters))


def test_one_value_per_channel_is_refused():
    x, weight, bias, filters, _ = make_conv((1, 4, 1, 1), (1, 1), {}, torch.float32, LAYOUTS[0], False)
    with pytest.raises(ValueError, match="^conv_batch_norm_act: batch statistics need more than one value per channel"):
        conv_batch_norm_act(x, weight, bias, filters)
