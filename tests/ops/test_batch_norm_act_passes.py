"""The backward of batch_norm_act in two passes, for a batch that lies on several devices: two halves against the whole
batch in plain torch, and both passes against the one op."""

import pytest
import torch
from ops_helpers import DEVICES, DISPATCHED, LAYOUTS, REGISTERED, error, make, rounding
from torch.library import opcheck

from auglocal_ext.ops import _fallbacks, batch_norm_act, batch_norm_act_backward, batch_norm_act_reference
from auglocal_ext.ops._library import MISSING
from auglocal_ext.ops.batch_norm_act import ACTIVATIONS

OPS = torch.ops.auglocal_ext
SHAPES = [(5, 20, 7, 6), (3, 1, 2, 2), (4, 17, 1, 1), (2, 3, 70, 80), (9, 33, 3, 5), (6, 16, 8, 8)]
# Residual and activation, as far as the op differentiates them.
CASES = [*((False, act) for act in ACTIVATIONS), (True, "none"), (True, "relu")]


def halves(tensors, layout):
    """The first images of each tensor, and the others, in one layout; None stays."""
    cut = len(tensors[0]) // 2
    for part in (slice(cut), slice(cut, None)):
        yield [None if t is None else t[part].contiguous(memory_format=layout) for t in tensors]


def in_two(grad, x, weight, bias, mean, var, y, act, count=None, other_sums=0, slope=0.2, ops=OPS):
    """dx, dresidual or None, dweight and dbias of some of a batch's images, by both passes; and their sums.

    count, other_sums: values of a channel in the whole batch, and what the sums over its other images come to.
    """
    code, masked = ACTIVATIONS.index(act), None if y is None else torch.full_like(x, torch.nan)
    norm = weight, bias, mean, var
    sums, *parameters = ops.batch_norm_act_backward_sums(grad, x, *norm, y, 1e-5, code, masked, slope)
    means, dx = (sums + other_sums) / (count or x.numel() // x.shape[1]), torch.full_like(x, torch.nan)
    left = (grad, code) if masked is None else (masked, 0)
    ops.batch_norm_act_backward_apply_out(left[0], x, *norm, means, 1e-5, left[1], dx, slope)
    return [dx, masked, *parameters], sums


def given(shape, dtype, layout, residual, act, device):
    """What the backward takes by position, of a batch with values on every piece of every activation."""
    x, weight, bias, added, grad = make(shape, dtype, layout, residual, device=device)
    weight = 4 * weight
    y, mean, var = batch_norm_act(x, weight, bias, added, act=act, negative_slope=0.2)
    return grad, x, weight, bias, mean, var, y if residual and act == "relu" else None


@pytest.mark.covering(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("residual", "act"), CASES)
def test_two_halves_are_the_whole_batch_in_plain_torch(shape, layout, residual, act, device):
    x, weight, bias, added, grad = make(shape, torch.float64, layout, residual, device=device)
    weight = 4 * weight
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias, added) if t is not None]
    whole, mean, var = batch_norm_act_reference(*inputs, act=act, negative_slope=0.2)
    dx, dweight, dbias, *dresidual = torch.autograd.grad(whole, inputs, grad)
    y = whole.detach() if residual and act == "relu" else None
    parts = list(halves((grad, x, y), layout))
    found = [in_two(*part[:2], weight, bias, mean, var, part[2], act) for part in parts]
    count = x.numel() // x.shape[1]
    found = [
        in_two(*part[:2], weight, bias, mean, var, part[2], act, count, other)[0]
        for part, (_, other) in zip(parts, reversed(found), strict=True)
    ]
    torch.testing.assert_close(torch.cat([one[0] for one in found]), dx, rtol=1e-10, atol=1e-10)
    for place, expected in (2, dweight), (3, dbias):  # the parameters' are each half's own
        torch.testing.assert_close(found[0][place] + found[1][place], expected, rtol=1e-10, atol=1e-10)
    if y is not None:
        torch.testing.assert_close(torch.cat([one[1] for one in found]), *dresidual, rtol=1e-10, atol=1e-10)


