"""Fixtures of trainings."""

from dataclasses import replace

import pytest

from auglocal_ext.planning.comparison import Comparison, Cost
from auglocal_ext.training import trainer


@pytest.fixture
def nothing_compared(monkeypatch):
    """A training does not find out what its step costs otherwise, which takes as long as a short training does; the
    tests of comparisons and of the command line do."""

    def compared(planner, planned, like=None):
        cost = Cost(planned.peak_bytes, 1.0)
        return replace(planned, comparison=Comparison(len(planned.modules), cost, cost, cost, cost, cost, None))

    monkeypatch.setattr(trainer, "compared", compared)
