"""The names that options are set to are those that there are, and no help waits for torch."""

import inspect
import re
import subprocess
import sys

import pytest

from auglocal_ext import optim, rules
from auglocal_ext.cli import names
from auglocal_ext.common import checks
from auglocal_ext.planning import budget, stepping


def test_they_are_those_that_there_are():
    assert tuple(rules.RULES) == names.RULES
    assert rules.FORMS == names.FORMS
    assert checks.PRECISIONS == names.PRECISIONS
    assert budget.PREFER == names.PREFER
    assert stepping.CLIPS == names.CLIPS
    assert tuple(optim.OPTIMIZERS) == names.OPTIMIZERS
    assert (*optim.SCHEDULES, "paper") == names.SCHEDULES
    takes = [name for name, kind in optim.OPTIMIZERS.items() if "momentum" in inspect.signature(kind).parameters]
    assert tuple(takes) == names.WITH_MOMENTUM


@pytest.mark.parametrize("command", ["", "train", "resume", "evaluate", "analyze", "plan", "models", "export"])
def test_no_help_imports_torch(command):
    command = [sys.executable, "-X", "importtime", "-m", "auglocal_ext", *command.split(), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "usage: auglocal" in done.stdout and "auglocal_ext.cli.program" in imported
    assert not [name for name in imported if re.match(r"(torch|numpy|sklearn|matplotlib|tqdm)\b", name)]
