"""Steps run once for values of one form; of walks that know them, `test_kinds`."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from auglocal_ext.common.memory import LiveBytes
from auglocal_ext.engine.walked_steps import WalkedSteps


class Counted:
    """A step's function, and how often it ran."""

    def __init__(self, function):
        self.function, self.count = function, 0

    def __call__(self, *values):
        self.count += 1
        return self.function(*values)


def ran_twice(function, *given, writes=("y",), other=None):
    """How often a step runs that is walked with values of one form, then of that or another one; what it made, its
    scratch and multiply-accumulates both times."""
    run, steps, told = Counted(function), WalkedSteps(), []
    for shape in (given, other or given):
        reads = [torch.empty(x, device="meta") if isinstance(x, tuple) else x for x in shape]
        counted = LiveBytes([x for x in reads if isinstance(x, torch.Tensor)])
        step = SimpleNamespace(run=run, reads=("x",) * len(reads), writes=writes, macs=None)
        with torch.no_grad():
            made, *costs = steps.run(step, reads, counted)
        told.append((made, reads, [*costs, counted.now]))
    return run.count, told


def test_bytes_and_arithmetic_are_told_again():
    count, told = ran_twice(lambda a, b: ((a @ b).relu(), a.shape), (8, 4), (4, 6), writes=("y", "size"))
    assert count == 1
    for (y, size), _, costs in told:
        assert y.shape == (8, 6) and y.is_meta and size == (8, 4)
        assert costs == [2 * 8 * 6 * 4, 8 * 4 * 6, 4 * (8 * 4 + 4 * 6 + 8 * 6)]
    assert told[0][0][0].untyped_storage()._cdata != told[1][0][0].untyped_storage()._cdata


def test_what_is_written_over_is_the_same_tensor():
    count, told = ran_twice(lambda a, b: b.add_(a), (8, 4), (8, 4))
    assert count == 1
    assert all(made[0] is reads[1] for made, reads, _ in told)


@torch.enable_grad()
def with_graph(a):
    return a.detach().requires_grad_().exp()


@pytest.mark.parametrize(
    "case",
    [
        (lambda a: a * 2, [(8, 4)], [(8, 5)]),  # another shape
        (lambda a, _b: a * 2, [(8, 4), 1], [(8, 4), 2]),  # another number
        (lambda a, _b: a * 2, [(8, 4), [1]], None),  # a list may change
        (lambda a: a.view(-1), [(8, 4)], None),  # a view
        (lambda a: object(), [(8, 4)], None),
        (with_graph, [(8, 4)], None),
        (lambda a: a.resize_(4), [(8, 4)], None),  # it changes the form of what it is given
    ],
)
def test_what_may_differ_runs_again(case):
    function, given, other = case
    assert ran_twice(function, *given, other=other)[0] == 2


def test_what_leaves_more_than_its_writes_runs_again():
    left = []
    assert ran_twice(lambda a: (left.append(a.exp()), a + 1)[1], (8, 4))[0] == 2


def test_other_modules_are_others():
    steps, x = WalkedSteps(), torch.empty(2, 3, device="meta")
    runs = [Counted(nn.Linear(3, 4, device="meta")) for _ in range(2)]
    for run in runs:
        steps.run(SimpleNamespace(run=run, writes=("y",), macs=None), [x], LiveBytes([x]))
    assert [run.count for run in runs] == [1, 1]
