"""Plans of a step by several ranks: the bytes of gradients that wait, and cuts that leave them room."""

import pytest
import torch

from auglocal_ext import models, plan
from auglocal_ext.distributed.group import World
from auglocal_ext.planning import stepping

SHAPE = (4, 3, 16, 16)


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setattr(stepping, "world", lambda: World(0, range(2)))


def planned(**options):
    torch.manual_seed(0)
    return plan(models.CifarResNet(1), SHAPE, 2, **options)


@pytest.mark.usefixtures("nothing_compared")
def test_what_waits_is_in_the_plan(monkeypatch):
    alone = planned(modules=3)
    monkeypatch.setattr(stepping, "world", lambda: World(0, range(2)))
    ours = planned(modules=3)
    assert ours.origin.stepping.ranks == 2
    assert [module.gradient_bytes for module in ours.modules] == [module.gradient_bytes for module in alone.modules]
    first = alone.modules[0]
    constant = first.peak_bytes - max(first.timeline.peak, first.timeline.end + first.optimizer_scratch)
    waiting = 0  # of the module before
    for module in ours.modules:
        behind = max(waiting, module.gradient_bytes)  # moved into one tensor, for a moment they are there twice
        assert module.peak_bytes == constant + max(module.timeline.peak + waiting, module.timeline.end + behind)
        waiting = module.gradient_bytes
    assert ours.peak_bytes > alone.peak_bytes
    assert ours.state_bytes == alone.state_bytes and ours.macs == alone.macs


@pytest.mark.usefixtures("nothing_compared")
def test_a_cut_is_chosen_that_leaves_room(two_ranks):
    least = planned(memory_budget="100MB", prefer="memory").peak_bytes
    for budget in (least, least + 20_000, least + 100_000, least + 400_000):
        found = planned(memory_budget=budget)
        assert found.peak_bytes <= budget and found.choice.budget == budget
        assert found.choice.point.bytes == found.peak_bytes


@pytest.mark.usefixtures("nothing_compared")
def test_too_little_is_told_with_what_waits(two_ranks, monkeypatch):
    cut = {"modules": 3}
    least = planned(memory_budget="100MB", prefer="memory", **cut).peak_bytes
    monkeypatch.setattr(stepping, "world", World)
    smaller = planned(memory_budget="100MB", prefer="memory", **cut).peak_bytes
    assert smaller < least
    monkeypatch.setattr(stepping, "world", lambda: World(0, range(2)))
    with pytest.raises(ValueError, match="gradients that wait for 2 ranks would take .* too small for batches of 4"):
        planned(memory_budget=smaller, **cut)
