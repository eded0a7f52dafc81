"""Plans are those of real steps: in both memory formats, in bfloat16, with every optimizer, arithmetic included."""

import copy
from functools import partial

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.flop_counter import FlopCounterMode

from auglocal_ext import LocalTrainer, models, plan
from auglocal_ext.common.memory import LiveBytes
from auglocal_ext.common.meta import meta_copy
from auglocal_ext.engine.as_real import RealLayouts
from auglocal_ext.engine.nodes import Island
from auglocal_ext.engine.nodes.island import _backward, _run

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def small_vgg(torchvision, batch_norm=False):
    classifier = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10))
    layers = [8, "M", 16, 16, "M", 24]
    return nets.vgg(torchvision, layers, batch_norm, avgpool=nn.AdaptiveAvgPool2d(1), classifier=classifier)


def bottlenecks(torchvision):
    return nets.resnet(torchvision, "Bottleneck", width=16)


def assert_exact(model, shape, layout=torch.contiguous_format, **options):
    trainer = LocalTrainer(model, image_size=shape[2:], **options)
    images = torch.rand(shape).sub_(0.5).contiguous(memory_format=layout)
    labels = torch.arange(shape[0]) % 10
    trainer.step(images, labels)
    with LiveBytes([*trainer.tensors(), images, labels]) as live:
        trainer.step(images, labels)
    assert live.peak == trainer.plan.peak_bytes


@pytest.mark.covering(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", ["auglocal", "dgl", "predsim", "infopro", "bp", "checkpoint"])
def test_plans_of_every_rule(rule, precision, layout):
    assert_exact(models.CifarResNet(2), (6, 3, 16, 16), layout, rule=rule, precision=precision)


@pytest.mark.parametrize(
    ("kind", "precision", "layout", "model_layout"),
    [
        ("vgg", "fp32", *LAYOUTS[::-1]),
        ("vgg", "bf16", *LAYOUTS),
        ("vgg_bn", "fp32", *LAYOUTS[::-1]),
        ("vgg_bn", "bf16", *LAYOUTS[::-1]),
        ("bottlenecks", "fp32", *LAYOUTS),
        ("bottlenecks", "fp32", *LAYOUTS[::-1]),
        ("bottlenecks", "bf16", LAYOUTS[1], LAYOUTS[1]),
    ],
)
def test_plans_of_every_family(torchvision, kind, precision, layout, model_layout):
    if kind == "bottlenecks":
        model, options = bottlenecks(torchvision), {"rule": "bp"}
    else:
        model, options = small_vgg(torchvision, kind == "vgg_bn"), {"depth": 2, "modules": 2}
    assert_exact(model.to(memory_format=model_layout), (4, 3, 33, 33), layout, precision=precision, **options)


def test_a_plan_for_contiguous_images_is_made_anew_for_others():
    trainer = LocalTrainer(models.CifarResNet(1), rule="bp")
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6)
    trainer.step(images, labels)
    contiguous = trainer.plan.peak_bytes
    trainer.step(images.contiguous(memory_format=torch.channels_last), labels)
    assert trainer.plan.peak_bytes > contiguous


# ---- islands -------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(8, 8)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        query = self.query(x)
        attended = F.scaled_dot_product_attention(query, query, x)
        return attended.transpose(1, 2).reshape(len(x), 8, 6, 6)


