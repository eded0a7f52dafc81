"""Predicted memory against measured, to the byte: over every backbone, several depths, cuts and batch sizes."""

import copy
import gc
import random

import nets
import pytest
import torch
from torch import nn

from auglocal_ext import LocalTrainer, models, plan
from auglocal_ext.backbone import as_backbone
from auglocal_ext.common.memory import LiveBytes


def measured_peak(trainer, images, labels):
    """The highest live bytes of a step in its steady state, by a tracker that knows nothing of programs."""
    trainer.step(images, labels)  # plans, and makes the optimizer's state
    gc.collect()
    with LiveBytes([*trainer.tensors(), images, labels]) as live:
        trainer.step(images, labels)
    return live.peak


def batch(n, size, classes=10, dtype=torch.float32):
    return torch.randn(n, 3, size, size, dtype=dtype), torch.arange(n) % classes


CIFAR = [
    ("resnet20", 4, {}),
    ("resnet20", 2, {"modules": 3}),
    ("resnet32", 4, {}),
    ("resnet32", 6, {"modules": 5}),
    ("resnet44", 3, {"form": "imagenet", "modules": 9}),
    ("resnet56", 4, {"rule": "bp"}),
    ("resnet110", 5, {"borders": (7, 19, 20, 40)}),
]
IMAGENET = [
    ("resnet18", 4, {}),
    ("resnet18", 3, {"form": "cifar"}),
    ("resnet34", 5, {"modules": 4}),
    ("resnet50", 2, {"modules": 2}),
    ("resnet50", 4, {"borders": (0, 1, 9)}),
    ("resnet101", 5, {"rule": "bp"}),
    ("resnext50_32x4d", 3, {"modules": 6}),
    ("wide_resnet50_2", 2, {"modules": 3}),
]


@pytest.mark.covering(1)
@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize(("name", "depth", "cutting"), CIFAR)
def test_the_prediction_is_what_is_measured_cifar(name, depth, cutting, n):
    trainer = LocalTrainer(models.create(name, 10), depth, **cutting)
    peak = measured_peak(trainer, *batch(n, 32))
    assert trainer.plan.peak_bytes == peak


@pytest.mark.parametrize(("name", "depth", "cutting"), IMAGENET)
def test_the_prediction_is_what_is_measured_imagenet(torchvision, name, depth, cutting):
    """With as many blocks of each kind, but narrow."""
    trainer = LocalTrainer(nets.narrow(torchvision, name), depth, **cutting)
    peak = measured_peak(trainer, *batch(4, 64))
    assert trainer.plan.peak_bytes == peak


def test_a_whole_resnet50(torchvision):
    trainer = LocalTrainer(torchvision.models.resnet50(num_classes=10), 2, modules=2)
    assert measured_peak(trainer, *batch(4, 64)) == trainer.plan.peak_bytes


@pytest.mark.usefixtures("nothing_compared")
def test_a_resnet152_is_measured_on_meta_tensors(torchvision):
    """The tracker sees the same on tensors without data, so that the largest network can be measured anywhere."""
    with torch.device("meta"):
        model = torchvision.models.resnet152()
        images, labels = torch.empty(256, 3, 224, 224), torch.empty(256, dtype=torch.int64)
    trainer = LocalTrainer(model, 5, modules=4)
    planned = plan(model, tuple(images.shape), 5, modules=4)
    programs = trainer._current_programs()
    state, losses = [*trainer.tensors()], 4 * len(programs) + trainer.module_hits.nbytes
    inputs, peaks = [images], []
    for program in programs:
        with LiveBytes([*state, images, labels, inputs[0]]) as live:
            features, _, _ = program.run(inputs, labels)
        peaks.append(live.peak + losses + (planned.state_bytes - sum(t.nbytes for t in state)))
        inputs.append(features)
        for parameter in [p for p in model.parameters()] + [*trainer.aux_nets.parameters()]:
            parameter.grad = None
    # What fills memory under the peak is chosen by the trainer's plan only; the peak itself is the same.
    assert max(peaks) == planned.peak_bytes


@pytest.mark.parametrize(("precision", "dtype"), [
    ("bf16", torch.float32), ("fp16", torch.float32), ("fp32", torch.float64)
])  # fmt: skip
def test_other_precisions(precision, dtype):
    trainer = LocalTrainer(models.resnet20().to(dtype), 3, modules=4, precision=precision)
    assert measured_peak(trainer, *batch(4, 32, dtype=dtype)) == trainer.plan.peak_bytes


