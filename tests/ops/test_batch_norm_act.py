"""The batch_norm_act op: value, gradient, error, layouts, dtypes, awkward shapes, bad input."""

import itertools

import pytest
import torch
from ops_helpers import DEVICES, DISPATCHED, LAYOUTS, REGISTERED, error, make, rounding
from torch.library import opcheck

from auglocal_ext.ops import (
    _fallbacks,
    batch_norm_act,
    batch_norm_act_apply,
    batch_norm_act_backward,
    batch_norm_act_reference,
    batch_norm_statistics,
)
from auglocal_ext.ops._library import MISSING
from auglocal_ext.ops.batch_norm_act import ACTIVATIONS

SHAPES = [(5, 20, 7, 6), (3, 1, 2, 2), (4, 17, 1, 1), (2, 3, 70, 80), (9, 33, 3, 5), (1, 5, 1, 2), (6, 16, 8, 8)]
KINDS = list(itertools.product([False, True], [False, True]))  # residual, relu
OTHERS = ACTIVATIONS[2:]  # activations that only tests of their own are run with


def run(op, x, weight, bias, residual, grad, relu):
    """y, mean, var, and the gradients of x, weight, bias[, residual]."""
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    y, mean, var = op(*inputs, act=relu)
    return [y.detach(), mean, var, *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.covering(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("residual", "relu"), KINDS)
def test_equals_the_reference_in_float64(shape, layout, residual, relu, device):
    arguments = make(shape, torch.float64, layout, residual, device=device)
    ours, reference = run(batch_norm_act, *arguments, relu), run(batch_norm_act_reference, *arguments, relu)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert ours[0].stride() == arguments[0].stride()


@pytest.mark.covering(2)
@pytest.mark.many_blocks
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 20, 17, 16), (32, 16, 32, 32), (8, 64, 9, 7), (64, 40, 1, 1)])
@pytest.mark.parametrize(("residual", "relu"), KINDS)
def test_error_is_at_most_twice_torchs(shape, layout, dtype, residual, relu, device):
    x, weight, bias, added, grad = make(shape, dtype, layout, residual, device=device)
    ours = run(batch_norm_act, x, weight, bias, added, grad, relu)
    torchs = run(batch_norm_act_reference, x, weight, bias, added, grad, relu)
    as_double = [t if t is None else t.double() for t in (x, weight, bias, added, grad)]
    exact = run(batch_norm_act_reference, *as_double, relu)
    for name, a, b, c in zip(
        ["y", "mean", "var", "dx", "dweight", "dbias", "dresidual"], ours, torchs, exact, strict=False
    ):
        assert error(a, c) <= max(2 * error(b, c), rounding(a.dtype)), name


@pytest.mark.covering(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 3, 2, 2), (16, 40, 30, 30)])
def test_statistics_alone_are_the_same_bits(shape, layout, dtype, device):
    x, weight, bias, _, _ = make(shape, dtype, layout, False, device=device)
    _, mean, var = torch.ops.auglocal_ext.batch_norm_act(x, weight, bias, None, 1e-5, True)
    alone = batch_norm_statistics(x)
    assert torch.equal(alone[0], mean) and torch.equal(alone[1], var) and mean.dtype == alone[0].dtype


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_the_residual_lies_changes_no_bit_of_the_statistics(layout, device):
    x, weight, bias, added, _ = make((6, 16, 8, 8), torch.float32, layout, True, device=device)
    shifted = torch.empty(x.numel() + 1, device=device).as_strided(x.shape, x.stride(), 1).copy_(added)
    y, *statistics = batch_norm_act(x, weight, bias, shifted)
    assert torch.equal(y, batch_norm_act(x, weight, bias, added)[0])
    assert all(torch.equal(a, b) for a, b in zip(statistics, batch_norm_statistics(x), strict=True))