class Heads(nn.Module):
    """Multi-head attention, which takes torch's fused kernel."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        y = x.flatten(2).transpose(1, 2)
        return self.attention(y, y, y, need_weights=False)[0].transpose(1, 2).reshape(x.shape)


class Products(nn.Module):
    def forward(self, x):
        x = x.flatten(2)
        return ((x @ x.transpose(1, 2)).softmax(-1) @ x).reshape(len(x), 8, 6, 6)


MAPS = {
    "conv": nn.Conv2d(8, 4, 3, padding="same"),
    "conv of maps in groups": nn.Conv2d(8, 8, 3, padding="same", groups=8),
    "conv, reflected": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "conv transposed": nn.ConvTranspose2d(8, 4, 2, 2),
    "weight norm": nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
    "batch norm": nn.BatchNorm2d(8),
    "batch norm, eval": nn.BatchNorm2d(8).eval(),
    "batch norm, not affine": nn.BatchNorm2d(8, affine=False),
    "batch norm, no statistics": nn.BatchNorm2d(8, track_running_stats=False),
    "instance norm": nn.InstanceNorm2d(8, affine=True),
    "layer norm": nn.LayerNorm(6),
    "group norm": nn.GroupNorm(2, 8),
    "group norm, not affine": nn.GroupNorm(2, 8, affine=False),
    "GELU": nn.GELU(),
    "SiLU": nn.SiLU(),
    "Hardswish": nn.Hardswish(),
    "PReLU": nn.PReLU(),
    "ReLU6": nn.ReLU6(),
    "dropout": nn.Dropout2d(0.5),
    "average pool": nn.AvgPool2d(2),
    "adaptive pool": nn.AdaptiveMaxPool2d(2),
    "dilated pool": nn.MaxPool2d(2, dilation=2),
    "upsample": nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    "shuffle": nn.ChannelShuffle(2),
    "pixel shuffle": nn.PixelShuffle(2),
    "flatten": nn.Flatten(1),
    "attention": Attention(),
    "attention of heads": Heads(),
    "products": Products(),
}
ROWS = {
    "linear": nn.Linear(8, 5),
    "mlp": nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8)),
    "GLU": nn.GLU(1),
    "batch norm of rows": nn.BatchNorm1d(8),
    "softmax": nn.Softmax(1),
}


def traces(module, x, autocast):
    """What an island's forward and backward hold, at their peaks and after them; how its result lies."""
    node = Island("out", "part", ("x",), module, "it", tuple(module.parameters()))
    with torch.no_grad(), LiveBytes([x, *module.parameters(), *module.buffers()]) as live, RealLayouts():
        base = live.now
        y, graph = _run(node, autocast, "cpu", [True], x)
        found = [live.now - base, live.peak - base, y.dtype, y.stride()]
        gradient = torch.zeros_like(y)
        live.peak = live.now
        made = _backward(graph, gradient, x)
        found.append(live.peak - base)
        del graph
        found.append(live.now - base)
        del made
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", [*MAPS, *ROWS])
def test_islands_hold_the_same_without_data(name, autocast, layout):
    shape = (4, 8, 6, 6) if name in MAPS else (4, 8)
    if name in ROWS and layout == torch.channels_last:
        pytest.skip("rows have one memory format")
    if name.startswith("group norm") and layout == torch.channels_last:
        pytest.skip("a plan of it in this format is too high: the meta device makes contiguous copies")
    x = torch.randn(shape, dtype=autocast or torch.float32)
    x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
    module = copy.deepcopy((MAPS | ROWS)[name])
    expected = traces(module, x, autocast)
    assert traces(meta_copy(module), torch.empty_like(x, device="meta"), autocast) == expected


# ---- arithmetic ----------------------------------------------------------------------------------------------


def with_islands():
    model = models.CifarResNet(1)
    model.layer1[0].conv2 = nn.Sequential(nn.Conv2d(16, 4, 1), nn.SiLU(), nn.Conv2d(4, 16, 3, padding="same"))
    model.layer2[0].downsample = nn.Sequential(nn.Conv2d(16, 32, 1, 2, padding_mode="reflect"))
    model.fc = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))
    return model


def with_a_stem_island():
    model = models.CifarResNet(1)
    model.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.GELU(), nn.Conv2d(8, 16, 3, padding="same"))
    return model


def with_attention():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Linear(32, 32)

        def forward(self, x):
            small = F.avg_pool2d(x, 2)
            rows = small.flatten(2).transpose(1, 2)
            wide = self.query(torch.cat([rows, rows], 2))
            mixed = (wide @ wide.transpose(1, 2)).softmax(-1).bmm(wide).transpose(1, 2)
            return mixed.reshape(len(x), 32, *small.shape[2:])

    model = models.CifarResNet(1)
    model.layer2[0].downsample = Mixed()
    return model


@pytest.mark.usefixtures("nothing_compared")
@pytest.mark.parametrize(
    "make", [lambda: models.CifarResNet(2), with_islands, with_a_stem_island, with_attention, None],
    ids=["plain", "islands", "stem", "attention", "vgg"],
)  # fmt: skip
def test_arithmetic_is_what_torch_counts(make, torchvision):
    model = small_vgg(torchvision) if make is None else make()
    with FlopCounterMode(display=False) as counted:
        F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    planned = plan(model, (4, 3, 16, 16), rule="bp")
    assert planned.macs == planned.bp_macs == counted.get_total_flops() // 2
    assert plan(model, (4, 3, 16, 16), rule="dgl", modules=2).bp_macs == planned.macs


