"""The pooled_cross_entropy op: value, gradient, error, labels, layouts, dtypes, what is kept, bad input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from ops_helpers import DEVICES, DISPATCHED, LAYOUTS, REGISTERED, error, make, rounding
from torch.library import opcheck

from auglocal_ext.ops import _fallbacks, batch_norm_statistics, pooled_cross_entropy, pooled_cross_entropy_reference
from auglocal_ext.ops._library import MISSING

SHAPES = [(5, 20, 7, 6), (3, 1, 2, 2), (4, 17, 1, 1), (2, 3, 30, 40), (9, 33, 3, 5), (66, 16, 1, 2)]
# residual, relu; None: no BatchNorm before the pool
KINDS = [None, *itertools.product([False, True], [False, True])]
NAMES = ["loss", "logits", "mean", "var", "head_mean", "head_var"]
OPS = torch.ops.auglocal_ext


def head(shape, dtype, layout, kind, *, head_bn=False, linear_bias=True, classes=7, device="cpu", seed=0):
    """Tensors by name, as `run` takes them, and labels."""
    x, weight, bias, residual, _ = make(shape, dtype, layout, bool(kind and kind[0]), device=device, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def affine(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device, weight.dtype)

    tensors = {"x": x, "linear_weight": affine(classes, shape[1])}
    if linear_bias:
        tensors["linear_bias"] = affine(classes)
    if kind is not None:
        tensors |= {"weight": weight, "bias": bias}
    if residual is not None:
        tensors["residual"] = residual
    if head_bn:
        tensors |= {"head_weight": affine(shape[1]) + 2, "head_bias": affine(shape[1])}
    labels = torch.randint(classes, shape[:1], generator=generator).to(device)
    return tensors, labels


def call(op, tensors, labels, kind, **options):
    t = tensors.get
    bn = None if kind is None else (t("weight"), t("bias"))
    head_bn = (t("head_weight"), t("head_bias"), 1e-5) if "head_weight" in tensors else None
    if kind is not None:
        options |= {"residual": t("residual"), "relu": kind[1]}
    return op(t("x"), t("linear_weight"), t("linear_bias"), labels, bn=bn, head_bn=head_bn, **options)


def run(op, tensors, labels, kind, **options):
    """What op returns and the gradients of 3 loss, by name."""
    tensors = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    result = call(op, tensors, labels, kind, **options)
    gradients = torch.autograd.grad(3 * result.loss, list(tensors.values()))
    values = {name: value.detach() for name, value in result._asdict().items() if value is not None}
    return values | {f"d{name}": gradient for name, gradient in zip(tensors, gradients, strict=True)}


def assert_equal_the_reference(tensors, labels, kind, **options):
    ours = run(pooled_cross_entropy, tensors, labels, kind, **options)
    reference = run(pooled_cross_entropy_reference, tensors, labels, kind, **options)
    assert ours.keys() == reference.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, reference[name], rtol=1e-10, atol=1e-10, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )
    return ours


@pytest.mark.covering(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_bn", [False, True])
def test_equals_the_reference_in_float64(shape, layout, kind, head_bn, device):
    tensors, labels = head(shape, torch.float64, layout, kind, head_bn=head_bn, device=device)
    assert_equal_the_reference(tensors, labels, kind)


@pytest.mark.covering(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 2, 1000])
@pytest.mark.parametrize("linear_bias", [False, True])
@pytest.mark.parametrize("classes", [1, 7, 1000])
def test_labels_and_losses(label_smoothing, ignore_index, linear_bias, classes, device):
    shape, kind = (12, 5, 3, 3), (True, True)
    arguments = {"linear_bias": linear_bias, "classes": classes, "device": device}
    tensors, labels = head(shape, torch.float64, LAYOUTS[0], kind, **arguments)
    labels[::3] = ignore_index
    assert_equal_the_reference(tensors, labels, kind, label_smoothing=label_smoothing, ignore_index=ignore_index)


def weights_of(classes, dtype=torch.float64, device="cpu"):
    """What each class counts, the last one nothing."""
    weights = torch.rand(classes, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    weights[1:][-1:] = 0
    return weights.to(device, dtype)


def soft(labels, classes, dtype=torch.float64):
    """Labels mixed with the next image's, as MixUp does."""
    shares = F.one_hot(labels, classes).to(dtype)
    return 0.7 * shares + 0.3 * shares.roll(1, 0)