@pytest.mark.covering(2)
@pytest.mark.many_blocks
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 20, 17, 16), (8, 64, 9, 7), (64, 40, 1, 1)])
@pytest.mark.parametrize(("residual", "act"), CASES)
def test_both_passes_are_the_one_op_to_rounding(shape, layout, dtype, residual, act, device):
    arguments = given(shape, dtype, layout, residual, act, device)
    grad, x, weight, bias, mean, var, y = arguments
    found, sums = in_two(*arguments, act)
    expected = batch_norm_act_backward(*arguments, act=act, negative_slope=0.2)
    as_double = [t if t is None else t.double() for t in arguments]
    exact = batch_norm_act_backward(*as_double, act=act, negative_slope=0.2)
    for name, ours, one_op, value in zip(("dx", "dresidual", "dweight", "dbias"), found, expected, exact, strict=True):
        if value is not None:
            assert error(ours, value) <= 2 * error(one_op, value) + rounding(ours.dtype), name
    assert sums.dtype == torch.float64 and torch.equal(sums[0].to(weight.dtype), found[3])
    if y is not None:
        assert torch.equal(found[1], torch.where(y <= 0, 0, grad))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_passes_may_write_over_what_they_read(layout, device):
    arguments = given((5, 20, 7, 6), torch.float32, layout, True, "relu", device)
    (dx, dresidual, dweight, dbias), sums = in_two(*arguments, "relu")
    grad, x, *norm, y = (t.clone() for t in arguments)
    made = OPS.batch_norm_act_backward_sums(grad, x, *norm, y, 1e-5, 1, grad)
    assert torch.equal(grad, dresidual) and all(map(torch.equal, made, (sums, dweight, dbias)))
    means = sums / (x.numel() // x.shape[1])
    over = x.clone()
    OPS.batch_norm_act_backward_apply_out(grad, over, *norm, means, 1e-5, 0, over)
    assert torch.equal(over, dx)
    OPS.batch_norm_act_backward_apply_out(grad, x, *norm, means, 1e-5, 0, grad)
    assert torch.equal(grad, dx)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_number_of_threads_changes_no_bit(layout):
    arguments, threads, runs = given((16, 24, 13, 11), torch.float32, layout, True, "relu", "cpu"), [], []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found, sums = in_two(*arguments, "relu")
            runs.append([*found, sums])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("residual", "act"), CASES)
def test_plain_torch_fallback_agrees_with_the_kernels(layout, dtype, residual, act):
    if MISSING["cpu"]:
        pytest.skip(f"no compiled kernels to compare with: {MISSING['cpu']}")
    arguments = given((5, 20, 7, 6), dtype, layout, residual, act, "cpu")
    plain, plain_sums = in_two(*arguments, act, ops=_fallbacks)
    kernels, sums = in_two(*arguments, act)
    for a, b in zip([*plain, plain_sums], [*kernels, sums], strict=True):
        if b is not None:
            assert a.dtype == b.dtype and a.stride() == b.stride() and a.shape == b.shape
            assert error(a, b.double()) <= (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.covering(1)
@pytest.mark.parametrize("device", DISPATCHED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "dtype"), REGISTERED)
@pytest.mark.parametrize(("residual", "act"), [(False, "none"), (False, "silu"), (True, "relu")])
def test_opcheck(shape, layout, dtype, residual, act, device):
    x, weight, bias, _, grad = make(shape, dtype, layout, residual, device=device)
    mean, var, code = bias.clone(), weight.clone(), ACTIVATIONS.index(act)
    y, masked = (x.clone(), torch.empty_like(x)) if residual else (None, None)
    norm = weight, bias, mean, var
    opcheck(OPS.batch_norm_act_backward_sums.default, (grad, x, *norm, y, 1e-5, code, masked))
    means = torch.zeros(2, shape[1], dtype=torch.float64, device=device)
    opcheck(OPS.batch_norm_act_backward_apply_out.default, (grad, x, *norm, means, 1e-5, code, torch.empty_like(x)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_no_images_the_sums_are_zero(layout, device):
    x, weight, bias, _, grad = make((0, 3, 2, 2), torch.float32, layout, False, device=device)
    norm = weight, bias, bias, weight
    made = OPS.batch_norm_act_backward_sums(grad, x, *norm, None, 1e-5, 1, None)
    assert [t.tolist() for t in made] == [[[0.0] * 3] * 2, [0.0] * 3, [0.0] * 3]
    OPS.batch_norm_act_backward_apply_out(grad, x, *norm, made[0], 1e-5, 1, x)


def test_what_the_kernels_refuse():
    if MISSING["cpu"]:
        pytest.skip(f"no compiled kernels: {MISSING['cpu']}")
    grad, x, *norm, y = given((4, 3, 2, 2), torch.float32, LAYOUTS[0], True, "relu", "cpu")
    means = torch.zeros(2, 3, dtype=torch.float64)
    sums, apply = OPS.batch_norm_act_backward_sums, OPS.batch_norm_act_backward_apply_out
    with pytest.raises(RuntimeError, match="^batch_norm_act_backward_sums: y and masked go together, given one of"):
        sums(grad, x, *norm, y, 1e-5, 1, None)
    with pytest.raises(RuntimeError, match=r"has the mask of a ReLU \(act 1\), given act 2"):
        sums(grad, x, *norm, y, 1e-5, 2, grad)
    with pytest.raises(RuntimeError, match="masked must have the shape"):
        sums(grad, x, *norm, y, 1e-5, 1, grad[:2])
    for wrong in means[:, :2], means.float(), means[0], means.t().contiguous().t():
        with pytest.raises(RuntimeError, match=r"means must be a contiguous \(2, 3\) tensor of float64 on the device"):
            apply(grad, x, *norm, wrong, 1e-5, 1, grad)
    with pytest.raises(RuntimeError, match="dx must be contiguous like x"):
        apply(grad, x, *norm, means, 1e-5, 1, torch.empty_like(x, memory_format=torch.channels_last))
