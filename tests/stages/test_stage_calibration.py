"""What a simulation is told of the machines that are there."""

import pytest
import torch
from ranks import together

from auglocal_ext import LocalTrainer, models
from auglocal_ext.distributed.group import on_its_own
from auglocal_ext.planning.roofline import Roofline
from auglocal_ext.stages import calibration
from auglocal_ext.stages.calibration import calibrated, measured_costs, measured_link
from auglocal_ext.stages.pieces import Link, total
from auglocal_ext.stages.planned_costs import planned_costs
from auglocal_ext.stages.simulate import predicted
from auglocal_ext.stages.trainer import StageTrainer

CUT, CLOCK = {"modules": 4, "depth": 2}, Roofline(1e9, 1e9)


def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 16, 16, generator=generator).to(memory_format=torch.channels_last)
    return images, torch.arange(8) % 10


def trainer():
    torch.manual_seed(0)
    made = LocalTrainer(models.CifarResNet(1), image_size=16, **CUT)
    made.plan_for(*batch())
    return made


def test_modules_take_what_was_measured(monkeypatch):
    monkeypatch.setattr(calibration, "measured_seconds", lambda *given: [1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(calibration, "optimizer_seconds", lambda *given: 0.5)
    monkeypatch.setattr(calibration, "measured_roofline", lambda *given: CLOCK)
    measured = trainer()
    costs, planned = measured_costs(measured, *batch()), planned_costs(measured.plan, measured.model, CLOCK)
    assert [piece.seconds for piece in costs.modules] == pytest.approx([1.5, 2.5, 3.5, 4.5])
    assert all(piece.weights < piece.backward < piece.seconds for piece in costs.modules)
    assert predicted(costs, 2, link=Link(1e30, 0)).images_per_second == pytest.approx(8 / 7.5)
    factor = 10 / (total(planned.modules, "forward") + total(planned.modules, "backward"))
    assert costs.units == tuple(piece.scaled(factor) for piece in planned.units)


def test_nothing_changes_by_measuring():
    measured, other = trainer(), trainer()
    costs = measured_costs(measured, *batch())
    assert all(piece.forward > 0 and piece.backward > 0 and piece.step > 0 for piece in costs.modules)
    theirs = other.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in measured.model.state_dict().items())
    assert torch.equal(measured.step(*batch()).module_losses, other.step(*batch()).module_losses)


def test_frozen_modules_take_no_step():
    assert calibration.optimizer_seconds(None, torch.nn.Linear(2, 2).requires_grad_(False), "cpu") == 0


def test_of_several_ranks_it_is_the_mean(monkeypatch):
    monkeypatch.setattr(calibration, "optimizer_seconds", lambda *given: 0.5)
    monkeypatch.setattr(calibration, "measured_seconds", lambda *given: [1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(calibration, "gathered", lambda ours, what: [ours, ours and ours.scaled(2)])
    costs, _ = calibrated(trainer(), *batch())
    assert [piece.seconds for piece in costs.modules] == pytest.approx([2.25, 3.75, 5.25, 6.75])


def test_alone_a_link_takes_no_time():
    assert measured_link().seconds(10**9) == 0


def two():
    """One rank's part: (costs, link, predicted bytes of the ranks, planned ones)."""
    with on_its_own():
        measured = trainer()
    costs, link = calibrated(measured, *batch())
    stages = StageTrainer(models.CifarResNet(1), *batch(), **CUT)
    stages.epoch([batch()] * 2)
    return costs, link, predicted(costs, 2, spans=stages.spans).memory, stages.rank_bytes


def test_two_ranks_measure_the_same(tmp_path):
    first, second = together(two, tmp_path / "ranks")
    assert first == second
    costs, link, memory, planned = first
    assert len(costs.modules) == 4 and all(piece.seconds > 0 for piece in costs.modules)
    assert 0 < link.latency < 1 and 1e6 < link.bandwidth < 1e13
    # But for the headers of two messages, and what aligns the tensors behind them.
    assert [theirs - ours for ours, theirs in zip(memory, planned, strict=True)] == [128, 128]
