"""Trainings on a GPU against those of the CPU, and what is otherwise there, tried on the CPU where that shows it."""

from functools import partial

import pytest
import torch
from ops_helpers import DISPATCHED as DEVICES

import auglocal_ext
from auglocal_ext import LocalTrainer, data, models, train
from auglocal_ext.common.memory import LiveBytes, bytes_of
from auglocal_ext.planning.menu import Menu
from auglocal_ext.planning.planner import Planner
from auglocal_ext.rules.auglocal import AugLocal
from auglocal_ext.rules.cutting import cut
from auglocal_ext.training.epoch import PeakMeter

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
CUT = {"depth": 2, "modules": 3}
RULES = {
    "auglocal": CUT,
    "imagenet": {"depth": 2, "form": "imagenet", "modules": 3},
    "light": {"depth": 2, "auxiliary": "light", "modules": 3},
    "dgl": {"rule": "dgl", "image_size": 32},
    "predsim": {"rule": "predsim", "image_size": 32},
    "infopro": {"rule": "infopro", "image_size": 32},
    "bp": {"rule": "bp"},
    "checkpoint": {"rule": "checkpoint"},
    "accumulated": {**CUT, "accumulate": 2, "clip_norm": 0.5, "clip": "global", "ema": 0.9},
}


def batches(count, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        images = 1.5 * torch.rand(6, 3, 32, 32, generator=generator, dtype=torch.float64) - 0.75
        labels = torch.randint(10, (6,), generator=generator)
        yield images.to(device, dtype, memory_format=torch.channels_last), labels.to(device)


def trainer_of(device, name="auglocal", dtype=torch.float64, **options):
    """Beginning alike on every device."""
    torch.manual_seed(0)
    network = models.create("resnet18", 10) if name == "imagenet" else models.CifarResNet(1)
    made = LocalTrainer(network.to(dtype), optimizer=SGD, **RULES[name], **options)
    if device == "cpu":
        return made
    moved = LocalTrainer(network.to(device), optimizer=SGD, **RULES[name], **options)
    moved.aux_nets.load_state_dict(made.aux_nets.state_dict())
    return moved


def tensors(trainer):
    averaged = [] if trainer.ema_model is None else trainer.ema_model.state_dict().items()
    both = *trainer.model.state_dict().items(), *trainer.aux_nets.state_dict().items(), *averaged
    return [(name, tensor.detach().cpu()) for name, tensor in both]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RULES)
