"""Predicted times: by a fabricated calibration, and what measuring gives."""

import functools
import json
import math
import re

import calibration_helpers
import pytest
import torch
from torch import nn

from auglocal_ext import models
from auglocal_ext.planning import calibration
from auglocal_ext.planning.calibration import Calibration, described, load, machine, save
from auglocal_ext.planning.calibration_cases import Case, Residual, calibration_cases, convolution
from auglocal_ext.planning.calibration_measure import measure
from auglocal_ext.planning.planner import Planner
from auglocal_ext.rules.by_name import as_rule
from auglocal_ext.rules.cutting import cut


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def planned(model, clock, rule="auglocal", n=8, **options):
    rule = as_rule(rule, 2, None)
    planner = Planner(model, recompute=rule.recompute, clock=clock, **options)
    return planner.plan(cut(planner.backbone, rule), (n, 3, 16, 16), rule)


def test_what_was_measured_is_predicted(cache):
    samples = calibration_helpers.samples()
    save(machine("cpu", "fp32"), samples)
    clock = load("cpu", "fp32")
    assert [clock.predict(sample) for sample in samples] == [sample.nanoseconds for sample in samples]
    # Steps are told apart by the file as they were when it was written.
    assert clock(*calibration_helpers.convolution("conv", 4, 64, 16, 16)) == samples[5].nanoseconds


def test_between_the_measured_shapes_is_between_their_speeds():
    clock = Calibration(calibration_helpers.samples())
    step = calibration_helpers.convolution("conv", 4, 32, 64, 16)
    speed = described(*step).costs[1] / (clock(*step) - 10_000)
    assert 50 * 1.1 < speed < 50 * 1.1 * 1.3


@pytest.mark.parametrize("kind", calibration_helpers.PASSES)
@pytest.mark.parametrize("shape", [(16, 16, 4), (16, 64, 16), (32, 48, 8), (3, 512, 64)])
def test_more_images_take_longer(kind, shape):
    clock = Calibration(calibration_helpers.samples())
    times = [clock(*calibration_helpers.convolution(kind, n, *shape)) for n in (2, 3, 4, 5, 8, 16, 100, 1000)]
    assert times == sorted(set(times))
    # In the long run a convolution of so many more takes so much longer.
    assert times[-1] == pytest.approx(10 * times[-2], rel=0.1) or times[-2] < 300_000


def test_kinds_that_were_not_measured_go_by_their_kin():
    clock = Calibration(calibration_helpers.samples())
    assert clock(*calibration_helpers.elementwise("norm", 4, 32)) == 5_000 + 2 * 4 * 4 * 16 * 32 * 32 / 8
    assert clock(*calibration_helpers.elementwise("another", 4, 32)) == clock(
        *calibration_helpers.elementwise("norm", 4, 32)
    )
    grouped = calibration_helpers.convolution("conv", 4, 16, 16, 16, kernel=1)
    assert 0 < clock(*grouped) < clock(*calibration_helpers.convolution("conv", 4, 16, 16, 16))


def test_a_plan_has_the_times_of_its_steps_and_optimizers(tiny_model):
    clock = Calibration(calibration_helpers.samples())
    plan = planned(tiny_model, clock)
    assert len(plan.modules) == 3
    for module in plan.modules:
        line = module.timeline
        assert line.nanoseconds == sum(moment.nanoseconds for moment in line.moments)
        assert all(moment.nanoseconds > 0 for moment in line.moments)
        count = module.gradient_bytes // 4
        optimizer = module.nanoseconds - line.nanoseconds
        # By the formula 1 us a tensor, and 20 bytes a parameter at 10 bytes a ns.
        assert 2 * count < optimizer < 2 * count + 1_000 * 60
    assert plan.milliseconds == sum(module.nanoseconds for module in plan.modules) / 1e6


def test_a_clock_is_asked_once_a_step_with_its_tensors(tiny_model):
    asked = []

    def clock(step, reads, made, macs):
        assert len(reads) == len(step.reads)
        asked.append((step.kind, macs))
        return 7

    clock.optimizer = lambda factory, parameters, state_bytes: 0
    plan = planned(tiny_model, clock, "bp")
    line = plan.modules[0].timeline
    assert plan.modules[0].nanoseconds == 7 * len(line.moments)
    walked = [(moment.kind, moment.macs) for moment in line.moments]
    assert asked[-len(walked) :] == walked


def test_recompute_takes_longer_by_its_convolutions(tiny_model):
    clock = Calibration(calibration_helpers.samples())
    once, twice = (planned(tiny_model, clock, rule) for rule in ("bp", "checkpoint"))
    again = [moment for moment in twice.modules[0].timeline.moments if moment.kind == "recompute"]
    first = [moment for moment in once.modules[0].timeline.moments if moment.kind == "conv"]
    assert again and {m.nanoseconds for m in again} <= {m.nanoseconds for m in first}
    assert twice.milliseconds > once.milliseconds


