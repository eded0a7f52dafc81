"""Where tensors end: maps without values, bytes and labels that point outside, parameters with gaps between values."""

import re

import pytest
import torch
from ops_helpers import DEVICES, LAYOUTS, make

from auglocal_ext import ops
from auglocal_ext.ops import _fallbacks
from auglocal_ext.ops._library import MISSING
from auglocal_ext.ops._linear_cross_entropy import _check_loss

OPS = torch.ops.auglocal_ext
WITHOUT_VALUES = [(4, 6, 5, 0), (4, 6, 0, 3), (4, 6, 0, 0), (3, 1, 0, 1), (0, 6, 5, 3), (0, 6, 1, 1), (0, 6, 0, 0)]
WITHOUT_CHANNELS = [(4, 0, 5, 3), (4, 0, 1, 1), (0, 0, 0, 0)]
EMPTY = WITHOUT_VALUES + WITHOUT_CHANNELS
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = [(False, False), (False, True), (True, False), (True, True)]  # residual, relu
CPU_IS_COMPILED = pytest.mark.skipif(MISSING["cpu"] is not None, reason=f"no compiled kernels: {MISSING['cpu']}")


def equal(ours, expected):
    """The same bits, NaN included, shapes and dtypes."""
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(nan=123.0), b.nan_to_num(nan=123.0))


# ---- maps without values ------------------------------------------------------------------------------------