def test_steps_are_those_of_the_cpu(name, device):
    found = []
    for where in ("cpu", device):
        trainer = trainer_of(where, name)
        losses = [trainer.step(*batch).module_losses.cpu() for batch in batches(3, where)]
        trainer.flush()
        trainer.check()
        found.append((torch.stack(losses), tensors(trainer)))
    (losses, wanted), (others, given) = found
    torch.testing.assert_close(others, losses, rtol=1e-9, atol=1e-9)
    for (key, one), (_, other) in zip(wanted, given, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-8, atol=1e-9, msg=key)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_are_near_the_full_one(precision, device):
    exact, lower = (
        [trainer.step(*batch).module_losses.cpu() for batch in batches(4, device, torch.float32)]
        for trainer in (trainer_of(device, dtype=torch.float32, precision=p) for p in ("fp32", precision))
    )
    torch.testing.assert_close(torch.stack(lower), torch.stack(exact), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("device", DEVICES)
def test_a_module_is_left_out_where_its_loss_is_not_finite(device):
    trainer = trainer_of(device)
    trainer.nonfinite, module = "skip", trainer.local_modules[1]
    next(module.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    for batch in batches(2, device):
        trainer.step(*batch)
    assert trainer.skipped_steps == [0, 2, 0] and all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plan_is_what_a_step_needs(precision, device):
    """On a GPU besides what libraries want for themselves, which torch's allocator counts too."""
    trainer = trainer_of(device, dtype=torch.float32, precision=precision)
    images, labels = next(batches(1, device, torch.float32))
    times = 1 if device == "cpu" else 100  # against which that is little
    batch = images.repeat(times, 1, 1, 1).to(memory_format=torch.channels_last), labels.repeat(times)
    trainer.plan_for(*batch)
    meter = PeakMeter(trainer)
    for _ in range(2):
        with meter(*batch):
            trainer.step(*batch)
    planned = trainer.plan.peak_bytes
    assert meter.peak == planned if device == "cpu" else planned <= 1.01 * meter.peak <= 1.01 * planned + 100e6


@pytest.mark.parametrize("device", DEVICES)
def test_a_training_is_validated_and_gone_on_with(device, tmp_path):
    source = data.load("fake:48", 16, device=device)
    options = {**CUT, "val_loader": source.test, "device": device, "seed": 1, "progress": False, "precision": "bf16"}
    torch.manual_seed(0)
    model = models.CifarResNet(1)
    train(model, source.train, epochs=1, checkpoint=tmp_path, **options)
    result = train(model, source.train, epochs=2, checkpoint=tmp_path, **options)
    assert [entry["epoch"] for entry in result.history] == [1, 2] and result.history[1]["loss"] < 4
    assert auglocal_ext.evaluate(model, source.test, precision="bf16") == pytest.approx(result.val_accuracy, abs=0.1)
    features = auglocal_ext.analysis.cka(model, model, source.test)
    assert features.matrix.diagonal() == pytest.approx([1.0] * len(features.rows), abs=1e-6)
    source, on_cpu = data.load("fake:48", 16), models.CifarResNet(1)
    options |= {"device": "cpu", "val_loader": source.test}
    assert len(train(on_cpu, source.train, epochs=3, checkpoint=tmp_path, **options).history) == 3


# ---- what the CPU can show of it -------------------------------------------------------------------------------------


def test_a_plan_counts_the_copy_of_a_batch_that_a_gpus_step_makes():
    trainer = trainer_of("cpu", dtype=torch.float32)
    trainer._values_are_at_hand = False
    images, labels = next(batches(1, dtype=torch.float32))
    trainer.step(images, labels)
    with LiveBytes([*trainer.tensors(), images, labels]) as live:
        trainer.step(images, labels)
    rule, planner = AugLocal(2), Planner(trainer.model, optimizer=SGD, memory_format=torch.channels_last)
    spans, found = cut(planner.backbone, rule, modules=3), []
    for device in ("cpu", "cuda"):
        planner.device = torch.device(device)
        found.append(planner.plan(spans, images.shape, rule))
        menu = Menu(planner, images.shape, [rule], None, False)
        for point in menu.points(menu.asked):  # a search counts what a plan does
            borders = cut(planner.backbone, rule, borders=point.borders)
            assert planner.plan(borders, images.shape, rule).peak_bytes == point.bytes
    here, there = found
    assert there.peak_bytes - here.peak_bytes == images.nbytes + labels.nbytes == here.batch_bytes
    # Flags, and what is computed for them, are not planned.
    assert 0 <= live.peak - there.peak_bytes <= 64


def test_what_is_there_besides_is_not_a_steps(monkeypatch):
    trainer = trainer_of("cpu", dtype=torch.float32)
    batch = next(batches(1, dtype=torch.float32))
    own, meter = bytes_of([*trainer.tensors(), *batch]), PeakMeter(trainer)
    meter.cuda = True
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: own + 1_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: own + 1_000_300)
    with meter(*batch):
        pass
    assert meter.peak == own + 300


def test_infopros_loss_of_what_is_not_finite_is_nan():
    trainer = trainer_of("cpu", "infopro")
    with torch.no_grad():
        trainer.model.conv1.weight.fill_(torch.nan)
    assert trainer.step(*next(batches(1))).module_losses.isnan().all()