def test_without_a_clock_there_are_no_times(tiny_model):
    plan = planned(tiny_model, None)
    assert plan.milliseconds is None and plan.modules[0].nanoseconds is None
    assert plan.modules[0].timeline.nanoseconds == 0


def test_frozen_modules_have_no_optimizer_step():
    parameter = nn.Parameter(torch.zeros(3), requires_grad=False)
    assert Calibration(calibration_helpers.samples()).optimizer(torch.optim.SGD, [parameter], 0) == 0


def test_no_file_is_told_in_one_sentence(cache, monkeypatch):
    with pytest.raises(
        ValueError, match="^times in bf16 are not known for .* with .* threads and torch .*: run"
    ) as told:
        load("cpu", "bf16")
    assert str(told.value).endswith("run `auglocal calibrate --device cpu --precision bf16`")
    save(machine("cpu", "fp32"), calibration_helpers.samples())
    load("cpu", "fp32")
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    with pytest.raises(ValueError, match=f"with {threads + 1} threads"):
        load("cpu", "fp32")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"samples": []}', '{"samples": [{"group": ["step"]}]}'])
def test_a_broken_file_is_told_in_one_sentence(cache, content):
    path = save(machine("cpu", "fp32"), calibration_helpers.samples())
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} cannot be read as a calibration: run .* again$"):
        load("cpu", "fp32")


@pytest.mark.parametrize("given", ["", "relative/folder"])
def test_the_file_lies_in_the_cache_folder(monkeypatch, tmp_path, given):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    about = {"device": "A GPU/1", "threads": None, "precision": "bf16", "torch": "2.11.0+cu130"}
    file = tmp_path / ".cache" / "auglocal_ext" / "calibration-A_GPU_1-bf16-2.11.0+cu130.json"
    assert calibration.calibration_file(about) == file


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_measuring_a_tiny_grid(cache, precision):
    with torch.device("meta"):
        head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 16, 10))
        island = Case(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ELU(), nn.MaxPool2d(2)), head, (2, 3, 16, 16))
        cases = [convolution(16, 16, 4, 3), convolution(3, 16, 8, 3, 2), island]
    shown = []
    samples = measure(
        torch.device("cpu"), precision, cases, parameters=[(2, 10)], progress=lambda work: shown.append(work) or work
    )
    assert len(shown[0]) == 3 + 7
    assert all(isinstance(s.nanoseconds, int) and s.nanoseconds > 0 for s in samples)
    convs = [s for s in samples if s.group[0] == "convolution"]
    assert [s.group[1] for s in convs] == ["conv", "weight gradient", "data gradient"] + 2 * ["conv", "weight gradient"]
    assert convs[0].costs[1] == 128 * 4 * 4 * 16 * 16 * 9
    assert math.exp(convs[0].place[3]) == pytest.approx(4 * 4)
    kinds = {s.group[1] for s in samples if s.group[0] == "step"}
    assert kinds >= {"norm", "rebuild", "norm backward", "pooled norm", "linear and loss", "island", "island backward"}
    optimizers = {s.group[1] for s in samples if s.group[0] == "optimizer"}
    assert optimizers == {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adagrad", "RMSprop"}
    path = save(machine("cpu", precision), samples)
    written = json.loads(path.read_text())
    assert written["precision"] == precision and len(written["samples"]) == len(samples)
    assert planned(models.CifarResNet(1), load("cpu", precision), precision=precision).milliseconds > 0


def test_the_default_grid_has_what_it_says():
    cases = calibration_cases()
    larger = [case.shape for case in calibration_cases("cuda")]
    assert larger == [(32 * n, *size) for n, *size in (case.shape for case in cases)]
    convs = [m for case in cases for m in case.body.modules() if isinstance(m, nn.Conv2d)]
    assert {conv.kernel_size for conv in convs} >= {(1, 1), (3, 3), (7, 7)}
    assert {conv.in_channels for conv in convs} >= {3, 16, 32, 64, 128, 256, 512}
    assert {conv.stride for conv in convs} == {(1, 1), (2, 2)}
    assert any(conv.groups == conv.in_channels for conv in convs)
    assert {case.shape[2] for case in cases} >= {4, 7, 14, 28, 56, 112}
    assert any(isinstance(m, Residual) for case in cases for m in case.body.modules())


def test_an_optimizer_of_ones_own_goes_by_its_kin(tiny_model):
    clock = Calibration(calibration_helpers.samples())
    given = {"optimizer": functools.partial(torch.optim.Rprop, lr=0.1)}
    assert planned(tiny_model, clock, **given).milliseconds > 0


def test_memory_that_is_new_to_the_process_is_told_apart():
    small, large = (described(*calibration_helpers.elementwise("norm", n, 224)) for n in (2, 32))
    assert small.costs[2] == 0 and large.costs[2] == 32 * 16 * 224 * 224 * 4
    inside = described(*calibration_helpers.convolution("conv", 32, 3, 16, 224))
    assert inside.costs[2] == 32 * 16 * 224 * 224 * 4
