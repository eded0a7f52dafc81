"""The batch_norm_act_max_pool op: value, gradient, error, windows, layouts, dtypes, bad input."""

import pytest
import torch
import torch.nn.functional as F
from ops_helpers import DEVICES, DISPATCHED, LAYOUTS, error, make, rounding
from torch.library import opcheck

from auglocal_ext.ops import (
    _fallbacks,
    batch_norm_act_max_pool,
    batch_norm_act_max_pool_reference,
    batch_norm_statistics,
)
from auglocal_ext.ops._library import MISSING

SHAPES = [(3, 17, 12, 11), (2, 1, 5, 5), (4, 8, 3, 2), (1, 3, 30, 30)]
WINDOWS = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    {"kernel_size": 2, "stride": 3, "ceil_mode": True},
    {"kernel_size": 1, "stride": 2},
]


def run(op, x, weight, bias, grad_seed, window):
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y, mean, var = op(*inputs, **window)
    generator = torch.Generator().manual_seed(grad_seed)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)
    return [y.detach(), mean, var, *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.covering(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", WINDOWS)
def test_equals_the_reference_in_float64(shape, layout, window, device):
    x, weight, bias, _, _ = make(shape, torch.float64, layout, False, device=device)
    weight[0] = -weight[0]  # a negative scale turns a channel's maxima into minima
    ours = run(batch_norm_act_max_pool, x, weight, bias, 1, window)
    reference = run(batch_norm_act_max_pool_reference, x, weight, bias, 1, window)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert ours[0].stride() == reference[0].stride()


@pytest.mark.covering(2)
@pytest.mark.many_blocks
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 20, 28, 28), (16, 64, 9, 7), (8, 20, 27, 56)])
def test_error_is_at_most_twice_torchs(shape, layout, dtype, device):
    x, weight, bias, _, _ = make(shape, dtype, layout, False, device=device)
    ours = run(batch_norm_act_max_pool, x, weight, bias, 1, WINDOWS[0])
    torchs = run(batch_norm_act_max_pool_reference, x, weight, bias, 1, WINDOWS[0])
    exact = run(batch_norm_act_max_pool_reference, x.double(), weight.double(), bias.double(), 1, WINDOWS[0])
    for name, a, b, c in zip(["y", "mean", "var", "dx", "dweight", "dbias"], ours, torchs, exact, strict=True):
        assert error(a, c) <= max(2 * error(b, c), rounding(a.dtype)), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_gradcheck(layout, window):
    x, weight, bias, _, _ = make((2, 3, 5, 4), torch.float64, layout, False)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *args: batch_norm_act_max_pool(*args, **window)[0], inputs)


