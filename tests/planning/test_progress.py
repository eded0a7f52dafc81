"""Planning that takes long says so on a terminal, and leaves nothing there."""

import io
import re

import pytest

from auglocal_ext import LocalTrainer, plan
from auglocal_ext.planning import progress
from auglocal_ext.planning.progress import Progress

SHAPE = (8, 3, 16, 16)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Where every bar is drawn at once and at each walk."""
    shown, real = Terminal(), progress.tqdm
    monkeypatch.setattr(progress, "SECONDS", 0)
    monkeypatch.setattr(progress, "tqdm", lambda **options: real(mininterval=0, file=shown, **options))
    return shown


def walks(text, batch):
    return [int(count) for count in re.findall(rf"planning batches of {batch}: (\d+) walks", text)]


def assert_left_clean(text):
    assert text.endswith("\r") and not text.rsplit("\r", 2)[1].strip()


def test_a_plan_shows_its_walks(tiny_model, terminal):
    planned = plan(tiny_model, SHAPE, 2, modules=2, memory_budget="5MB")
    counts = walks(terminal.getvalue(), 8)
    assert counts == sorted(counts) and counts[-1] > 2 * len(planned.modules)
    assert_left_clean(terminal.getvalue())


def test_a_trainers_planning_too(tiny_model, batch, terminal):
    LocalTrainer(tiny_model, 2).plan_for(batch[0], compare=True)
    assert walks(terminal.getvalue(), 8)
    assert_left_clean(terminal.getvalue())


def test_a_refusal_names_the_batches_that_it_walks(tiny_model, terminal):
    with pytest.raises(ValueError, match=r"or batches of [23]\b"):
        plan(tiny_model, (4, *SHAPE[1:]), 2, memory_budget=_least(tiny_model, 4) - 1)
    text = terminal.getvalue()
    assert walks(text, 2) and walks(text, 4)
    assert_left_clean(text)


def _least(model, batch):
    with pytest.raises(ValueError, match="too small") as error:
        plan(model, (batch, *SHAPE[1:]), 2, memory_budget=1)
    return int(re.search(r"\(([\d,]+) bytes\)", str(error.value))[1].replace(",", ""))


def test_nothing_is_shown_of_what_is_quick_or_not_on_a_terminal(tiny_model, terminal, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 60)
    plan(tiny_model, SHAPE, 2)
    assert not terminal.getvalue()
    monkeypatch.setattr(progress, "SECONDS", 0)
    monkeypatch.setattr(Terminal, "isatty", lambda self: False)
    plan(tiny_model, SHAPE, 2)
    assert not terminal.getvalue()


def test_one_bar_within_another_renames_it(terminal):
    shown = Progress()
    shown.walked()  # where there is none
    with shown("outer"):
        shown.walked()
        with shown("inner"):
            shown.walked()
        shown.walked()
    names = re.findall(r"(outer|inner): (\d) walks", terminal.getvalue())
    assert [name for name in names if name[1] != "0"] == [("outer", "1"), ("inner", "2"), ("outer", "3")]
