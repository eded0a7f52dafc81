"""What docs/results.py writes of the study: of none of its rows, of one, of all; what it says of what was expected."""

import importlib
import json
from pathlib import Path

import pytest
from study_lines import MACHINE, line, record

ROOT = Path(__file__).resolve().parents[2]
PAPER = {"depth": 4, "count": 13}


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.syspath_prepend(ROOT / "python")
    return importlib.import_module("results")


@pytest.fixture
def place(program, tmp_path):
    """(the study's file, which is not there, and a page)."""
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"before\n{program.BEGIN}old\n{program.END}after\n")
    return tmp_path / "study.jsonl", page


def write(path, lines):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))


def verdicts(program, lines):
    return [row[1:] for row in program.expectations(lines)[1:]]


def test_the_page_has_what_the_files_of_the_study_say(program):
    """Else: python docs/results.py."""
    written = program.PAGE.read_text().partition(program.BEGIN)[2].partition(program.END)[0]
    assert written == f"\n{program.section(program.study.FILE, program.PAGE)}\n"


def test_nothing_is_said_of_what_is_not_trained(program):
    missing = ["", "not yet trained"]
    assert verdicts(program, []) == verdicts(program, [line("bp", [1] * 4), line("dgl", [0.5] * 4)]) == [missing] * 6


def test_one_seed_decides_nothing(program):
    lines = [line("dgl", [0.5, 0.5, 0, 0], (0.5, 0.3, 0, 0), 16), line("auglocal", [0.9, 0.8, 0, 0], **PAPER)]
    first, _, third, *_ = verdicts(program, lines)
    assert first == ["+10.0 points", "one seed each: not decided"]  # of the first two units of four
    assert third == ["+0.350", "one seed each: not decided"]


def test_verdicts_follow_from_the_interval(program):
    spread = [line("bp", [0.9 + 0.01 * seed] * 4, seed=seed) for seed in (0, 2, 3)]
    spread[0] = line("bp", [0.91] * 4)  # standard deviation 0.01
    spread.append(line("bp", [0.91] * 4, seed=1))  # of the same two models as seed 0's: counts once
    few = {"depth": 4, "count": 4, "modules": 4}
    lines = [*spread, line("auglocal", [0.8] * 4, **PAPER), line("dgl", [0.5] * 4, count=16)]
    lines += [line("predsim", [0.9] * 4, count=16), line("auglocal", [0.82] * 4, **few)]
    found = verdicts(program, lines)
    half = f"{4.303 * 0.01 * 2**0.5:.3f}"  # Student's, of two degrees of freedom
    assert found[2:] == [
        [f"+0.300 ± {half}", "holds"],
        [f"-0.100 ± {half}", "does not hold"],
        ["", "not yet trained"],
        [f"+0.020 ± {half}", "not decided"],
    ]


def test_without_a_row_there_is_a_section_all_the_same(program, place):
    file, page = place
    assert program.renew(*place) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{program.BEGIN}\nResNet-32") and text.endswith(f"\n{program.END}after\n")
    assert (
        "Trainings done: 0 of 34; rows with a seed or more: 0 of 14." in text
        and "None of them is analysed yet." in text
    )
    assert "\nold" not in text and "raw:" not in text and "![" not in text and "|" not in text


def test_one_row(program, place, tmp_path):
    file, page = place
    earlier = record("bp", 0.8) | {"machine": MACHINE | {"device": "another"}}
    write(file, [earlier, record("bp", 0.9)])
    write(program.study_analysis.analysis_file(file), [line("bp", [1] * 4)])
    program.renew(*place)
    text = page.read_text()
    assert (
        "Trainings done: 1 of 34; rows with a seed or more: 1 of 14." in text
        and "one, torch 2, Python 3, commit abc." in text
    )
    assert "90.0" in text and "80.0" not in text and "another," not in text  # of one training the last record
    assert "none has yet" in text and "No row has two seeds yet, so there are no intervals." in text
    assert "There is nothing to compare yet." in text and "Models analysed: 1." in text
    assert shown(text, page) == {f"study_{name}.png" for name in ("cka", "cka_maps", "probes")}


def test_all_rows(program, place):
    file, page = place
    runs = [(run.rule, {"seed": run.seed, **cut_of(run)}) for run in program.study.runs("")]
    accuracies = [0.9 + 0.001 * more["seed"] - 0.1 * (rule == "dgl") for rule, more in runs]
    write(file, [record(rule, accuracy, **more) for (rule, more), accuracy in zip(runs, accuracies, strict=True)][::-1])
    write(program.study_analysis.analysis_file(file), [line(rule, [0.9] * 4, **more) for rule, more in runs])
    program.renew(*place)
    text = page.read_text()
    assert "Trainings done: 34 of 34; rows with a seed or more: 14 of 14." in text and "Models analysed: 34." in text
    assert text.index("| BP  ") < text.index("| AugLocal d=4, light") < text.index("| InfoPro")  # as in the queue
    assert "(here 0.16 points, degrees of freedom 20)" in text  # of five rows with five seeds, 0 to 0.4 points
    assert "over seeds of: BP; AugLocal d=4, light, K = 2; AugLocal d=4, paper, K = 4; " in text
    assert "- Worse than backpropagation: DGL, *K* = 16; DGL, *K* = 4.\n" in text
    assert "- Equal to backpropagation within 1 point: AugLocal d=4, light, *K* = 2; " in text
    assert "not yet trained" not in text and "`python docs/results.py`" in text
    assert shown(text, page) == {f"study_{name}.png" for name in ("accuracy", "cka", "cka_maps", "probes")}
    assert text == f"before\n{program.BEGIN}\n{program.section(file, page)}\n{program.END}after\n"


def cut_of(run):
    count = run.modules or {"bp": 1, "auglocal": 17 - (run.depth or 0)}.get(run.rule, 16)
    return {"depth": run.depth, "modules": run.modules, "auxiliary": run.auxiliary, "count": count}


def shown(text, page):
    """The pictures on the page, which are there."""
    paths = [page.parent / part.partition(")")[0] for part in text.split("](")[1:]]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    return {path.name for path in paths}


def test_a_page_without_the_markers_is_left_as_it_is(program, place):
    file, page = place
    page.write_text("mine\n")
    with pytest.raises(ValueError, match="page.md must have the lines <!-- the study: .*put them around the section"):
        program.renew(*place)
    assert page.read_text() == "mine\n"
