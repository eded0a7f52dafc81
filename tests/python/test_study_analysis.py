"""The analysis of the study's models: what is analysed, what a line has, what is kept, what is made of the lines."""

import importlib
import json
from pathlib import Path

import numpy
import pytest
import torch
from study_lines import UNITS, line, record

from auglocal_ext import analysis, data, evaluate, models

SOURCE = "fake:120"


@pytest.fixture(scope="module")
def program():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parents[2] / "python")
        patch.setattr(models, "create", lambda name, classes: models.CifarResNet(1, classes))
        yield importlib.import_module("study_analysis")


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def analysed(program, tmp_path_factory):
    """(the study's file, the folder of models, the models by seed, the exit status). Backpropagation of three seeds, of
    which the last has another model's record."""
    place = tmp_path_factory.mktemp("study")
    file, folder, images = place / "study.jsonl", place / "models", data.load(SOURCE, 20)
    folder.mkdir()
    made, by_seed = [], {}
    for seed in range(3):
        torch.manual_seed(seed)
        by_seed[seed] = models.CifarResNet(1, 10)
        accuracy = evaluate(by_seed[seed], images.test)
        made.append(record("bp", accuracy if seed < 2 else accuracy + 0.1, seed=seed, precision="fp32"))
        torch.save(by_seed[seed].state_dict(), folder / f"{program.Run.of(made[-1]['settings']).slug}.pt")
    write(file, [*made, record("dgl", 0.5)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "BATCH", 10)
        patch.setattr(program, "IMAGES", 60)
        status = program.main([str(file), "--data", SOURCE, "--models", str(folder)])
    return file, folder, by_seed, status


def test_each_row_that_has_its_model_gets_a_line(program, analysed):
    file, _, by_seed, status = analysed
    first, second = program.read(file)
    assert status == 1 and [one["settings"]["seed"] for one in (first, second)] == [0, 1]  # seed 2 was left out
    images = data.load(SOURCE, 10)
    test, train = images.test.sample(60), images.train.sample(60)
    wanted = analysis.cka(by_seed[1], by_seed[0], test).matrix
    assert numpy.allclose(second["cka"], wanted, atol=2e-3) and second["units"] == UNITS
    assert numpy.allclose(first["cka"], wanted.T, atol=2e-3) and first["reference"] == "bp_seed1.pt"
    assert max(len(str(abs(value))) for row in second["cka"] for value in row) <= len("0.1234")
    assert second["probes"] == [accuracy for _, accuracy in analysis.probe(by_seed[1], train, test)]
    assert second["images"] == {"cka": 20, "train": 60, "test": 24}  # in whole batches of 10
    assert second["machine"]["torch"] == torch.__version__ and second["reference"] == "bp_seed0.pt"


def test_backpropagations_models_are_kept_in_half_precision(program, analysed):
    file, _, by_seed, _ = analysed
    for seed in (0, 1):
        kept = torch.load(program.kept_model(file, seed))
        for name, value in by_seed[seed].state_dict().items():
            assert kept[name].equal(value.half() if value.is_floating_point() else value)
    assert len(list(program.kept_model(file, 0).parent.iterdir())) == 2


def test_what_is_analysed_is_not_analysed_again(program, analysed, capsys, monkeypatch):
    file, folder, *_ = analysed
    before = program.analysis_file(file).read_bytes()
    (wrong,) = [path for path in folder.iterdir() if path.name.endswith("seed-2.pt")]
    assert program.main([str(file), "--data", SOURCE, "--models", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "3 of 4 rows have a model, 1 are not analysed yet" in printed
    assert f"LEFT OUT: {wrong} has an accuracy of" in printed and "one that has not ended" in printed
    monkeypatch.setattr(data, "load", None)  # nothing is read where nothing is missing
    assert program.main([str(file), "--data", SOURCE, "--models", str(folder / "none")]) == 0
    assert program.analysis_file(file).read_bytes() == before


def test_no_model_is_compared_with_backpropagation_of_its_own_seed(program):
    assert [program.reference_seed(seed) for seed in range(4)] == [1, 0, 0, 0]


def test_without_a_reference_a_row_waits(program, tmp_path, capsys):
    """Which is no failure; backpropagation of seed 0 waits for seed 1 too, and is kept meanwhile."""
    file, images, made = tmp_path / "study.jsonl", data.load(SOURCE, 20), []
    torch.manual_seed(0)
    model = models.CifarResNet(1, 10)
    accuracy = evaluate(model, images.test)
    made = [record(rule, accuracy, precision="fp32") for rule in ("bp", "dgl")]
    write(file, made)
    for one in made:
        torch.save(model.state_dict(), tmp_path / f"{program.Run.of(one['settings']).slug}.pt")
    assert program.main([str(file), "--data", SOURCE, "--models", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("waits for backpropagation of seed 1, with whose model it is compared") == 2
    assert program.kept_model(file, 0).exists() and not program.analysis_file(file).exists()


def test_the_table_and_the_pictures(program, tmp_path, capsys):
    file = tmp_path / "study.jsonl"
    lines = [line("bp", [0.7, 0.8, 0.9, 1.0], seed=2), line("dgl", [0.5, 0.6, 0.7, 0.8], (0.3, 0.4, 0.45, 0.5), 16)]
    lines += [line("bp", [0.9, 0.8, 0.7, 0.6]), line("bp", [0.9, 0.8, 0.7, 0.6], (0.5, 0.4, 0.5, 0.7), seed=1)]
    lines += [line("auglocal", [0.4] * 4, count=4, depth=4, modules=4, auxiliary="light")]
    write(program.analysis_file(file), lines)
    assert program.main([str(file)]) == 0
    printed = capsys.readouterr().out
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in printed.splitlines() if row.startswith("|")]
    assert cells[2:] == [
        ["BP", "0.80", "0.80", "0.80", "30.0", "50.0", "70.0", "3"],  # seeds 0 and 1: one pair, two models
        ["AugLocal d=4, light, K = 4", "0.40", "0.40", "0.40", "20.0", "50.0", "70.0", "1"],
        ["DGL, K = 16", "0.55", "0.70", "0.80", "30.0", "45.0", "50.0", "1"],
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in program.pictures(file))
    assert program.by_stage(range(16)) == [2.5, 8, 13]  # ResNet-32's stem and first stage, its second, its third


def test_mistakes_are_told_in_one_sentence(program, tmp_path, capsys):
    file = str(tmp_path / "study.jsonl")
    for given in (["--data", "digits"], ["--models", "x"]):
        with pytest.raises(SystemExit):
            program.main([file, *given])
        assert capsys.readouterr().err.startswith("study_analysis: error: --data and --models go together")
    assert program.main([file]) == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err.startswith(f"study_analysis: error: no lines in {tmp_path}")


def test_another_files_lines_are_no_analysis(program, tmp_path, capsys):
    write(program.analysis_file(tmp_path / "study.jsonl"), [record("bp", 0.5)])
    assert program.main([str(tmp_path / "study.jsonl")]) == 2
    assert "line 1, is not a record of an analysis" in capsys.readouterr().err