@pytest.mark.covering(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize(("residual", "relu"), KINDS)
def test_batch_norm_act(shape, layout, dtype, residual, relu, device):
    *inputs, grad = make(shape, dtype, layout, residual, device=device)
    results = []
    for op in (ops.batch_norm_act, ops.batch_norm_act_reference):
        if op is ops.batch_norm_act_reference and shape in WITHOUT_CHANNELS:  # where torch looks for a first channel
            results.append([torch.empty_like(t) for t in (inputs[0], inputs[1], inputs[1])])
            results[1] += [torch.empty_like(t) for t in inputs if t is not None]
            continue
        given = [t.detach().requires_grad_() for t in inputs if t is not None]
        y, mean, var = op(*given, act=relu)
        results.append([y.detach(), mean, var, *torch.autograd.grad(y, given, grad)])
    results[1][1:3] = [torch.zeros_like(inputs[1])] * 2  # torch's statistics of nothing are NaN
    equal(*results)


@pytest.mark.covering(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize(("residual", "relu"), KINDS)
def test_every_part_of_it(shape, layout, dtype, residual, relu, device):
    x, weight, bias, added, grad = make(shape, dtype, layout, residual, device=device)
    zeros = torch.zeros_like(weight)
    equal(ops.batch_norm_statistics(x), (zeros, zeros))
    equal([ops.batch_norm_act_apply(x, weight, bias, zeros, zeros, added, act=relu)], [x])
    equal([ops.batch_norm_act_apply(x, weight, bias, zeros, zeros, added, act=relu, out=x)], [x])
    y = x.clone() if residual and relu else None
    arguments = (grad, x, weight, bias, zeros, zeros, y)
    for into in ({}, {"dx": grad, "dresidual": None if y is None else y}):
        dx, dresidual, *rest = ops.batch_norm_act_backward(*arguments, act=relu, **into)
        equal([dx, *rest], [x, zeros, zeros])
        assert (dresidual is None) == (y is None) and (y is None or dresidual.shape == shape)


@pytest.mark.covering(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize(("residual", "relu"), KINDS)
def test_the_mean_of_no_values_is_nan_with_gradients_of_zero_as_in_torch(shape, layout, dtype, residual, relu, device):
    x, weight, bias, added, _ = make(shape, dtype, layout, residual, device=device)
    zeros, expected = torch.zeros_like(weight), x.to(weight.dtype).mean((2, 3))
    pooled, *statistics = OPS.batch_norm_act_mean(x, weight, bias, added, 1e-5, relu)
    equal([pooled, *statistics], [expected, zeros, zeros])
    equal([OPS.batch_norm_act_mean_apply(x, weight, bias, zeros, zeros, added, 1e-5, relu)], [expected])
    mask = added if relu else None
    arguments = (torch.ones_like(expected), x, weight, bias, zeros, zeros, mask, 1e-5, relu)
    dx, dresidual, *sums = OPS.batch_norm_act_mean_backward(*arguments, mask is not None)
    equal([dx, *sums], [x, zeros, zeros])
    assert mask is None or dresidual.shape == shape
    equal(OPS.batch_norm_act_mean_backward_out(*arguments, x, mask), [zeros, zeros])


@pytest.mark.parametrize("shape", EMPTY)
def test_plain_torch_fallbacks(shape):
    x, weight, bias, added, grad = make(shape, torch.float32, LAYOUTS[0], True)
    zeros, of_maps = torch.zeros_like(weight), torch.ones(shape[:2])
    equal(_fallbacks.batch_norm_act(x, weight, bias, added, 1e-5, True), (x, zeros, zeros))
    equal(_fallbacks.batch_norm_statistics(x), (zeros, zeros))
    _fallbacks.batch_norm_act_apply_out(x, weight, bias, zeros, zeros, added, 1e-5, True, x)
    backward = (x, weight, bias, zeros, zeros, added, 1e-5, True, x, added)
    equal(_fallbacks.batch_norm_act_backward_out(grad, *backward), (zeros, zeros))
    equal(_fallbacks.batch_norm_act_mean_backward_out(of_maps, *backward), (zeros, zeros))
    equal([_fallbacks.batch_norm_act_mean_apply(x, weight, bias, zeros, zeros, added, 1e-5, True)], [x.mean((2, 3))])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_pool_takes_no_samples_and_refuses_what_torch_refuses(layout, device):
    for shape in [(0, 6, 5, 3), (0, 1, 3, 3)]:
        results = []
        for op in (ops.batch_norm_act_max_pool, ops.batch_norm_act_max_pool_reference):
            inputs = [t.requires_grad_() for t in make(shape, torch.float32, layout, False, device=device)[:3]]
            y, mean, _ = op(*inputs, 3, 2, 1)
            results.append([y.detach(), *torch.autograd.grad(y, inputs, torch.zeros_like(y))])
            assert mean.shape == shape[1:2]
        equal(*results)
    for shape in [(4, 6, 5, 0), (4, 6, 0, 3), (4, 0, 5, 3), (0, 6, 0, 3), (0, 0, 5, 3)]:
        x, weight, bias, _, _ = make(shape, torch.float32, layout, False, device=device)
        with pytest.raises(RuntimeError):
            torch.nn.functional.max_pool2d(x, 2, 2, 1)
        with pytest.raises(
            ValueError,
            match=re.escape(
                f"must have channels and values to take the maximum of, {shape}".replace("of, ", "of, given shape ")
            ),
        ):
            ops.batch_norm_act_max_pool(x, weight, bias, 2, 2, 1)
        window = (2, 2, 2, 2, 1, 1)
        with pytest.raises(RuntimeError, match="x must have channels|do not fit 0 values"):
            OPS.batch_norm_act_max_pool_apply(x, weight, bias, bias, bias, 1e-5, *window, 1, 1)
        index = torch.zeros(*shape[:2], 1, 1, dtype=torch.uint8, device=device)
        with pytest.raises(RuntimeError, match="x must have channels|do not fit 0 values"):
            arguments = (index.float(), x, index, weight, bias, bias, bias, 1e-5, *window, x)
            OPS.batch_norm_act_max_pool_backward_out(*arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", EMPTY)
def test_a_convolution_answers_as_torchs(shape, layout, device):
    x, weight, bias, _, _ = make(shape, torch.float32, layout, False, device=device)
    filters = torch.ones(8, shape[1], 1, 1, device=device)
    inputs = [t.requires_grad_() for t in (x, weight, bias, filters)]
    try:
        expected = torch.nn.functional.conv2d(x, filters)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            ops.conv_batch_norm_act(*inputs)
        return
    y, *statistics = ops.conv_batch_norm_act(*inputs)
    equal([y, *statistics], [expected, torch.zeros_like(weight), torch.zeros_like(weight)])
    gradients = torch.autograd.grad(y, inputs, torch.ones_like(y))
    equal(gradients, [torch.zeros_like(t) for t in inputs])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [0, 4])
@pytest.mark.parametrize("c", [0, 5])
def test_a_head_of_no_samples_or_no_channels(n, c, device):
    generator, results = torch.Generator().manual_seed(0), []
    given = [torch.randn(size, generator=generator) for size in [(n, c, 2, 3), (7, c), (7,)]]
    labels = torch.randint(7, (n,), generator=generator).to(device)
    for op in (ops.pooled_cross_entropy, ops.pooled_cross_entropy_reference):
        inputs = [t.to(device).requires_grad_() for t in given]
        loss, logits, *_ = op(*inputs, labels)
        results.append([loss.detach(), logits.detach(), *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    if c == 0:
        affine = torch.ones(0, device=device)
        with pytest.raises(ValueError, match="head_bn needs channels, given shape"):
            ops.pooled_cross_entropy(*inputs, labels, head_bn=(affine, affine, 1e-5))
        with_bn = ops.pooled_cross_entropy(*inputs, labels, bn=(affine, affine))
        equal([with_bn.logits.detach(), with_bn.mean], [results[0][1], affine])


def test_a_head_over_no_values_is_refused():
    for shape in [(4, 3, 0, 2), (4, 3, 2, 0), (0, 3, 0, 0)]:
        with pytest.raises(ValueError, match="x must have values to average over"):
            ops.pooled_cross_entropy(torch.ones(shape), torch.ones(5, 3), None, torch.zeros(shape[0]).long())


# ---- bytes and labels that point outside --------------------------------------------------------------------

WINDOWS = [(3, 3, 2, 2, 1, 1), (2, 2, 2, 2, 0, 0), (1, 1, 1, 1, 0, 0), (3, 2, 1, 2, 1, 0), (16, 16, 3, 3, 8, 8)]


def guarded(values, guard=4096):
    """values within a buffer of NaN, in their layout; and whether the NaN are still there."""
    n = values.numel()
    buffer = torch.full((n + 2 * guard,), torch.nan, dtype=values.dtype, device=values.device)
    inside = buffer[guard : guard + n].as_strided(values.shape, values.stride(), guard)
    inside.copy_(values)
    return inside, lambda: bool(buffer[:guard].isnan().all() and buffer[guard + n :].isnan().all())


def taps_outside(index, window, shape):
    """Which bytes name no value of their window."""
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w = window
    index = index.long().cpu()
    rows = torch.arange(index.shape[2]).view(-1, 1) * stride_h - padding_h + index // kernel_w
    columns = torch.arange(index.shape[3]) * stride_w - padding_w + index % kernel_w
    inside = (rows >= 0) & (rows < shape[2]) & (columns >= 0) & (columns < shape[3])
    return ~(inside & (index < kernel_h * kernel_w))


@pytest.mark.covering(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("byte", [None, 0, 2, 8, 9, 128, 255])
@pytest.mark.parametrize("shape", [(2, 8, 10, 12), (1, 3, 9, 9)])
def test_any_byte_as_an_index_of_the_max_pool(shape, byte, window, layout, dtype, device):
    """A byte that names no value of its window takes no gradient, in the sums as in dx, and reads nothing outside."""
    x, weight, bias, _, _ = make(shape, dtype, layout, False, device=device)
    mean, var = ops.batch_norm_statistics(x)
    sizes = [
        (size + 2 * p - k) // s + 1
        for size, k, s, p in zip(shape[2:], *(window[i : i + 2] for i in (0, 2, 4)), strict=True)
    ]
    y, index = OPS.batch_norm_act_max_pool_apply(x, weight, bias, mean, var, 1e-5, *window, *sizes)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, generator=generator).to(device, dtype).contiguous(memory_format=layout)
    wild = torch.randint(256, y.shape, generator=generator) if byte is None else torch.full(y.shape, byte)
    wild = wild.to(device, torch.uint8).contiguous(memory_format=layout)
    outside = taps_outside(wild, window, shape).to(device)
    # The same with those gradients zero, and their bytes as the forward made them.
    tame = torch.where(outside, index, wild), torch.where(outside, 0, grad)
    tame = [t.contiguous(memory_format=layout) for t in tame]
    results = []
    for taps, incoming in ((wild, grad), tame):
        (given, kept), (dx, written) = guarded(x), guarded(torch.zeros_like(x))
        arguments = (incoming, given, taps, weight, bias, mean, var, 1e-5, *window, dx)
        results.append([*OPS.batch_norm_act_max_pool_backward_out(*arguments), dx])
        assert kept() and written() and all(t.isfinite().all() for t in results[-1])
    equal(*results)
    dx = torch.zeros_like(x)
    plain = (grad, x, wild, weight, bias, mean, var, 1e-5, *window, dx)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float64: 1e-9}[dtype]
    for a, b in zip([*_fallbacks.batch_norm_act_max_pool_backward_out(*plain), dx], results[0], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_window_of_minus_infinities_takes_no_gradient(layout):
    """No value of it is larger than what the search begins with: its byte may name the padding."""
    x, weight, bias, _, _ = make((2, 4, 4, 4), torch.float32, layout, False)
    x.fill_(-torch.inf)
    zeros, window = torch.zeros_like(bias), (3, 3, 2, 2, 1, 1)
    y, index = OPS.batch_norm_act_max_pool_apply(x, weight, bias, zeros, zeros + 1, 1e-5, *window, 2, 2)
    (given, kept), dx = guarded(x), torch.empty_like(x)
    arguments = (torch.ones_like(y), given, index, weight, bias, zeros, zeros + 1, 1e-5, *window, dx)
    equal(OPS.batch_norm_act_max_pool_backward_out(*arguments)[1:], [zeros])
    assert not y.any() and kept()


WILD_LABELS = [5, -1, 2**31, 2**62, -(2**63), 2**63 - 1]


def test_any_number_as_a_label():
    generator = torch.Generator().manual_seed(0)
    pooled, weight = torch.randn(8, 4, generator=generator), torch.randn(5, 4, generator=generator)
    labels = torch.tensor([0, *WILD_LABELS, 3])
    for label_smoothing in (0.0, 0.1):
        loss, *rest = _fallbacks.linear_cross_entropy(pooled, weight, None, labels, label_smoothing, -100)
        ignored = labels.where((labels >= 0) & (labels < 5), -100)
        _, *expected = _fallbacks.linear_cross_entropy(pooled, weight, None, ignored, label_smoothing, -100)
        assert loss.isnan()
        equal(rest, expected)
        for label in WILD_LABELS:
            with pytest.raises(ValueError, match=f"labels must be 0 to 4 or ignore_index -100, given {label}"):
                one = torch.full((8,), label)
                OPS.linear_cross_entropy(pooled, weight, None, one, label_smoothing, -100)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ({"weight": torch.ones(5, 3)}, r"\(N, C\) and \(K, C\) with K at least 1, given shapes \(6, 4\) and \(5, 3\)"),
        ({"weight": torch.ones(0, 4)}, r"with K at least 1, given shapes \(6, 4\) and \(0, 4\)"),
        ({"pooled": torch.ones(6, 4, 1)}, r"given shapes \(6, 4, 1\) and \(5, 4\)"),
        ({"bias": torch.ones(4)}, r"bias must be \(5,\), given shape \(4,\)"),
        ({"labels": torch.zeros(5).long()}, r"labels must be \(6,\) of int64, given \(5,\) of torch.int64"),
        ({"labels": torch.zeros(6).int()}, r"labels must be \(6,\) of int64, given \(6,\) of torch.int32"),
        ({"labels": torch.zeros(6, 4)}, r"labels must be \(6, 5\) of float32, given \(6, 4\) of torch.float32"),
        (
            {"labels": torch.zeros(6, 5).double()},
            r"labels must be \(6, 5\) of float32, given \(6, 5\) of torch.float64",
        ),
        (
            {"class_weight": torch.ones(4)},
            r"class_weight must be \(5,\) of torch.float32, given \(4,\) of torch.float32",
        ),
        ({"class_weight": torch.ones(5).double()}, r"\(5,\) of torch.float32, given \(5,\) of torch.float64"),
    ],
)
def test_the_loss_refuses_what_would_read_out_of_bounds(spoiled, message, device):
    given = {"pooled": torch.ones(6, 4), "weight": torch.ones(5, 4), "bias": torch.ones(5)}
    given |= {"labels": torch.zeros(6).long()}
    given = {name: t.to(device) for name, t in (given | spoiled).items()}
    with pytest.raises(ValueError, match=f"linear_cross_entropy: .*{message}"):
        class_weight = given.pop("class_weight", None)
        OPS.linear_cross_entropy(*given.values(), 0.0, -100, class_weight)


def test_the_loss_refuses_tensors_of_several_devices():
    labels = torch.zeros(6, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="all tensors must be on cpu like pooled, given one on meta"):
        _check_loss(torch.ones(6, 4), torch.ones(5, 4), None, labels)


# ---- parameters with gaps between values --------------------------------------------------------------------


def gapped(t):
    """The same values, not contiguous."""
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_and_statistics_may_have_any_strides(layout, device):
    x, weight, bias, added, grad = make((4, 6, 4, 4), torch.float32, layout, True, device=device)
    mean, var = ops.batch_norm_statistics(x)
    dense, of_maps = (weight, bias, mean, var), torch.ones(4, 6, device=device)
    with_gaps = [gapped(t) for t in dense]
    assert not any(t.is_contiguous() for t in with_gaps)
    window, (y, _, _) = (2, 2, 2, 2, 0, 0), ops.batch_norm_act(x, weight, bias, added)

    def everything(weight, bias, mean, var):
        yield ops.batch_norm_act(x, weight, bias, added)
        yield [ops.batch_norm_act_apply(x, weight, bias, mean, var, added)]
        out = torch.empty_like(x)
        OPS.batch_norm_act_apply_out(x, weight, bias, mean, var, added, 1e-5, True, out)
        yield [out]
        yield OPS.batch_norm_act_backward(grad, x, weight, bias, mean, var, y, 1e-5, True)
        yield OPS.batch_norm_act_backward_out(grad, x, weight, bias, mean, var, None, 1e-5, True, out, None)
        yield OPS.batch_norm_act_mean(x, weight, bias, added, 1e-5, True)
        yield [OPS.batch_norm_act_mean_apply(x, weight, bias, mean, var, added, 1e-5, True)]
        yield OPS.batch_norm_act_mean_backward(of_maps, x, weight, bias, mean, var, added, 1e-5, True, True)
        pooled = OPS.batch_norm_act_max_pool_apply(x, weight, bias, mean, var, 1e-5, *window, 2, 2)
        yield pooled
        yield OPS.batch_norm_act_max_pool_backward(*pooled[:1], x, pooled[1], weight, bias, mean, var, 1e-5, *window)
        yield ops.conv_batch_norm_act(x, weight, bias, torch.ones(2, 6, 1, 1, device=device))

    for ours, expected in zip(everything(*with_gaps), everything(*dense), strict=True):
        equal(ours, expected)


@CPU_IS_COMPILED
def test_what_the_kernels_refuse_is_one_sentence_without_a_path():
    x, weight, bias, _, grad = make((4, 3, 2, 2), torch.float32, LAYOUTS[0], False)
    window = (2, 2, 2, 2, 0, 0)
    index = torch.zeros(4, 3, 1, 1, dtype=torch.uint8)
    for name, *arguments in [
        ("batch_norm_statistics", x[0]),
        ("batch_norm_statistics", x.int()),
        ("batch_norm_act", x, weight[:2], bias, None, 1e-5, True),
        ("batch_norm_act", x, weight, bias.double(), None, 1e-5, True),
        ("batch_norm_act", x, weight, bias, x[:1], 1e-5, True),
        ("batch_norm_act_apply_out", x, weight, bias, bias[:1], bias, None, 1e-5, True, x),
        ("batch_norm_act_backward_out", grad, x, weight, bias, bias, bias, x, 1e-5, True, x, None),
        ("batch_norm_act_mean_apply", x, weight, bias, bias, bias, x[:1], 1e-5, True),
        ("batch_norm_act_mean_backward_out", x[0], x, weight, bias, bias, bias, None, 1e-5, True, x, None),
        ("batch_norm_act_max_pool_apply", x, weight, bias, bias, bias, 1e-5, 17, *window[1:], 1, 1),
        ("batch_norm_act_max_pool_apply", x, weight, bias, bias, bias, 1e-5, *window, 3, 1),
        ("batch_norm_act_max_pool_backward_out", x, x, index, weight, bias, bias, bias, 1e-5, *window, x),
    ]:
        with pytest.raises(RuntimeError) as refused:
            getattr(OPS, name)(*arguments)
        message = str(refused.value)
        assert message.startswith(f"{name}: ") and "\n" not in message and "csrc" not in message, message


# ---- autocast -----------------------------------------------------------------------------------------------


def _calls(device):
    """Name -> a call of x, weight, bias and another op's tensor."""
    conv, linear, labels = torch.randn(5, 6, 3, 3), torch.randn(10, 6), torch.arange(4)
    conv, linear, labels = (tensor.to(device) for tensor in (conv, linear, labels))
    return {
        "batch_norm_act": lambda *args: ops.batch_norm_act(*args),
        "batch_norm_act_max_pool": lambda *args: ops.batch_norm_act_max_pool(*args, kernel_size=3, stride=2, padding=1),
        "conv_batch_norm_act": lambda *args: ops.conv_batch_norm_act(*args, conv, padding=1),
        "pooled_cross_entropy": lambda x, *bn: ops.pooled_cross_entropy(x, linear, None, labels, bn=bn),
        "pooled_cross_entropy, features": lambda x, *_: ops.pooled_cross_entropy(x, linear, None, labels),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", _calls("cpu"))
def test_autocast_changes_nothing(name, backend, device):
    x, weight, bias, _, _ = make((4, 6, 8, 8), torch.float32, LAYOUTS[0], False, device=device)
    call, found = _calls(device)[name], []
    for enabled in (False, True):
        given = [t.detach().requires_grad_() for t in (x, weight, bias)]
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            results = torch.compile(call, backend=backend, fullgraph=True)(*given)
        gradients = torch.autograd.grad(results[0].sum(), given, allow_unused=True)
        found.append([t.detach() for t in (*results, *gradients) if t is not None])
    equal(*found)