@pytest.mark.covering(1)
@pytest.mark.parametrize("device", DISPATCHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 6, 5), (2, 1, 2, 2), (0, 3, 4, 4)])
def test_opcheck(shape, layout, dtype, device):
    x, weight, bias, _, _ = make(shape, dtype, layout, False, device=device)
    ops, sizes = torch.ops.auglocal_ext, (shape[2] // 2 + shape[2] % 2, shape[3] // 2 + shape[3] % 2)
    window = (3, 3, 2, 2, 1, 1)
    differentiable = [t.clone().requires_grad_() for t in (x, weight, bias)]
    opcheck(ops.batch_norm_act_max_pool.default, (*differentiable, 1e-5, *window, *sizes))
    mean, var = batch_norm_statistics(x)
    apply = (x, weight, bias, mean, var, 1e-5, *window, *sizes)
    opcheck(ops.batch_norm_act_max_pool_apply.default, apply)
    y, index = ops.batch_norm_act_max_pool_apply(*apply)
    backward = (y.clone(), x, index, weight, bias, mean, var, 1e-5, *window)
    opcheck(ops.batch_norm_act_max_pool_backward.default, backward)
    opcheck(ops.batch_norm_act_max_pool_backward_out.default, (*backward, torch.empty_like(x)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("over", ["grad", "x"])
def test_in_place_over_the_kept_input_and_run_to_run(layout, over, device):
    x, weight, bias, _, _ = make((4, 9, 8, 8), torch.float32, layout, False, device=device)
    ops, window = torch.ops.auglocal_ext, (1, 1, 1, 1, 0, 0) if over == "grad" else (3, 3, 2, 2, 1, 1)
    sizes = (8, 8) if over == "grad" else (4, 4)
    y, index, mean, var = ops.batch_norm_act_max_pool(x, weight, bias, 1e-5, *window, *sizes)
    arguments = (y, x, index, weight, bias, mean, var, 1e-5, *window)
    expected = ops.batch_norm_act_max_pool_backward(*arguments)
    assert all(
        torch.equal(a, b) for a, b in zip(expected, ops.batch_norm_act_max_pool_backward(*arguments), strict=True)
    )
    dx = torch.empty_like(x) if over == "grad" else x
    rest = ops.batch_norm_act_max_pool_backward_out(*arguments, dx)
    assert all(torch.equal(a, b) for a, b in zip((dx, *rest), expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [(3, 3, 2, 2, 1, 1), (2, 2, 2, 2, 0, 0)])
def test_plain_torch_fallback_agrees_with_the_kernels(layout, window):
    if MISSING["cpu"]:
        pytest.skip(f"no compiled kernels to compare with: {MISSING['cpu']}")
    x, weight, bias, _, _ = make((3, 9, 8, 6), torch.float32, layout, False)
    mean, var = batch_norm_statistics(x)
    ops, apply = torch.ops.auglocal_ext, (x, weight, bias, mean, var, 1e-5, *window, 4, 3)
    plain, native = _fallbacks.batch_norm_act_max_pool_apply(*apply), ops.batch_norm_act_max_pool_apply(*apply)
    assert torch.equal(plain[1], native[1]) and plain[1].stride() == native[1].stride()
    torch.testing.assert_close(plain[0], native[0])
    backward, dx = (
        (native[0], x, native[1], weight, bias, mean, var, 1e-5, *window),
        [torch.empty_like(x) for _ in "12"],
    )
    a = _fallbacks.batch_norm_act_max_pool_backward_out(*backward, dx[0])
    b = ops.batch_norm_act_max_pool_backward_out(*backward, dx[1])
    for given, expected in zip((dx[0], *a), (dx[1], *b), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_wins_as_in_torch(layout):
    x, weight, bias, _, _ = make((2, 3, 6, 6), torch.float32, layout, False)
    x[1, 2, 3, 3] = torch.nan
    y, _, _ = batch_norm_act_max_pool(x, weight, bias, 3, 2, 1)
    assert torch.equal(y.isnan(), batch_norm_act_max_pool_reference(x, weight, bias, 3, 2, 1)[0].isnan())


def test_what_is_kept_for_the_backward():
    """The input, one byte an output, and per-channel tensors: 4.25 bytes per input element at stride 2 in fp32."""
    x, weight, bias, _, _ = make((2, 16, 32, 32), torch.float32, LAYOUTS[0], False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        batch_norm_act_max_pool(x.requires_grad_(), weight, bias, 3, 2, 1)
    assert sum(t.nbytes for t in kept) == 4.25 * x.numel() + 4 * weight.nbytes


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ({"kernel_size": 17}, "kernel_size must be 1 to 16 along each axis, given 17"),
        ({"kernel_size": 2, "stride": 0}, r"stride must be at least 1, given \(0, 0\)"),
        ({"kernel_size": 2, "padding": 2}, r"padding must be at most half of kernel_size \(2, 2\), given \(2, 2\)"),
        ({"kernel_size": 9}, r"a window of \(9, 9\) does not fit x of shape \(2, 3, 6, 6\)"),
    ],
)
def test_bad_windows(window, message):
    x, weight, bias, _, _ = make((2, 3, 6, 6), torch.float32, LAYOUTS[0], False)
    with pytest.raises(ValueError, match=message):
        batch_norm_act_max_pool(x, weight, bias, **window)


def test_one_value_per_channel_is_refused():
    x, weight, bias, _, _ = make((1, 3, 1, 1), torch.float32, LAYOUTS[0], False)
    with pytest.raises(ValueError, match="^batch_norm_act_max_pool: batch statistics need more than one value per"):
        batch_norm_act_max_pool(x, weight, bias, 1)


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_output_sizes_are_torchs(size, kernel, ceil_mode):
    for stride in (1, 2, 3):
        for padding in range(kernel // 2 + 1):
            if size + 2 * padding < kernel:
                continue
            options = {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}
            x = torch.randn(2, 1, size, 3 + kernel)
            y, _, _ = batch_norm_act_max_pool(x, torch.ones(1), torch.zeros(1), **options)
            assert y.shape == F.max_pool2d(x, **options).shape, options