def test_large_mean_is_survived():
    x, weight, bias, _, grad = make((64, 8, 16, 16), torch.float32, torch.contiguous_format, False, mean=1e4)
    exact = run(batch_norm_act_reference, *(t.double() for t in (x, weight, bias)), None, grad.double(), False)
    for layout in LAYOUTS:
        ours = run(batch_norm_act, x.contiguous(memory_format=layout), weight, bias, None, grad, False)
        assert error(ours[2], exact[2]) < 1e-5  # sum(x^2) - n mean^2 in float32 would be off by 100 %
        assert error(ours[0], exact[0]) < 1e-3  # the mean itself has a rounding of 5e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("residual", "relu"), KINDS)
def test_gradcheck(layout, residual, relu):
    x, weight, bias, added, _ = make((3, 4, 3, 2), torch.float64, layout, residual)
    inputs = [t.requires_grad_() for t in (x, weight, bias, added) if t is not None]
    assert torch.autograd.gradcheck(lambda *args: batch_norm_act(*args, act=relu)[0], inputs)


@pytest.mark.covering(1)
@pytest.mark.parametrize("device", DISPATCHED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "dtype"), REGISTERED)
@pytest.mark.parametrize(("residual", "relu"), KINDS)
def test_opcheck(shape, layout, dtype, residual, relu, device):
    x, weight, bias, added, grad = make(shape, dtype, layout, residual, device=device)
    ops = torch.ops.auglocal_ext
    differentiable = [t if t is None else t.clone().requires_grad_() for t in (x, weight, bias, added)]
    opcheck(ops.batch_norm_act.default, (*differentiable, 1e-5, relu))
    if not (residual or relu):
        opcheck(ops.batch_norm_statistics.default, (x,))
    y, mean, var = ops.batch_norm_act(x, weight, bias, added, 1e-5, relu)
    mask = y if residual and relu else None
    opcheck(ops.batch_norm_act_backward.default, (grad, x, weight, bias, mean, var, mask, 1e-5, relu))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_give_the_same_bits(layout, device):
    arguments = make((16, 24, 13, 11), torch.float32, layout, True, device=device)
    for a, b in zip(run(batch_norm_act, *arguments, True), run(batch_norm_act, *arguments, True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_number_of_threads_changes_no_bit(layout):
    arguments = make((16, 24, 13, 11), torch.float32, layout, True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(batch_norm_act, *arguments, True)
        torch.set_num_threads(3)
        three = run(batch_norm_act, *arguments, True)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs_and_expanded_gradients(device):
    x, weight, bias, added, _ = make((6, 8, 9, 7), torch.float32, torch.contiguous_format, True, device=device)
    sliced = [t[::2, :, 1:, ::2] for t in (x, added)]
    grad = torch.ones((), device=device).expand(sliced[0].shape)
    ours = run(batch_norm_act, sliced[0], weight, bias, sliced[1], grad, True)
    dense = run(batch_norm_act, sliced[0].contiguous(), weight, bias, sliced[1].contiguous(), grad.contiguous(), True)
    assert all(torch.equal(a, b) for a, b in zip(ours, dense, strict=True))
    mixed = run(batch_norm_act, x, weight, bias, added.contiguous(memory_format=torch.channels_last), x, True)
    plain = run(batch_norm_act, x, weight, bias, added, x, True)
    assert all(torch.equal(a, b) for a, b in zip(mixed, plain, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", [False, True])
def test_nan_and_infinity_pass_as_in_torch(layout, residual):
    x, weight, bias, added, grad = make((4, 3, 2, 2), torch.float32, layout, residual)
    x[1, 2, 0, 0] = torch.nan
    ours = run(batch_norm_act, x, weight, bias, added, grad, True)
    reference = run(batch_norm_act_reference, x, weight, bias, added, grad, True)
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    assert ours[0][:, 2].isnan().all() and not ours[0][:, :2].isnan().any()


def test_an_unused_output_gets_no_gradient():
    x, weight, bias, _, _ = make((4, 3, 2, 2), torch.float32, torch.contiguous_format, False)
    y, mean, var = batch_norm_act(x.requires_grad_(), weight, bias)
    assert y.requires_grad and not mean.requires_grad and not var.requires_grad


def test_what_is_kept_for_the_backward():
    """Only x and the output (the next convolution's input), never the normalised tensor between them."""
    x, weight, bias, added, _ = make((4, 8, 6, 6), torch.float32, torch.contiguous_format, True)
    for residual in (None, added):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y, _, _ = batch_norm_act(x.requires_grad_(), weight, bias, residual)
        big = {t.untyped_storage().data_ptr() for t in kept if t.numel() == x.numel()}
        allowed = {x.untyped_storage().data_ptr()} | (
            {y.untyped_storage().data_ptr()} if residual is not None else set()
        )
        assert big == allowed


def backward_arguments(shape, dtype, layout, residual, relu, device="cpu"):
    """What the backward takes: tensors by position, then whether a dresidual goes with them."""
    x, weight, bias, added, grad = make(shape, dtype, layout, residual, device=device)
    y, mean, var = batch_norm_act(x, weight, bias, added, act=relu)
    return (grad, x, weight, bias, mean, var, y if residual and relu else None), residual and relu


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("residual", "relu"), KINDS)
def test_plain_torch_fallback_agrees_with_the_kernels(layout, dtype, residual, relu):
    if MISSING["cpu"]:
        pytest.skip(f"no compiled kernels to compare with: {MISSING['cpu']}")
    shape, tolerance = (5, 20, 7, 6), 1e-5 if dtype == torch.float32 else 1e-2
    x, weight, bias, added, _ = make(shape, dtype, layout, residual)
    plain = _fallbacks.batch_norm_act(x, weight, bias, added, 1e-5, relu)
    native = torch.ops.auglocal_ext.batch_norm_act(x, weight, bias, added, 1e-5, relu)
    out, expected_out = torch.empty_like(x), torch.empty_like(x)
    _fallbacks.batch_norm_act_apply_out(x, weight, bias, *native[1:], added, 1e-5, relu, out)
    torch.ops.auglocal_ext.batch_norm_act_apply_out(x, weight, bias, *native[1:], added, 1e-5, relu, expected_out)

    arguments, masked = backward_arguments(shape, dtype, layout, residual, relu)
    gradients = []
    for op in (_fallbacks.batch_norm_act_backward_out, torch.ops.auglocal_ext.batch_norm_act_backward_out):
        dx, dresidual = torch.empty_like(x), torch.empty_like(x) if masked else None
        gradients.append([*op(*arguments, 1e-5, relu, dx, dresidual), dx, *([dresidual] if masked else [])])
    for a, b in zip([*plain, out, *gradients[0]], [*native, expected_out, *gradients[1]], strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and a.shape == b.shape
        assert error(a, b.double()) <= tolerance


@pytest.mark.covering(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("residual", "relu"), KINDS)
def test_apply_rebuilds_the_output_to_the_bit(shape, layout, dtype, residual, relu, device):
    x, weight, bias, added, _ = make(shape, dtype, layout, residual, device=device)
    y, mean, var = batch_norm_act(x, weight, bias, added, act=relu)
    rebuilt = batch_norm_act_apply(x, weight, bias, mean, var, added, act=relu)
    assert torch.equal(rebuilt, y) and rebuilt.stride() == y.stride()
    for into in ["buffer", "x"] + ["residual"] * residual:
        tensors = {
            "x": x.clone(),
            "residual": added.clone() if residual else None,
            "buffer": torch.full_like(x, torch.nan),
        }
        given = (tensors["x"], weight, bias, mean, var, tensors["residual"])
        assert batch_norm_act_apply(*given, act=relu, out=tensors[into]) is tensors[into]
        assert torch.equal(tensors[into], y), into


@pytest.mark.covering(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("residual", "relu"), KINDS)
def test_in_place_backwards_equal_the_functional_one_to_the_bit(shape, layout, dtype, residual, relu, device):
    """Over the incoming gradient, over the kept input, and into buffers: what gradcheck saw, written elsewhere."""
    arguments, masked = backward_arguments(shape, dtype, layout, residual, relu, device)
    expected = batch_norm_act_backward(*arguments, act=relu)
    assert (expected[1] is None) == (not masked)
    for dx_over, dresidual_over in [
        ("grad", "buffer"),
        ("x", "grad"),
        ("x", "buffer"),
        ("buffer", "y"),
        ("buffer", "x"),
        ("grad", "x"),
        ("buffer", "grad"),
    ]:
        copies = [None if t is None else t.clone() for t in arguments]
        grad, x, *_, y = copies
        places = {"grad": grad, "x": x, "y": y}
        dx = places.get(dx_over, torch.full_like(x, torch.nan))
        dresidual = places.get(dresidual_over, torch.full_like(x, torch.nan)) if masked else None
        given = batch_norm_act_backward(*copies, act=relu, dx=dx, dresidual=dresidual)
        assert given[0] is dx and given[1] is dresidual
        assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True) if b is not None), (
            dx_over,
            dresidual_over,
        )


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("residual", "relu"), KINDS)
def test_opcheck_of_the_parts(layout, residual, relu):
    x, weight, bias, added, _ = make((2, 3, 4, 5), torch.float32, layout, residual)
    arguments, masked = backward_arguments((2, 3, 4, 5), torch.float32, layout, residual, relu)
    ops, (mean, var) = torch.ops.auglocal_ext, arguments[4:6]
    opcheck(ops.batch_norm_act_apply.default, (x, weight, bias, mean, var, added, 1e-5, relu))
    opcheck(ops.batch_norm_act_apply_out.default, (x, weight, bias, mean, var, added, 1e-5, relu, torch.empty_like(x)))
    buffers = torch.empty_like(x), torch.empty_like(x) if masked else None
    opcheck(ops.batch_norm_act_backward_out.default, (*arguments, 1e-5, relu, *buffers))


def test_differentiating_twice_is_an_error_not_a_wrong_number():
    x, weight, bias, _, _ = make((4, 3, 5, 5), torch.float64, LAYOUTS[0], False)
    y, mean, var = batch_norm_act(x.requires_grad_(), weight, bias)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable twice.* use the op's _reference"):
        grad.square().sum().backward()
    with pytest.raises(RuntimeError, match="batch_norm_act_apply is not differentiable"):
        batch_norm_act_apply(x, weight, bias, mean, var).sum().backward()


def test_what_in_place_forms_refuse():
    (grad, x, weight, bias, mean, var, y), _ = backward_arguments((2, 3, 4, 5), torch.float32, LAYOUTS[0], True, True)
    arguments = (grad, x, weight, bias, mean, var)
    with pytest.raises(ValueError, match="give dx, and dresidual exactly where y is given, or neither"):
        batch_norm_act_backward(*arguments, y, dx=grad)
    with pytest.raises(ValueError, match="dx and dresidual must be two tensors, given the same memory"):
        batch_norm_act_backward(*arguments, y, dx=x, dresidual=x)
    with pytest.raises(ValueError, match="give dx, and dresidual"):
        batch_norm_act_backward(*arguments, dresidual=grad)
    with pytest.raises(ValueError, match=r"dx must be like x, .* given \(1, 3, 4, 5\)"):
        batch_norm_act_backward(*arguments, dx=grad[:1])
    with pytest.raises(ValueError, match=r"mean must be \(3,\), given shape \(2,\)"):
        batch_norm_act_apply(x, weight, bias, mean[:2], var)
    if not MISSING["cpu"]:
        with pytest.raises(RuntimeError, match="dx must be contiguous like x"):
            batch_norm_act_backward(*arguments, dx=torch.empty_like(x, memory_format=torch.channels_last))
        with pytest.raises(RuntimeError, match="out must be channels_last like x"):
            batch_norm_act_apply(x.contiguous(memory_format=torch.channels_last), weight, bias, mean, var, out=grad)


BAD = [
    (lambda a: a.update(x=a["x"][0]), ValueError, r"x must be \(N, C, H, W\), given shape \(3, 2, 2\)"),
    (lambda a: a.update(x=a["x"].int()), TypeError, "x must be float32, bfloat16, float16 or float64, given"),
    (lambda a: a.update(weight=a["weight"][:2]), ValueError, r"weight must be \(3,\), given shape \(2,\)"),
    (lambda a: a.update(weight=None), TypeError, r"weight must be a tensor of shape \(3,\), given NoneType"),
    (lambda a: a.update(bias=a["bias"].double()), TypeError, "bias must be torch.float32 for torch.float32 x, given"),
    (lambda a: a.update(residual=a["x"][:1]), ValueError, r"residual must be like x, \(4, 3, 2, 2\)"),
    (lambda a: a.update(residual=a["x"].bfloat16()), ValueError, "given .* torch.bfloat16"),
    (lambda a: a.update(weight=a["weight"].to("meta")), ValueError, "weight must be on cpu like x, given meta"),
    (lambda a: a.update(eps=-1.0), ValueError, "eps must be at least 0, given -1.0"),
    (lambda a: a.update(eps=float("nan")), ValueError, "eps must be at least 0, given nan"),
    (lambda a: a.update(x=a["x"][:1, :, :1, :1]), ValueError, "more than one value per channel"),
]


@pytest.mark.parametrize(("spoil", "kind", "message"), BAD)
def test_bad_input_is_named(spoil, kind, message):
    x, weight, bias, _, _ = make((4, 3, 2, 2), torch.float32, torch.contiguous_format, False)
    arguments = {"x": x, "weight": weight, "bias": bias, "eps": 1e-5}
    spoil(arguments)
    with pytest.raises(kind, match=message):
        batch_norm_act(**arguments)


def test_the_kernels_themselves_refuse_what_would_read_out_of_bounds():
    if MISSING["cpu"]:
        pytest.skip(f"no compiled kernels: {MISSING['cpu']}")
    x, weight, bias, _, grad = make((4, 3, 2, 2), torch.float32, torch.contiguous_format, False)
    with pytest.raises(RuntimeError, match=r"^batch_norm_act: weight must be a \(3,\) tensor"):
        torch.ops.auglocal_ext.batch_norm_act(x, weight[:2], bias, None, 1e-5, True)
    with pytest.raises(RuntimeError, match="y and dresidual go together"):
        torch.ops.auglocal_ext.batch_norm_act_backward_out(grad, x, weight, bias, bias, bias, x, 1e-5, True, x, None)
    with pytest.raises(RuntimeError, match="grad must have the shape"):
        torch.ops.auglocal_ext.batch_norm_act_backward(grad[:2], x, weight, bias, bias, bias, None, 1e-5, True)
    with pytest.raises(RuntimeError, match="y must have the shape"):
        torch.ops.auglocal_ext.batch_norm_act_backward(grad, x, weight, bias, bias, bias, x[:2], 1e-5, True)


# ---- activations other than a ReLU --------------------------------------------------------------------------


def wide(shape, dtype, layout, device="cpu"):
    """x, weight, bias and a gradient, with values of BN(x) on every piece of every activation."""
    x, weight, bias, _, grad = make(shape, dtype, layout, False, device=device)
    return x, 4 * weight, bias, grad


def run_act(op, x, weight, bias, grad, act):
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y, mean, var = op(*inputs, act=act, negative_slope=0.2)
    return [y.detach(), mean, var, *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 20, 7, 6), (4, 17, 1, 1), (9, 33, 3, 5)])