@pytest.mark.covering(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("labels_are", ["numbers", "some ignored", "soft", "no shares"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("linear_bias", [False, True])
@pytest.mark.parametrize("classes", [1, 7, 1000])
def test_class_weights_and_soft_labels(label_smoothing, labels_are, weighted, linear_bias, classes, device):
    shape, kind = (12, 5, 3, 3), (True, True)
    arguments = {"linear_bias": linear_bias, "classes": classes, "device": device}
    tensors, labels = head(shape, torch.float64, LAYOUTS[0], kind, **arguments)
    options = {"label_smoothing": label_smoothing}
    if labels_are == "some ignored":
        labels[::3] = options["ignore_index"] = 0 if classes > 1 else 1
    elif labels_are == "soft":
        labels = soft(labels, classes)
    elif labels_are == "no shares":  # which sum up to something else than one, and may be negative
        labels = torch.randn(12, classes, generator=torch.Generator().manual_seed(5)).double().to(device)
    if weighted:
        options["class_weight"] = weights_of(classes, device=device)
    assert_equal_the_reference(tensors, labels, kind, **options)


def test_class_weights_are_torchs_weighted_mean():
    """Two rows of classes that count 1 and 3: the mean is a quarter of the one loss and three of the other."""
    tensors, _ = head((2, 3, 2, 2), torch.float64, LAYOUTS[0], None)
    labels, weights = torch.tensor([0, 1]), torch.tensor([1.0, 3, 5, 5, 5, 5, 5], dtype=torch.float64)
    result = call(pooled_cross_entropy, tensors, labels, None, class_weight=weights)
    losses = F.cross_entropy(result.logits, labels, reduction="none")
    torch.testing.assert_close(result.loss, losses[0] / 4 + losses[1] * 3 / 4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_labels_that_all_weigh_nothing_are_nan_with_gradients_of_zero(label_smoothing, device):
    tensors, labels = head((4, 3, 2, 2), torch.float64, LAYOUTS[0], (False, True), device=device)
    weights = weights_of(7, device=device)
    options = {"label_smoothing": label_smoothing, "class_weight": weights}
    ours = run(pooled_cross_entropy, tensors, torch.full_like(labels, 6), (False, True), **options)
    assert ours["loss"].isnan() and not any(ours[f"d{name}"].any() for name in tensors)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_masked_class_costs_nothing_where_no_target_has_a_share_in_it(label_smoothing):
    """Its logit is -inf: torch's loss is finite without smoothing, and infinite with it."""
    tensors, labels = head((4, 3, 2, 2), torch.float64, LAYOUTS[0], None)
    tensors["linear_bias"][3] = -torch.inf
    labels[labels == 3] = 2
    for given, options in ((labels, {}), (labels, {"class_weight": weights_of(7)}), (soft(labels, 7), {})):
        result = call(pooled_cross_entropy, tensors, given, None, label_smoothing=label_smoothing, **options)
        assert result.loss.isfinite() == (label_smoothing == 0) and not result.loss.isnan()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_all_ignored_is_nan_with_gradients_of_zero_as_in_torch(kind, label_smoothing, device):
    tensors, labels = head((4, 3, 2, 2), torch.float64, LAYOUTS[0], kind, device=device)
    for weighted in ({}, {"class_weight": weights_of(7, device=device)}):
        options = weighted | {"label_smoothing": label_smoothing}
        ours = assert_equal_the_reference(tensors, torch.full_like(labels, -100), kind, **options)
        assert ours["loss"].isnan() and not any(ours[f"d{name}"].any() for name in tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_bn", [False, True])
def test_no_samples(layout, kind, head_bn, device):
    tensors, labels = head((0, 3, 2, 2), torch.float64, layout, kind, head_bn=head_bn, device=device)
    ours = run(pooled_cross_entropy, tensors, labels, kind)
    assert ours["loss"].isnan() and ours["logits"].shape == (0, 7) and ours["dx"].shape == (0, 3, 2, 2)
    assert not any(ours[f"d{name}"].any() for name in tensors)


@pytest.mark.parametrize("device", DEVICES)
def test_one_sample(device):
    for kind in KINDS:
        tensors, labels = head((1, 3, 2, 2), torch.float64, LAYOUTS[0], kind, device=device)
        assert_equal_the_reference(tensors, labels, kind)


@pytest.mark.covering(2)
@pytest.mark.many_blocks
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(32, 64, 8, 8), (16, 130, 7, 7), (64, 16, 7, 7), (64, 20, 33, 16)])
@pytest.mark.parametrize("kind", KINDS)
def test_error_is_at_most_twice_torchs(shape, layout, dtype, kind, device):
    tensors, labels = head(shape, dtype, layout, kind, classes=10, device=device)
    ours = run(pooled_cross_entropy, tensors, labels, kind, label_smoothing=0.1)
    torchs = run(pooled_cross_entropy_reference, tensors, labels, kind, label_smoothing=0.1)
    exact = {name: t.double() for name, t in tensors.items()}
    exact = run(pooled_cross_entropy_reference, exact, labels, kind, label_smoothing=0.1)
    torchs = {name: error(torchs[name], value) for name, value in exact.items()}
    torchs["loss"] = max(torchs["loss"], torchs["logits"])  # one number can be right by luck: it comes from the logits
    for name, value in exact.items():
        assert error(ours[name], value) <= max(2 * torchs[name], rounding(ours[name].dtype)), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_large_means_are_survived(layout, kind, device):
    tensors, labels = head((32, 8, 8, 8), torch.float32, layout, kind, device=device)
    tensors["x"] += 1e3
    exact = run(pooled_cross_entropy_reference, {name: t.double() for name, t in tensors.items()}, labels, kind)
    ours = run(pooled_cross_entropy, tensors, labels, kind)
    assert all(error(ours[name], value) < 1e-3 for name, value in exact.items())


@pytest.mark.covering(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_bn", [False, True])
def test_gradcheck(layout, kind, head_bn):
    tensors, labels = head((5, 3, 3, 2), torch.float64, layout, kind, head_bn=head_bn)
    labels[2] = -100
    options = {"label_smoothing": 0.1}

    def loss(*values):
        return call(pooled_cross_entropy, dict(zip(tensors, values, strict=True)), labels, kind, **options)[0]

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in tensors.values()])
    options["class_weight"] = weights_of(7)
    assert torch.autograd.gradcheck(loss, list(tensors.values()))
    labels = soft(labels.clamp(0), 7)
    assert torch.autograd.gradcheck(loss, list(tensors.values()))


@pytest.mark.covering(1)
@pytest.mark.parametrize("device", DISPATCHED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "dtype"), REGISTERED)
@pytest.mark.parametrize(("residual", "relu"), KINDS[1:])
def test_opcheck_of_the_pool(shape, layout, dtype, residual, relu, device):
    x, weight, bias, added, _ = make(shape, dtype, layout, residual, device=device)
    differentiable = [t if t is None else t.clone().requires_grad_() for t in (x, weight, bias, added)]
    opcheck(OPS.batch_norm_act_mean.default, (*differentiable, 1e-5, relu))
    mean, var = batch_norm_statistics(x)
    opcheck(OPS.batch_norm_act_mean_apply.default, (x, weight, bias, mean, var, added, 1e-5, relu))
    grad, mask = torch.ones(shape[:2], device=device), added if relu else None
    backward = (grad, x, weight, bias, mean, var, mask, 1e-5, relu)
    for residual_grad in {False, mask is not None}:
        opcheck(OPS.batch_norm_act_mean_backward.default, (*backward, residual_grad))
        into = torch.empty_like(x), torch.empty_like(x) if residual_grad else None
        opcheck(OPS.batch_norm_act_mean_backward_out.default, (*backward, *into))


@pytest.mark.covering(1)
@pytest.mark.parametrize("device", DISPATCHED)
@pytest.mark.parametrize(("n", "c", "k"), [(4, 3, 5), (1, 1, 1), (70, 40, 33)])
@pytest.mark.parametrize("linear_bias", [False, True])
def test_opcheck_of_the_loss(n, c, k, linear_bias, device):
    generator = torch.Generator().manual_seed(0)
    shapes = [(n, c), (k, c)] + [(k,)] * linear_bias
    tensors = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    tensors = [t.requires_grad_() for t in tensors] + [None] * (not linear_bias)
    labels = torch.randint(k, (n,), generator=generator).to(device)
    opcheck(OPS.linear_cross_entropy.default, (*tensors, labels, 0.1, -100))
    weights, shares = (value.to(device, torch.float32) for value in (weights_of(k), soft(labels, k)))
    opcheck(OPS.linear_cross_entropy.default, (*tensors, labels, 0.1, -100, weights))
    opcheck(OPS.linear_cross_entropy.default, (*tensors, shares, 0.1, -100, weights))
    loss, _, *gradients = (t.detach() for t in OPS.linear_cross_entropy(*tensors, labels, 0.1, -100))
    opcheck(OPS.linear_cross_entropy_backward.default, (loss, loss, *gradients))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_give_the_same_bits(layout, kind, device):
    tensors, labels = head((70, 33, 9, 7), torch.float32, layout, kind, head_bn=True, device=device)
    one, two = (run(pooled_cross_entropy, tensors, labels, kind) for _ in "12")
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("residual", "relu"), KINDS[1:])
def test_the_number_of_threads_changes_no_bit_of_the_pool(layout, residual, relu):
    x, weight, bias, added, _ = make((70, 33, 9, 7), torch.float32, layout, residual)
    grad = torch.randn(70, 33, generator=torch.Generator().manual_seed(2))
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            pooled, mean, var = OPS.batch_norm_act_mean(x, weight, bias, added, 1e-5, relu)
            backward = (grad, x, weight, bias, mean, var, added if relu else None, 1e-5, relu, residual and relu)
            results.append((pooled, *OPS.batch_norm_act_mean_backward(*backward)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", [False, True])
def test_strided_inputs(residual, device):
    kind = (residual, True)
    tensors, labels = head((6, 8, 9, 7), torch.float32, LAYOUTS[0], kind, device=device)
    maps = [name for name in ("x", "residual") if name in tensors]
    strided = tensors | {name: tensors[name][:, :, 1:, ::2] for name in maps}
    dense = tensors | {name: strided[name].contiguous() for name in maps}
    ours, expected = (run(pooled_cross_entropy, t, labels, kind) for t in (strided, dense))
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())
    if residual:
        mixed = tensors | {"residual": tensors["residual"].contiguous(memory_format=torch.channels_last)}
        ours, expected = (run(pooled_cross_entropy, t, labels, kind) for t in (mixed, tensors))
        assert all(torch.equal(value, expected[name]) for name, value in ours.items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_for_the_backward(layout, kind):
    """x where a BatchNorm needs it, the residual where the ReLU's mask does, and no other feature map."""
    tensors, labels = head((4, 8, 6, 6), torch.float32, layout, kind)
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(pooled_cross_entropy, tensors, labels, kind)
    maps = {t.untyped_storage().data_ptr() for t in kept if t.numel() >= tensors["x"].numel()}
    expected = [] if kind is None else ["x"] + ["residual"] * (kind == (True, True))
    assert maps == {tensors[name].untyped_storage().data_ptr() for name in expected}


@pytest.mark.parametrize("kind", [None, (True, False)])
def test_a_gradient_without_a_mask_takes_no_memory(kind):
    tensors, labels = head((4, 8, 6, 6), torch.float32, LAYOUTS[0], kind)
    gradients = run(pooled_cross_entropy, tensors, labels, kind)
    assert gradients["dx" if kind is None else "dresidual"].untyped_storage().nbytes() == 4 * 8 * 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(4, 9, 8, 8), (70, 8, 7, 7)])
