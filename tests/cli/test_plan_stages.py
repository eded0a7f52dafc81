"""`auglocal plan --stages`"""

import re

import pytest
from calibration_helpers import samples

from auglocal_ext import report
from auglocal_ext.cli.options import duration, rate
from auglocal_ext.cli.program import main
from auglocal_ext.planning.calibration import machine, save

PLAN = ["plan", "--model", "resnet20", "--image-size", "8", "--batch-size", "8", "--depth", "2", "--modules", "4"]
SPEED = ["--speed", "1G", "1GB/s"]
WAYS = ["layer parallel", "data parallel", "GPipe", "1F1B", "zero-bubble (ZB-H1)", "data parallel"]


@pytest.fixture
def panels(monkeypatch):
    """What is drawn."""
    drawn, real = [], report.gantt_picture
    monkeypatch.setattr(report, "gantt_picture", lambda *given: drawn.append(given) or real(*given))
    return drawn


def rows(out):
    """(ranks, what, images/s, idle) of each line of the table."""
    found = re.findall(r"^(\d+) +(local learning|backpropagation)(?:, (.*?))?  +(\S+) +(\S+)  ", out, re.MULTILINE)
    return [(int(ranks), what, how, images.replace(",", ""), idle) for ranks, what, how, images, idle in found]


def test_ranks_are_doubled_up_to_those_asked_for(capsys, panels, tmp_path):
    picture = tmp_path / "ranks.png"
    assert main([*PLAN, *SPEED, "--stages", "3", "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    found = rows(out)
    assert [(row[0], row[2]) for row in found] == [(1, ""), (1, "")] + [(n, way) for n in (2, 3) for way in WAYS]
    alone, *others = (float(row[3]) for row in found if row[1] == "local learning" and "data" not in row[2])
    assert alone < others[0] <= 2 * alone and others[0] <= others[1] <= 3 * alone
    most, share = re.search(
        r"reaches (\S+) images/s at most: local module 3 alone takes (\d+)%", out.replace("\n", " ")
    ).groups()
    assert float(most.replace(",", "")) >= 0.999 * others[1]
    assert float(share) == pytest.approx(100 * alone / float(most.replace(",", "")), abs=1)
    assert found[0][4] == "0.0%" and "links of 25 GB/s and 5 µs; seconds by the speed that was given" in " ".join(
        out.split()
    )
    assert f"saved {picture}" in out and picture.read_bytes().startswith(b"\x89PNG")
    ((of, _, title),) = panels
    assert [name.split(":")[0] for name, *_ in of] == [
        "local learning, layer parallel",
        "backpropagation, GPipe",
        "backpropagation, 1F1B",
        "backpropagation, zero-bubble (ZB-H1)",
    ]
    assert {event.rank for event in of[0][1]} == {0, 1, 2} and "3 ranks from their first batch on" in title


def test_slow_links_and_machines_are_slow(capsys):
    speeds = []
    for more in ([], ["--latency", "1s"], ["--bandwidth", "100kB/s"], ["--speed", "1M", "1MB/s"]):
        assert main([*PLAN, *SPEED, *more, "--stages", "2"]) == 0
        speeds.append(
            {(ranks, what, how): float(images) for ranks, what, how, images, _ in rows(capsys.readouterr().out)}
        )
    fast, late, narrow, slow = speeds
    here = (1, "local learning", "")
    assert fast[here] == late[here] == narrow[here] > 900 * slow[here]
    assert late[2, "local learning", "layer parallel"] <= 8  # a batch of 8 images a second at most
    assert narrow[2, "local learning", "layer parallel"] < fast[2, "local learning", "layer parallel"] / 5


def test_more_ranks_than_images_or_units(capsys):
    few = [*PLAN, *SPEED, "--units", "conv1", "layer2", "layer3", "--modules", "3", "--batch-size", "2"]
    assert main([*few, "--stages", "3"]) == 0
    found = {row[:3]: row[3] for row in rows(capsys.readouterr().out)}
    assert found[3, "local learning", "data parallel"] == found[3, "backpropagation", "data parallel"] == "-"
    assert float(found[3, "backpropagation", "GPipe"]) > 0


def test_without_a_speed_it_is_this_machines(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main([*PLAN, "--stages", "2", "--brief"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "seconds by this machine's speed, " in said and "as `auglocal calibrate` has not been run" in said


def test_with_a_calibration_seconds_are_its(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("auglocal_ext.cli.plan_stages.default_device", lambda: "cpu")
    save(machine("cpu", "fp32"), samples())
    assert main([*PLAN, "--stages", "2"]) == 0
    assert "seconds by what `auglocal calibrate` has measured here" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stages", "5"], "4 local modules cannot be spread over 5 stages: each needs at least one"),
        (["--stages", "1"], "--stages must be at least 2, given 1"),
        (["--stages", "257"], "--stages must be at most 256, given 257"),
        (["--bandwidth", "1GB/s"], "--bandwidth is about several ranks: give --stages too, for instance --stages 4"),
        (["--latency", "5us"], "--latency is about several ranks"),
        (["--speed", "1T", "1TB/s"], "--speed is about several ranks"),
        (["--stages", "2", "--bandwidth", "fast"], "--bandwidth must be a rate such as 25GB/s or 60T, given 'fast'"),
        (["--stages", "2", "--bandwidth", "0GB/s"], "--bandwidth must be a rate such as 25GB/s or 60T, given '0GB/s'"),
        (["--stages", "2", "--latency", "5"], "--latency must be a time such as 5us or 2ms, given '5'"),
        (["--stages", "2", "--latency", "..s"], "--latency must be a time such as 5us or 2ms, given '..s'"),
        (["--stages", "2", "--accumulate", "2"], "--stages predicts ranks that step behind every batch: leave --accum"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, more, message):
    assert main([*PLAN, *SPEED * ("--stages" in more), *more]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("auglocal: error: ") and message in said.err and len(said.err.splitlines()) == 1
    assert not said.out


@pytest.mark.parametrize(
    ("text", "value"), [("25GB/s", 25e9), ("60T", 60e12), ("1.5e9", 1.5e9), ("100 MB", 1e8), ("2tb/s", 2e12)]
)
def test_rates(text, value):
    assert rate(text) == value


@pytest.mark.parametrize(("text", "value"), [("5us", 5e-6), ("5 µs", 5e-6), ("2ms", 2e-3), ("1s", 1), ("30ns", 3e-8)])
def test_durations(text, value):
    assert duration(text) == pytest.approx(value)