@pytest.mark.parametrize("act", OTHERS)
def test_activations_equal_the_reference_in_float64(act, shape, layout, device):
    arguments = wide(shape, torch.float64, layout, device)
    ours, reference = run_act(batch_norm_act, *arguments, act), run_act(batch_norm_act_reference, *arguments, act)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert ours[0].stride() == arguments[0].stride()


@pytest.mark.covering(2)
@pytest.mark.many_blocks
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", OTHERS)
def test_error_of_activations_is_at_most_twice_torchs(act, layout, dtype, device):
    arguments = wide((16, 24, 12, 8), dtype, layout, device)
    ours, torchs = run_act(batch_norm_act, *arguments, act), run_act(batch_norm_act_reference, *arguments, act)
    exact = run_act(batch_norm_act_reference, *(t.double() for t in arguments), act)
    for name, a, b, c in zip(["y", "mean", "var", "dx", "dweight", "dbias"], ours, torchs, exact, strict=True):
        assert error(a, c) <= max(2 * error(b, c), rounding(a.dtype)), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ["relu", *OTHERS])
def test_values_and_derivatives_are_torchs_at_every_joint(act, layout, dtype, device):
    """BatchNorms of one value a channel with statistics 0 and 1: y is act(x), and dbias its gradient."""
    z = torch.tensor([-torch.inf, -90, -6, -3, -1, -0.25, 0, 0.25, 1, 3, 4, 6, 90, torch.inf, torch.nan], device=device)
    if act == "gelu":  # torch's own is NaN at infinity or not, by where the value lies
        z = z[~z.isinf()]
    x = z.to(dtype).view(1, -1, 1, 1).contiguous(memory_format=layout)
    one = torch.ones(len(z), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    options = {"eps": 0.0, "act": act, "negative_slope": 0.2}
    y = batch_norm_act_apply(x, one, 0 * one, 0 * one, one, **options)
    dbias = batch_norm_act_backward(3 * torch.ones_like(x), x, one, 0 * one, 0 * one, one, **options)[3]
    z = x.to(one.dtype).requires_grad_()
    expected = _fallbacks.activated(z, ACTIVATIONS.index(act), 0.2)
    expected.sum().backward()
    tolerance = {"rtol": max(1e-5, torch.finfo(dtype).eps), "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(y, expected.detach().to(dtype), **tolerance)
    torch.testing.assert_close(dbias, 3 * z.grad.flatten(), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", OTHERS)
def test_gradcheck_of_activations(act, layout):
    x, weight, bias, _ = wide((3, 4, 3, 2), torch.float64, layout)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *args: batch_norm_act(*args, act=act, negative_slope=0.2)[0], inputs)


@pytest.mark.parametrize("device", DISPATCHED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_activations(layout, device):
    x, weight, bias, grad = wide((2, 3, 4, 5), torch.float32, layout, device)
    ops, options = torch.ops.auglocal_ext, (1e-5, ACTIVATIONS.index("leaky_relu"))
    opcheck(ops.batch_norm_act.default, (*(t.clone().requires_grad_() for t in (x, weight, bias)), None, *options, 0.2))
    _, mean, var = ops.batch_norm_act(x, weight, bias, None, *options, 0.2)
    opcheck(ops.batch_norm_act_apply.default, (x, weight, bias, mean, var, None, *options, 0.2))
    opcheck(ops.batch_norm_act_apply_out.default, (x, weight, bias, mean, var, None, *options, grad.clone(), 0.2))
    backward = (grad, x, weight, bias, mean, var, None, *options)
    opcheck(ops.batch_norm_act_backward.default, (*backward, 0.2))
    opcheck(ops.batch_norm_act_backward_out.default, (*backward, torch.empty_like(x), None, 0.2))


@pytest.mark.covering(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", OTHERS)
def test_activations_in_place_and_again_are_the_same_bits(act, layout, dtype, device):
    options = {"act": act, "negative_slope": 0.2}
    for shape in [(5, 20, 7, 6), (6, 16, 8, 8)]:
        x, weight, bias, grad = wide(shape, dtype, layout, device)
        y, *statistics = batch_norm_act(x, weight, bias, **options)
        assert torch.equal(batch_norm_act_apply(x, weight, bias, *statistics, **options), y)
        over = x.clone()
        assert torch.equal(batch_norm_act_apply(over, weight, bias, *statistics, out=over, **options), y)
        added = batch_norm_act(x, weight, bias, grad, **options)[0]
        assert torch.equal(batch_norm_act_apply(x, weight, bias, *statistics, grad, **options), added)
        reference = batch_norm_act_reference(x.double(), weight.double(), bias.double(), grad.double(), **options)[0]
        assert error(added, reference) < max(1e-5, 1.3 * torch.finfo(dtype).eps)
        expected = batch_norm_act_backward(grad, x, weight, bias, *statistics, **options)
        for place in (0, 1):
            copies = [grad.clone(), x.clone()]
            made = batch_norm_act_backward(*copies, weight, bias, *statistics, dx=copies[place], **options)
            assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True) if b is not None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", OTHERS)
def test_plain_torch_fallbacks_of_activations_agree_with_the_kernels(act, layout):
    if MISSING["cpu"]:
        pytest.skip(f"no compiled kernels to compare with: {MISSING['cpu']}")
    x, weight, bias, grad = wide((5, 20, 7, 6), torch.float32, layout)
    ops, options = torch.ops.auglocal_ext, (1e-5, ACTIVATIONS.index(act))
    native = ops.batch_norm_act(x, weight, bias, None, *options, 0.2)
    plain = _fallbacks.batch_norm_act(x, weight, bias, None, *options, 0.2)
    results = []
    for apply, backward in (
        (_fallbacks.batch_norm_act_apply_out, _fallbacks.batch_norm_act_backward_out),
        (ops.batch_norm_act_apply_out, ops.batch_norm_act_backward_out),
    ):
        out, dx = torch.empty_like(x), torch.empty_like(x)
        apply(x, weight, bias, *native[1:], None, *options, out, 0.2)
        sums = backward(grad, x, weight, bias, *native[1:], None, *options, dx, None, 0.2)
        results.append([out, dx, *sums])
    for a, b in zip([*plain, *results[0]], [*native, *results[1]], strict=True):
        assert a.stride() == b.stride() and error(a, b.double()) <= 1e-5


def test_activations_by_name_number_and_bool():
    x, weight, bias, _ = wide((4, 3, 5, 5), torch.float32, LAYOUTS[0])
    for act, name in ((True, "relu"), (False, "none")):
        y = batch_norm_act(x, weight, bias, act=act)[0]
        assert torch.equal(y, batch_norm_act(x, weight, bias, act=name)[0])
        assert torch.equal(y, torch.ops.auglocal_ext.batch_norm_act(x, weight, bias, None, 1e-5, act)[0])
    leaky = [batch_norm_act(x, weight, bias, act="leaky_relu", negative_slope=slope)[0] for slope in (0.0, 1.0)]
    assert torch.equal(leaky[0].relu(), batch_norm_act(x, weight, bias)[0]) and leaky[0].min() == 0
    assert torch.equal(leaky[1], batch_norm_act(x, weight, bias, act=False)[0])


def test_what_activations_refuse():
    x, weight, bias, grad = wide((4, 3, 5, 5), torch.float32, LAYOUTS[0])
    _, mean, var = batch_norm_act(x, weight, bias)
    with pytest.raises(ValueError, match="act must be True, False or one of none, relu, .*, gelu, given 'tanh'"):
        batch_norm_act(x, weight, bias, act="tanh")
    with pytest.raises(ValueError, match="negative_slope must be at least 0, given -0.1"):
        batch_norm_act_apply(x, weight, bias, mean, var, act="leaky_relu", negative_slope=-0.1)
    with pytest.raises(ValueError, match="y is for the mask of a ReLU, given act 'silu'"):
        batch_norm_act_backward(grad, x, weight, bias, mean, var, x, act="silu")
    assert batch_norm_act(x, weight, bias, grad, act="silu")[0].isfinite().all()
    with pytest.raises(ValueError, match="with a residual only a ReLU can be differentiated, given 'silu'"):
        batch_norm_act(x.requires_grad_(), weight, bias, grad, act="silu")
    if not MISSING["cpu"]:
        x, ops = x.detach(), torch.ops.auglocal_ext
        with pytest.raises(RuntimeError, match="^batch_norm_act: act must be 0 to 6, given 7"):
            ops.batch_norm_act(x, weight, bias, None, 1e-5, 7)
        with pytest.raises(
            RuntimeError, match="^batch_norm_act_apply_out: negative_slope must be at least 0, given -1"
        ):
            ops.batch_norm_act_apply_out(x, weight, bias, mean, var, None, 1e-5, 5, grad, -1.0)
        with pytest.raises(RuntimeError, match=r"y, behind a residual, has the mask of a ReLU \(act 1\), given act 2"):
            ops.batch_norm_act_backward(grad, x, weight, bias, mean, var, x, 1e-5, 2)