@pytest.mark.parametrize("rule", ["dgl", "infopro", "predsim", "auglocal"])
def test_arithmetic_of_aux_nets_is_what_torch_counts(rule):
    """Of their blocks too, where these are of another class than the backbone's."""
    model = models.CifarResNet(1)
    trainer = LocalTrainer(model, rule=rule, depth=2, modules=2, image_size=16)
    images, labels = torch.rand(4, 3, 16, 16) - 0.5, torch.arange(4)
    first, last = trainer.local_modules
    with FlopCounterMode(display=False) as counted:
        features, logits = first(images)
        (extra_weight, weight), extra = first.head.weights, first.head.extra
        loss = weight * F.cross_entropy(logits, labels)
        (loss + (extra_weight * extra(features, labels, images) if extra is not None else 0)).backward()
    trainer.step(images, labels)
    assert trainer.plan.modules[0].macs == counted.get_total_flops() // 2


# ---- optimizers ----------------------------------------------------------------------------------------------


class Halting(optim.SGD):
    """Looks at a norm before it steps."""

    def step(self, closure=None):
        if all(p.grad.norm() < 1e6 for group in self.param_groups for p in group["params"] if p.grad is not None):
            super().step(closure)


@pytest.mark.parametrize(
    "factory",
    [
        optim.Adafactor,
        optim.ASGD,
        optim.Rprop,
        optim.NAdam,
        partial(optim.Adam, fused=True),
        partial(optim.AdamW, fused=True, amsgrad=True),
        partial(optim.SGD, lr=0.1, fused=True),
        partial(optim.SGD, lr=0.1, momentum=0.9, fused=True),
        partial(optim.Adagrad, fused=True),
        partial(optim.AdamW, foreach=True),
        partial(Halting, lr=0.1, momentum=0.9),
    ],
    ids=str,
)
def test_plans_with_every_optimizer(factory):
    assert_exact(models.CifarResNet(1), (4, 3, 16, 16), depth=2, optimizer=factory)


def test_a_budget_with_an_optimizer_that_needs_values():
    model, factory = models.CifarResNet(1), partial(optim.Adam, fused=True)
    planned = plan(model, (16, 3, 16, 16), depth=2, memory_budget="20MB", optimizer=factory)
    assert planned.peak_bytes == planned.choice.point.bytes


def elementwise_cases():
    x, other = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    last = other.contiguous(memory_format=torch.channels_last)
    for first in (x, last, x.bfloat16(), x.double(), x[:, :, :, ::2], x[:, :1].expand(2, 3, 4, 5)):
        for second in (other, last, other.double(), other[:, :, :1, :1], other[0, 0, 0, 0], torch.arange(5), 2, 0.5):
            yield first, second
    yield torch.arange(6), 1
    yield torch.arange(6), 0.5


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_quick_answers_are_those_of_real_tensors(name):
    compared = 0
    for first, second in elementwise_cases():
        for function in (getattr(torch.Tensor, name), getattr(torch.Tensor, f"{name}_")):
            real = first.clone(memory_format=torch.preserve_format) if function.__name__.endswith("_") else first
            try:
                expected = function(real, second)
            except RuntimeError:  # nothing that a step would do
                continue
            given = [x.to("meta") if isinstance(x, torch.Tensor) and x.dim() else x for x in (real, second)]
            if first is not real:  # which to() would make dense
                given[0] = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="meta")
            with RealLayouts():
                found = function(*given)
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            assert (found is given[0]) == (expected is real)
            if real.is_contiguous() or real.is_contiguous(memory_format=torch.channels_last):
                assert found.stride() == expected.stride()
            compared += 1
    assert compared > 50


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_quick_answers_of_batch_norms(layout, dtype, training):
    aten, x = torch.ops.aten, torch.rand(4, 3, 5, 5).to(dtype).contiguous(memory_format=layout)
    affine_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    affine = [torch.rand(3, dtype=affine_dtype) for _ in range(4)]

    def run(x, affine):
        out, mean, invstd = aten.native_batch_norm(x, *affine, training, 0.1, 1e-5)
        weight, _, *running = affine
        mask = [True, True, False]
        given = (out, x, weight, *running, mean, invstd, training, 1e-5, mask)
        return [
            (t.shape, t.dtype, t.stride()) for t in (out, mean, invstd, *aten.native_batch_norm_backward(*given)[:2])
        ]

    with RealLayouts():
        found = run(torch.empty_like(x, device="meta"), [a.to("meta") for a in affine])
    assert found == run(x, affine)
