"""The picture of what ranks do when, as matplotlib was given it."""

from typing import NamedTuple

import pytest

from auglocal_ext import report
from auglocal_ext.report import figure as figure_module


class Event(NamedTuple):
    rank: int
    batch: int
    what: str
    start: float
    end: float


EVENTS = [
    Event(0, 0, "forward", 0.0, 0.010),
    Event(0, 0, "backward", 0.010, 0.030),
    Event(0, 0, "step", 0.030, 0.032),
    Event(0, 0, "send", 0.032, 0.036),
    Event(1, 0, "forward", 0.036, 0.048),
    Event(1, 0, "send back", 0.048, 0.052),
    Event(1, 0, "weight gradient", 0.048, 0.060),
    Event(1, 1, "forward", 0.060, 0.080),
    Event(1, 1, "step", 0.080, 0.080),
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, which is done too."""
    figures, real = [], figure_module.save
    monkeypatch.setattr("auglocal_ext.report.gantt.save", lambda f, path: figures.append(f) or real(f, path))
    return figures


def bars(axes):
    """(left, width, middle, hatch, shade) of each bar."""
    return [
        (bar.get_x(), bar.get_width(), bar.get_y() + bar.get_height() / 2, bar.get_hatch(), bar.get_facecolor())
        for bar in axes.patches
    ]


def test_every_event_is_a_bar_where_and_when_it_was(drawn, tmp_path):
    report.gantt_picture([("mine", EVENTS, None)], tmp_path / "ranks.png", "all")
    (axes,) = drawn[0].axes
    places = {(round(left, 6), round(width, 6), round(middle, 6)) for left, width, middle, *_ in bars(axes)}
    assert places == {
        (0, 10, 0),
        (10, 20, 0),
        (30, 2, 0),
        (32, 4, 0.33),
        (36, 12, 1),
        (48, 4, 1.43),
        (48, 12, 1),
        (60, 20, 1),
    }
    assert axes.get_xlabel() == "time, ms" and axes.get_ylabel() == "rank" and axes.get_title(loc="left") == "mine"
    assert list(axes.get_yticks()) == [0, 1] and axes.get_ylim()[0] > 1.4 > 0 > axes.get_ylim()[1]
    assert drawn[0].get_suptitle() == "all; numbers: batches, or micro-batches" and (
        tmp_path / "ranks.png"
    ).read_bytes().startswith(b"\x89PNG")
    assert [(text.get_text(), text.xy[0], round(text.xy[1], 2)) for text in axes.texts] == [
        ("0", 0, -0.28),
        ("0", pytest.approx(36), 0.72),
        ("1", pytest.approx(60), 0.72),
    ]


def test_kinds_are_told_apart_in_grey(drawn, tmp_path):
    report.gantt_picture([("mine", EVENTS, None)], tmp_path / "ranks.png", "all")
    looks = {
        (hatch, round(0.3 * red + 0.6 * green + 0.1 * blue, 1))
        for *_, hatch, (red, green, blue, _) in bars(drawn[0].axes[0])
    }
    assert len(looks) == 6
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert texts == [
        "forward",
        "backward",
        "weights' gradients",
        "optimizer's step",
        "message to the next rank",
        "message to the rank before",
    ]


def test_a_trace_stands_beside_on_the_same_scale(drawn, tmp_path):
    later = [event._replace(start=2 * event.start, end=2 * event.end) for event in EVENTS]
    report.gantt_picture([("a", EVENTS, later), ("b", EVENTS, None)], tmp_path / "ranks.svg", "all")
    predicted, traced, alone, empty = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in (predicted, traced, alone)] == [
        "a; predicted",
        "a; traced",
        "b; predicted",
    ]
    assert predicted.get_xlim() == traced.get_xlim() == pytest.approx((0, 160)) and alone.get_xlim()[1] == 80
    assert not empty.axison and len(traced.patches) == 8


def test_units_of_time_fit(drawn, tmp_path):
    for factor, unit in ((1e-3, "µs"), (100, "s")):
        events = [event._replace(start=factor * event.start, end=factor * event.end) for event in EVENTS]
        report.gantt_picture([("a", events, None)], tmp_path / "ranks.png", "all")
        assert drawn[-1].axes[0].get_xlabel() == f"time, {unit}"


def test_many_ranks_have_fewer_ticks_and_no_numbers(drawn, tmp_path):
    events = [Event(rank, 0, "forward", rank, rank + 1.0) for rank in range(64)]
    report.gantt_picture([("a", events, None)], tmp_path / "ranks.png", "all")
    (axes,) = drawn[0].axes
    assert list(axes.get_yticks()) == list(range(0, 64, 4)) and not axes.texts
    assert drawn[0].get_suptitle() == "all"


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in .png, .pdf, .svg"):
        report.gantt_picture([("a", EVENTS, None)], tmp_path / "ranks.txt", "all")