@pytest.mark.parametrize("cutting", [{"rule": "bp"}, {"modules": 3}])
def test_recomputed_convolutions(cutting):
    """Checkpointing inside every module: the same gradients to the bit, less memory, a third more arithmetic."""
    torch.manual_seed(0)
    model, given = models.resnet20(), batch(8, 32)
    twin = copy.deepcopy(model)
    plain, again = (LocalTrainer(m, 3, recompute=r, **cutting) for m, r in ((model, False), (twin, True)))
    again.aux_nets.load_state_dict(plain.aux_nets.state_dict())
    assert measured_peak(plain, *given) == plain.plan.peak_bytes
    assert measured_peak(again, *given) == again.plan.peak_bytes < plain.plan.peak_bytes
    for ours, theirs in zip(twin.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert 1.1 < again.plan.macs / plain.plan.macs < 1.36


def test_a_search_with_recomputed_convolutions():
    planned = plan(models.CifarResNet(2), (8, 3, 32, 32), 3, memory_budget="1GB", recompute=True)
    assert planned.peak_bytes == planned.choice.point.bytes
    assert planned.macs <= planned.choice.point.cost  # what fits under the peak is kept, not run again


@pytest.mark.parametrize("case", range(6))
def test_units_that_are_recomputed_one_by_one(case):
    """Any units' convolutions may run again: the same bits, the bytes that are planned."""
    torch.manual_seed(case)
    model, given, draw = models.create("resnet20", 10), batch(4, 16), random.Random(case)
    names = [unit.name for unit in as_backbone(model).units]
    again = {name for name in names if draw.random() < 0.5}
    twin, modules = copy.deepcopy(model), draw.choice([1, 2, 3])
    options = {"modules": modules, "auxiliary": draw.choice(["paper", "light"])}
    plain, mixed = LocalTrainer(model, 3, **options), LocalTrainer(twin, 3, recompute=again, **options)
    mixed.aux_nets.load_state_dict(plain.aux_nets.state_dict())
    plain.step(*given)
    assert measured_peak(mixed, *given) == mixed.plan.peak_bytes
    plain.step(*given)
    for ours, theirs in zip(twin.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    if case == 0:  # a module's, as it is planned
        assert {unit for module in mixed.plan.modules for unit in module.recomputed} == again


def narrow_vgg(torchvision, batch_norm):
    layers = [8, "M", 16, 16, "M", 32, 32, "M"]
    return nets.vgg(torchvision, layers, batch_norm, avgpool=nn.AdaptiveAvgPool2d(1), classifier=nn.Linear(32, 10))


@pytest.mark.covering(1)
@pytest.mark.parametrize("cutting", [{}, {"modules": 2}, {"rule": "bp"}])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_vggs(torchvision, batch_norm, cutting):
    """With the peak in the aux nets' linear islands: what their graphs hold is counted too."""
    trainer = LocalTrainer(narrow_vgg(torchvision, batch_norm), 4, **cutting)
    assert measured_peak(trainer, *batch(8, 41)) == trainer.plan.peak_bytes


def test_vgg13s_are_predicted_whole(torchvision):
    trainer = LocalTrainer(torchvision.models.vgg13_bn(num_classes=10, init_weights=False), 4, modules=3)
    assert measured_peak(trainer, *batch(2, 64)) == trainer.plan.peak_bytes


@pytest.mark.parametrize(("batch_norm", "cheaper"), [(True, True), (False, False)])
def test_recomputed_convolutions_of_a_vgg(torchvision, batch_norm, cheaper):
    """Units' outputs are kept, of a VGG each read once; without BatchNorm they are all that is kept anyway."""
    model = narrow_vgg(torchvision, batch_norm)
    twin, given = copy.deepcopy(model), batch(8, 32)
    plain, again = (LocalTrainer(m, rule="bp", recompute=r) for m, r in ((model, False), (twin, True)))
    assert measured_peak(plain, *given) == plain.plan.peak_bytes
    assert measured_peak(again, *given) == again.plan.peak_bytes <= plain.plan.peak_bytes
    assert (again.plan.modules[0].kept_bytes < plain.plan.modules[0].kept_bytes) == cheaper
    assert (again.plan.macs > plain.plan.macs) == cheaper
    for ours, theirs in zip(twin.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_optimizer():
    trainer = LocalTrainer(models.resnet20(), 3, modules=2, optimizer=torch.optim.AdamW)
    assert measured_peak(trainer, *batch(2, 8)) == trainer.plan.peak_bytes


def test_islands_are_counted():
    model = models.CifarResNet(2)
    model.fc = nn.Sequential(nn.Hardtanh(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    trainer = LocalTrainer(model, 2)
    assert measured_peak(trainer, *batch(8, 16)) == trainer.plan.peak_bytes
    assert any("Hardtanh" in what for what in trainer.plan.modules[-1].islands)
    line = "module 5 runs by autograd, which keeps nothing for it: 2 (Hardtanh)"
    assert line in str(trainer.plan).splitlines()


def test_buffers_add_up_to_the_live_bytes():
    for module in plan(models.resnet20(), (8, 3, 32, 32), 3, modules=3).modules:
        line = module.timeline
        for index, moment in enumerate(line.moments):
            alive = sum(buffer.bytes for buffer in line.buffers if buffer.born <= index < buffer.dies)
            assert moment.after <= alive <= moment.high
            assert moment.before <= moment.high >= moment.after


def test_rebuilding_stays_below_a_third_of_the_traffic(torchvision):
    """What dropping costs: LONGEST_REBUILD and what is kept under the peak hold it there."""
    cases = [("resnet110", 32, {"rule": "bp"}), ("resnet32", 32, {}), ("resnet101", 64, {"rule": "bp"})]
    for name, size, cutting in cases:
        with torch.device("meta"):
            trainer = LocalTrainer(models.create(name, 10), **cutting)
            trainer.plan_for(torch.empty(64, 3, size, size, memory_format=torch.channels_last))
        assert all(module.rebuild_share < 1 / 3 for module in trainer.plan.modules)


def test_memory_is_flat_over_many_steps(long):
    torch.manual_seed(0)
    trainer = LocalTrainer(models.CifarResNet(1, num_classes=4), 2, modules=2)
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    trainer.step(images, labels)
    gc.collect()
    with LiveBytes([*trainer.tensors(), images, labels]) as live:
        trainer.step(images, labels)
        after, peak = live.now, live.peak
        for _ in range(250 if long else 50):
            trainer.step(images, labels)
        assert (live.now, live.peak) == (after, peak)