def test_in_place_over_the_kept_tensors(shape, layout, residual, device):
    x, weight, bias, added, _ = make(shape, torch.float32, layout, residual, device=device)
    mean, var = batch_norm_statistics(x)
    grad = torch.randn(shape[:2], generator=torch.Generator().manual_seed(2)).to(device)
    arguments = (grad, x, weight, bias, mean, var, added, 1e-5, True)
    dx, dresidual, *expected = OPS.batch_norm_act_mean_backward(*arguments, residual)
    ours = OPS.batch_norm_act_mean_backward_out(*arguments, x, added)
    assert torch.equal(x, dx) and (not residual or torch.equal(added, dresidual))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 20, 7, 6), (3, 24, 7, 7), (5, 6, 3, 1)])
@pytest.mark.parametrize(("residual", "relu"), KINDS[1:])
def test_plain_torch_fallback_agrees_with_the_kernels(shape, layout, dtype, residual, relu, device):
    if MISSING[device]:
        pytest.skip(f"no compiled kernels to compare with: {MISSING[device]}")
    x, weight, bias, added, _ = make(shape, dtype, layout, residual, device=device)
    mean, var = batch_norm_statistics(x)
    apply = (x, weight, bias, mean, var, added, 1e-5, relu)
    grad = torch.randn(shape[:2], generator=torch.Generator().manual_seed(2)).to(device)
    backward = (grad, x, weight, bias, mean, var, added if relu else None, 1e-5, relu)
    results = []
    for ops in (_fallbacks, OPS):
        dx, dresidual = torch.empty_like(x), torch.empty_like(x) if residual and relu else None
        sums = ops.batch_norm_act_mean_backward_out(*backward, dx, dresidual)
        results.append([ops.batch_norm_act_mean_apply(*apply), *sums, dx] + [dresidual] * (residual and relu))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and a.shape == b.shape
        assert error(a, b.double()) <= max(1e-5, 1.3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_nan_passes_as_in_torch(layout, kind, device):
    tensors, labels = head((4, 3, 2, 2), torch.float32, layout, kind, device=device)
    tensors["x"][1, 2, 0, 0] = torch.nan
    ours, reference = (run(op, tensors, labels, kind) for op in (pooled_cross_entropy, pooled_cross_entropy_reference))
    assert all(torch.equal(value.isnan(), reference[name].isnan()) for name, value in ours.items())


@pytest.mark.parametrize("backend", ["aot_eager"])
@pytest.mark.parametrize("kind", [None, (True, True)])
def test_compiles_in_one_graph(kind, backend):
    tensors, labels = head((4, 3, 2, 2), torch.float32, LAYOUTS[0], kind, head_bn=True)
    compiled = torch.compile(pooled_cross_entropy, backend=backend, fullgraph=True)
    ours, eager = (run(op, tensors, labels, kind) for op in (compiled, pooled_cross_entropy))
    for name, value in ours.items():
        torch.testing.assert_close(value, eager[name])


def test_only_the_loss_is_differentiable_and_only_once():
    for kind in (None, (False, True)):
        tensors, labels = head((4, 3, 2, 2), torch.float64, LAYOUTS[0], kind)
        result = call(pooled_cross_entropy, {name: t.requires_grad_() for name, t in tensors.items()}, labels, kind)
        assert [name for name in NAMES if getattr(getattr(result, name), "requires_grad", False)] == ["loss"]
        (dweight,) = torch.autograd.grad(result.loss, tensors["linear_weight"], create_graph=True)
        with pytest.raises(RuntimeError, match="linear_cross_entropy_backward is not differentiable"):
            dweight.sum().backward()


def test_the_loss_of_labels_out_of_range_is_nan_where_the_host_must_not_wait():
    """What CUDA does, by the plain-torch form of it: a NaN loss, and the gradients of the other rows."""
    generator = torch.Generator().manual_seed(0)
    pooled, weight = torch.randn(6, 4, generator=generator), torch.randn(3, 4, generator=generator)
    labels = torch.tensor([0, 3, 2, -1, 1, -100])
    loss, *rest = _fallbacks.linear_cross_entropy(pooled, weight, None, labels, 0.1, -100)
    ignored = torch.where((labels < 0) | (labels > 2), -100, labels)
    expected_loss, *expected = _fallbacks.linear_cross_entropy(pooled, weight, None, ignored, 0.1, -100)
    assert loss.isnan() and not expected_loss.isnan()
    assert all(torch.equal(a, b) for a, b in zip(rest, expected, strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_labels_out_of_range_leave_the_cuda_context_alive():
    tensors, labels = head((6, 3, 2, 2), torch.float32, LAYOUTS[0], (False, True), device="cuda")
    labels[2] = 7
    ours = run(pooled_cross_entropy, tensors, labels, (False, True))
    labels[2] = -100
    expected = run(pooled_cross_entropy, tensors, labels, (False, True))
    assert ours.pop("loss").isnan() and not expected.pop("loss").isnan()
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


BAD = [
    ({"x": torch.ones(4, 3, 2)}, ValueError, r"x must be \(N, C, H, W\), given shape \(4, 3, 2\)"),
    ({"x": torch.ones(4, 3, 2, 2).int()}, TypeError, "x must be float32, bfloat16, float16 or float64, given torch"),
    ({"x": torch.ones(4, 3, 0, 2)}, ValueError, r"x must have values to average over, given shape \(4, 3, 0, 2\)"),
    ({"linear_weight": torch.ones(5, 4)}, ValueError, r"linear_weight must be \(K, 3\), given shape \(5, 4\)"),
    ({"linear_weight": torch.ones(0, 3)}, ValueError, r"linear_weight must be \(K, 3\), given shape \(0, 3\)"),
    (
        {"linear_weight": torch.ones(5, 3).double()},
        TypeError,
        "linear_weight must be torch.float32 for torch.float32 x, given torch.float64",
    ),
    ({"linear_bias": torch.ones(4)}, ValueError, r"linear_bias must be \(5,\), given shape \(4,\)"),
    ({"linear_bias": torch.ones(5, device="meta")}, ValueError, "linear_bias must be on cpu like x, given meta"),
    ({"labels": torch.zeros(3).long()}, ValueError, r"labels must be \(4,\), given shape \(3,\)"),
    ({"labels": torch.zeros(4).int()}, TypeError, "labels must be torch.int64 for torch.float32 x, given torch.int32"),
    ({"labels": torch.tensor([0, 4, 5, 1])}, ValueError, "labels must be 0 to 4 or ignore_index -100, given 5"),
    ({"labels": torch.tensor([0, 4, -1, 1])}, ValueError, "labels must be 0 to 4 or ignore_index -100, given -1"),
    ({"labels": torch.zeros(4)}, ValueError, r"labels must be \(4, 5\), given shape \(4,\)"),
    ({"labels": torch.zeros(4, 4)}, ValueError, r"labels must be \(4, 5\), given shape \(4, 4\)"),
    (
        {"labels": torch.zeros(4, 5).double()},
        TypeError,
        "labels must be torch.float32 for torch.float32 x, given torch",
    ),
    ({"class_weight": torch.ones(4)}, ValueError, r"class_weight must be \(5,\), given shape \(4,\)"),
    ({"class_weight": torch.ones(5).double()}, TypeError, "class_weight must be torch.float32 for torch.float32 x"),
    ({"class_weight": torch.ones(5, device="meta")}, ValueError, "class_weight must be on cpu like x, given meta"),
    ({"bn": (torch.ones(2), torch.ones(3))}, ValueError, r"the weight of bn must be \(3,\), given shape \(2,\)"),
    ({"eps": -1.0}, ValueError, "eps must be at least 0, given -1.0"),
    ({"residual": torch.ones(4, 3, 2, 2), "bn": None}, ValueError, "residual must be None where bn is None"),
    ({"residual": torch.ones(4, 3, 2, 1)}, ValueError, r"residual must be like x, \(4, 3, 2, 2\) torch.float32, given"),
    ({"x": torch.ones(1, 3, 1, 1), "labels": torch.zeros(1).long()}, ValueError, "more than one value per channel"),
    (
        {"head_bn": (torch.ones(3), torch.ones(3).double(), 1e-5)},
        TypeError,
        "the bias of head_bn must be torch.float32 for torch.float32 x",
    ),
    ({"head_bn": (torch.ones(3), torch.ones(3), -1)}, ValueError, "the eps of head_bn must be at least 0, given -1"),
    ({"head_bn": (torch.ones(3), torch.ones(3), float("nan"))}, ValueError, "the eps of head_bn must be at least 0"),
    (
        {"x": torch.ones(1, 3, 2, 2), "labels": torch.zeros(1).long(), "head_bn": (torch.ones(3), torch.ones(3), 0.1)},
        ValueError,
        "head_bn needs more than one sample",
    ),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be from 0 to 1, given 1.5"),
]


@pytest.mark.parametrize(("spoiled", "kind", "message"), BAD)
def test_bad_input_is_named(spoiled, kind, message):
    arguments = {
        "x": torch.ones(4, 3, 2, 2),
        "linear_weight": torch.ones(5, 3),
        "linear_bias": torch.ones(5),
        "labels": torch.zeros(4).long(),
        "bn": (torch.ones(3), torch.ones(3)),
    }
    with pytest.raises(kind, match=f"^pooled_cross_entropy: .*{message}"):
        pooled_cross_entropy(**(arguments | spoiled))


def test_the_kernels_themselves_refuse_what_would_read_out_of_bounds():
    if MISSING["cpu"]:
        pytest.skip(f"no compiled kernels: {MISSING['cpu']}")
    x, weight, bias, _, _ = make((4, 3, 2, 2), torch.float32, LAYOUTS[0], False)
    grad, backward = torch.ones(4, 3), OPS.batch_norm_act_mean_backward_out
    with pytest.raises(RuntimeError, match="residual must have the shape"):
        OPS.batch_norm_act_mean_apply(x, weight, bias, bias, bias, x[:2], 1e-5, True)
    with pytest.raises(RuntimeError, match=r"grad must be a contiguous \(4, 3\)"):
        backward(grad[:2], x, weight, bias, bias, bias, None, 1e-5, True, x, None)
    with pytest.raises(RuntimeError, match="dresidual needs residual"):
        backward(grad, x, weight, bias, bias, bias, None, 1e-5, True, x, x.clone())
    with pytest.raises(RuntimeError, match="residual is for the ReLU's mask"):
        backward(grad, x, weight, bias, bias, bias, x, 1e-5, False, x, None)


def test_the_reference_is_torchs_head():
    tensors, labels = head((4, 3, 2, 2), torch.float64, LAYOUTS[0], None)
    logits = F.linear(
        F.adaptive_avg_pool2d(tensors["x"], 1).flatten(1), tensors["linear_weight"], tensors["linear_bias"]
    )
    loss = pooled_cross_entropy_reference(*tensors.values(), labels).loss
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
