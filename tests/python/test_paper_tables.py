"""The paper's tables from made-up records, and what --run would train, in which order and for how long."""

import importlib
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

SETTINGS = {
    "dataset": "cifar10",
    "data": "imagefolder:DATA",
    "model": "resnet32",
    "rule": "bp",
    "depth": None,
    "modules": None,
    "form": None,
    "epochs": 5,
    "batch_size": 128,
    "lr": 0.1,
    "precision": "fp32",
    "seed": 0,
    "train_images": 5000,
    "test_images": 1000,
}
RUN = ["--run", "--data", "imagefolder:DATA", "--epochs", "5", "--batch-size", "128", "--device", "cpu"]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "python")
    return importlib.import_module("paper_tables")


def record(accuracy, seconds=100.0, macs=1.0, peak=1e9, local_modules=1, top5=None, device="a CPU", **settings):
    made = {
        "settings": SETTINGS | settings,
        "machine": {"device": device},
        "local_modules": local_modules,
        "macs_per_bp": macs,
        "accuracy": {"last": accuracy, "best": 1.0},
        "seconds": seconds,
        "peak_bytes": int(peak),
        "history": [],
    }
    return made | ({"top5": {"last": top5, "best": 1.0}} if top5 else {})


def shown(tables, tmp_path, capsys, made):
    """What the program prints of some records: its headings, and {first cells: cells} of each block's tables."""
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in made))
    assert tables.main([str(path)]) == 0
    printed = capsys.readouterr().out
    blocks = []
    for text in printed.split("## ")[1:]:
        parsed = {}
        for title in ("Accuracy", "Peak memory", "All runs"):
            part = text.split(f"\n{title}")
            lines = part[1].split("\n\n")[1].splitlines() if len(part) > 1 else []
            assert len({len(line) for line in lines}) <= 1  # aligned
            parsed[title] = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        blocks.append((text.splitlines()[0], text.splitlines()[2], parsed))
    return blocks


def test_accuracy_over_seeds_beside_the_papers(tables, tmp_path, capsys):
    made = [
        record(0.80),
        record(0.10, seed=1),  # run again below: the later one counts
        record(0.82, seed=1),
        record(0.84, seed=2),
        record(0.79, rule="auglocal", depth=4),
        record(0.77, rule="auglocal", depth=4, seed=1),
        record(0.99, rule="auglocal", depth=4, recompute=True),
        record(0.70, rule="dgl"),
    ]
    ((title, about, parsed),) = shown(tables, tmp_path, capsys, made)
    assert title == "resnet32 on cifar10"
    assert "epochs 5, batch_size 128, lr 0.1, precision fp32, train_images 5000, test_images 1000" in about
    assert "device a CPU" in about
    rows = {row[0]: row[1:] for row in parsed["Accuracy"]}
    assert rows["method"] == ["paper", "ours", "seeds", "paper's gap", "our gap"]
    assert rows["BP"] == ["93.73 ± 0.04", "82.00 ± 2.00", "3", "", ""]
    assert rows["AugLocal d=4"] == ["93.08 ± 0.10", "78.00 ± 1.41", "2", "-0.65", "-4.00"]
    assert rows["DGL"] == ["86.30 ± 0.12", "70.00", "1", "-7.43", "-12.00"]
    assert rows["AugLocal d=6"] == ["93.47 ± 0.09", "", "", "-0.26", ""]
    methods = ["BP", "PredSim", "InfoPro", "DGL", *(f"AugLocal d={d}" for d in range(2, 7))]
    assert [row[0] for row in parsed["Accuracy"][2:]] == methods


def test_memory_beside_the_papers(tables, tmp_path, capsys):
    def rows(batch_size):
        common = {"model": "resnet110", "batch_size": batch_size}
        made = [
            record(0.8, peak=2e9, **common),
            record(0.8, peak=0.5e9, rule="checkpoint", **common),
            record(0.8, peak=0.25e9, rule="auglocal", depth=2, **common),
            record(0.8, peak=0.3e9, rule="auglocal", depth=2, seed=1, **common),
            record(0.8, peak=0.5e9, rule="auglocal", depth=4, **common),
        ]
        ((_, _, parsed),) = shown(tables, tmp_path, capsys, made)
        return parsed["Peak memory"][2:]

    expected = [
        ["BP", "9.27", "", "2.000", ""],
        ["GC", "3.03", "-67.3 %", "0.500", "-75.0 %"],
        ["AugLocal", "1.72", "-81.4 %", "", ""],
        ["AugLocal d=2", "", "", "0.300", "-85.0 %"],
        ["AugLocal d=4", "", "", "0.500", "-75.0 %"],
    ]
    assert rows(1024) == expected
    # The paper's bytes are of its batch; its shares stand for any.
    assert rows(128) == [[method, "", *rest] for method, _, *rest in expected]


def test_every_cut_that_was_run(tables, tmp_path, capsys):
    cut = {"rule": "auglocal", "depth": 4}
    made = [
        record(0.7, 250, 2.67, 74e6, 13, **cut),
        record(0.6, 150, 1.1, 90e6, 2, rule="auglocal", depth=2, modules=2),
        record(0.8, 100, 1.0, 171e6, 1),
        record(0.5, 80, 1.2, 80e6, 4, **cut, recompute=True),
        record(0.4, 70, 1.3, 70e6, 3, **cut, budget="70MB"),
    ]
    ((_, _, parsed),) = shown(tables, tmp_path, capsys, made)
    assert parsed["All runs"][0] == ["method", "cut", "modules", "accuracy, %", "seeds", "MACs / BP", "seconds", "peak"]
    assert parsed["All runs"][2:] == [
        ["BP", "", "1", "80.00", "1", "1.00", "100.0", "171 MB"],
        ["AugLocal d=2", "K=2", "2", "60.00", "1", "1.10", "150.0", "90 MB"],
        ["AugLocal d=4", "one per unit", "13", "70.00", "1", "2.67", "250.0", "74 MB"],
        ["AugLocal d=4", "budget 70MB", "3", "40.00", "1", "1.30", "70.0", "70 MB"],
        ["AugLocal d=4", "one per unit, recompute", "4", "50.00", "1", "1.20", "80.0", "80 MB"],
    ]
    # Only a cut into K: the paper's row of that depth stays empty.
    assert ["AugLocal d=2", "91.12 ± 0.24", "", "", "-2.61", ""] in parsed["Accuracy"]


def test_runs_of_other_settings_are_kept_apart(tables, tmp_path, capsys):
    made = [record(0.8), record(0.6, epochs=10), record(0.5, device="a GPU"), record(0.4, lr=0.2), record(0.7, seed=1)]
    blocks = shown(tables, tmp_path, capsys, made)
    assert [parsed["Accuracy"][2][2:4] for _, _, parsed in blocks] == [
        ["75.00 ± 7.07", "2"],
        ["60.00", "1"],
        ["50.00", "1"],
        ["40.00", "1"],
    ]
    assert "epochs 10" in blocks[1][1] and "device a GPU" in blocks[2][1] and "lr 0.2" in blocks[3][1]


def test_imagenet_has_top1_and_top5(tables, tmp_path, capsys):
    common = {"dataset": "imagenet", "model": "vgg13_bn"}
    made = [
        record(0.71, top5=0.9, **common),
        record(0.70, top5=0.89, rule="auglocal", depth=5, **common),
        record(0.69, rule="auglocal", depth=3, **common),
    ]
    ((title, _, parsed),) = shown(tables, tmp_path, capsys, made)
    assert title == "vgg13_bn on imagenet" and not parsed["Peak memory"]
    header = ["method", "paper top-1", "our top-1", "paper top-5", "our top-5", "seeds", "paper's gap", "our gap"]
    assert parsed["Accuracy"][0] == header
    assert parsed["Accuracy"][2:] == [
        ["BP", "71.59", "71.00", "90.37", "90.00", "1", "", ""],
        ["DGL", "67.32", "", "87.81", "", "", "-4.27", ""],
        ["AugLocal", "70.92", "", "90.13", "", "", "-0.67", ""],
        ["AugLocal d=3", "", "69.00", "", "", "1", "", "-2.00"],
        ["AugLocal d=5", "", "70.00", "", "89.00", "1", "", "-1.00"],
    ]


def test_a_network_that_the_paper_has_not(tables, tmp_path, capsys):
    ((_, _, parsed),) = shown(tables, tmp_path, capsys, [record(0.5, model="resnet20")])
    assert parsed["Accuracy"][2] == ["BP", "", "50.00", "1", "", ""] and not parsed["Peak memory"]


# ---- --run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def programs(tables, monkeypatch):
    """Training programs that take no time of anyone's: a clock that they move, and the record that they would leave.

    seconds: of each; start: seconds before it looks at the time; fail: the rules whose program fails; ran: the
    commands; left: checkpoint -> seconds that are left to do.
    """
    state = SimpleNamespace(now=0.0, left={}, ran=[], fail=(), mute=(), seconds=10.0, start=0.0)

    def run(command, timeout, **options):
        given = dict(zip(command[2:-1:2], command[3:-1:2], strict=True))
        state.ran.append(command)
        rule, depth = given["--rule"], int(given["--depth"]) if "--depth" in given else None
        if rule in state.fail:
            return SimpleNamespace(returncode=2, stdout="train_cifar: error: no such rule\n")
        checkpoint, limit = Path(given["--checkpoint"]), float(given["--max-seconds"])
        left = state.left.get(checkpoint, state.seconds)
        state.now += state.start + min(left, limit)
        if state.start + min(left, limit) > timeout:
            raise subprocess.TimeoutExpired(command, timeout)
        if left > limit:
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / "last.pt").touch()
            state.left[checkpoint] = left - limit
            return SimpleNamespace(returncode=0, stdout="stopped after --max-seconds, no record")
        integers = {name: int(given["--" + name.replace("_", "-")]) for name in ("epochs", "batch_size", "seed")}
        modules = int(given["--modules"]) if "--modules" in given else None
        text = {name: given[f"--{name}"] for name in ("data", "model", "rule", "precision")}
        dataset = given.get("--dataset", "imagenet")
        made = record(0.5, state.seconds, device=tables.records.machine("cpu")["device"])
        made["settings"] |= {"dataset": dataset, "depth": depth, "modules": modules, **integers, **text}
        if rule not in state.mute:
            tables.records.append(given["--results"], made)
        return SimpleNamespace(returncode=0, stdout="")

    machine = tables.records.machine("cpu")
    monkeypatch.setattr(tables.records, "machine", lambda device: machine)  # which runs git
    monkeypatch.setattr(tables.subprocess, "run", run)
    monkeypatch.setattr(tables.time, "perf_counter", lambda: state.now)
    return state


def cuts(commands):
    found = []
    for command in commands:
        given = dict(zip(command[2:-1:2], command[3:-1:2], strict=True))
        found.append(tuple(given.get(name) for name in ("--rule", "--depth", "--modules", "--seed")))
    return found


def test_the_most_useful_runs_come_first(tables, programs, tmp_path, capsys):
    path = tmp_path / "of" / "results.jsonl"
    assert tables.main([str(path), *RUN, "--modules", "2", "16", "--seeds", "0", "1"]) == 0
    one_seed = [("bp", None), *(("auglocal", d) for d in "426"), ("dgl", None), ("predsim", None), ("infopro", None)]
    one_seed += [("checkpoint", None), ("auglocal", "3"), ("auglocal", "5")]
    one_seed = [(*cut, None) for cut in one_seed] + [("auglocal", "4", "2"), ("auglocal", "4", "16")]
    assert cuts(programs.ran) == [(*cut, seed) for seed in "01" for cut in one_seed]
    command = programs.ran[1]
    assert command[1].endswith("python/train_cifar.py") and " ".join(command[2:]) == (
        "--dataset cifar10 --data imagefolder:DATA --model resnet32 --rule auglocal --depth 4 --epochs 5 --batch-size "
        f"128 --precision fp32 --seed 0 --device cpu --results {path} --checkpoint {path}.partial/dataset-cifar10-"
        "model-resnet32-rule-auglocal-depth-4-epochs-5-batch_size-128-precision-fp32-seed-0 --max-seconds 590 --quiet"
    )
    printed = capsys.readouterr().out
    assert "24 runs, 0 of them there already" in printed
    assert "[2/24] resnet32 cifar10 AugLocal d=4 seed 0: 50.00%, 10.0 s, 1 GB" in printed
    assert "[11/24] resnet32 cifar10 AugLocal d=4 K=2 seed 0: 50.00%" in printed
    assert "## resnet32 on cifar10" in printed and "| 50.00 ± 0.00 |" in printed


def test_only_what_is_asked_for_and_missing_is_run(tables, programs, tmp_path, capsys):
    path, asked = tmp_path / "results.jsonl", [*RUN, "--rules", "bp", "auglocal", "--depths", "2", "6"]
    assert tables.main([str(path), *asked]) == 0
    assert cuts(programs.ran) == [("bp", None, None, "0"), ("auglocal", "2", None, "0"), ("auglocal", "6", None, "0")]
    programs.ran.clear()
    assert tables.main([str(path), *asked]) == 0
    assert not programs.ran and "3 runs, 3 of them there already" in capsys.readouterr().out
    for other in (["--epochs", "6"], ["--precision", "bf16"], ["--seeds", "7"], ["--data", "imagefolder:OTHER"]):
        assert tables.main([str(path), *asked, *other]) == 0
        assert len(programs.ran) == 3
        programs.ran.clear()


def test_another_devices_runs_and_other_cuts_do_not_count(tables, programs, tmp_path):
    path = tmp_path / "results.jsonl"
    here = tables.records.machine("cpu")["device"]
    smoothed = record(0.5, device=here, label_smoothing=0.1)
    for made in (record(0.5, device="a GPU"), record(0.5, device=here, recompute=True), smoothed):
        tables.records.append(path, made)
    assert tables.main([str(path), *RUN, "--rules", "bp"]) == 0
    assert cuts(programs.ran) == [("bp", None, None, "0")]


def test_imagenet_goes_to_its_own_program(tables, programs, tmp_path):
    asked = ["--datasets", "imagenet", "svhn", "--data", "ROOT", "svhn:DATA", "--networks", "resnet34", "--rules", "bp"]
    assert tables.main([str(tmp_path / "r.jsonl"), *RUN, *asked]) == 0
    first, second = programs.ran
    assert first[1].endswith("python/train_imagenet.py") and "--dataset" not in first and "ROOT" in first
    assert second[1].endswith("python/train_cifar.py") and second[second.index("--dataset") + 1] == "svhn"


def test_a_run_that_the_time_cuts_off_goes_on_from_its_checkpoint(tables, programs, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    programs.seconds = 100.0
    asked = [str(path), *RUN, "--rules", "bp", "dgl", "--minutes", "1"]
    assert tables.main(asked) == 1  # there is no table yet
    done = capsys.readouterr()
    assert "BP seed 0: stopped: the time is up; the same command goes on from here" in done.out
    assert "DGL seed 0: left out: the time is up" in done.out and "no records in" in done.err
    assert len(programs.ran) == 1 and tables.records.read(path) == []
    (kept,) = (tmp_path / "results.jsonl.partial").iterdir()
    settings = "dataset-cifar10-model-resnet32-rule-bp-epochs-5-batch_size-128-precision-fp32-seed-0"
    assert kept.name == settings and os.listdir(kept) == ["last.pt"]
    assert tables.main(asked) == 0  # 40 s are left to do, then 20 of another
    first, again = (dict(zip(command[2:-1:2], command[3:-1:2], strict=True)) for command in programs.ran[:2])
    assert first["--checkpoint"] == again["--checkpoint"] == str(kept)
    assert [command[-2] for command in programs.ran] == ["60", "60", "20"]  # --max-seconds
    assert [made["settings"]["rule"] for made in tables.records.read(path)] == ["bp"]
    assert not kept.exists() and len(os.listdir(kept.parent)) == 1  # the other one's
    assert tables.main([*asked[:-1], "2"]) == 0
    assert not kept.parent.exists() and len(tables.records.read(path)) == 2


def test_a_program_that_does_not_end_by_itself_is_ended(tables, programs, tmp_path, capsys):
    programs.start = 200.0  # before it looks at the time
    assert tables.main([str(tmp_path / "r.jsonl"), *RUN, "--rules", "bp", "--minutes", "1"]) == 1
    assert "BP seed 0: stopped: it did not end by itself in 120 s more; the same" in capsys.readouterr().out


def test_failures_are_shown_and_the_rest_goes_on(tables, programs, tmp_path, capsys):
    programs.fail, programs.mute = ("dgl",), ("predsim",)
    path = tmp_path / "results.jsonl"
    assert tables.main([str(path), *RUN, "--rules", "bp", "dgl", "predsim", "infopro"]) == 1
    printed = capsys.readouterr().out
    assert "DGL seed 0: FAILED (2)\ntrain_cifar: error: no such rule" in printed
    assert f"PredSim seed 0: FAILED: no record of these settings in {path}" in printed
    assert "InfoPro seed 0: 50.00%" in printed and "## resnet32 on cifar10" in printed
    assert len(tables.records.read(path)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "--data", "x"], "--run needs --epochs and --batch-size"),
        ([*RUN, "--datasets", "cifar10", "svhn"], "--data must name a source for each of --datasets cifar10 svhn"),
        ([*RUN, "--depths", "9"], "invalid choice: 9"),
    ],
)
def test_wrong_options(tables, tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        tables.main([str(tmp_path / "r.jsonl"), *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_files_without_records(tables, tmp_path, capsys):
    assert tables.main([str(tmp_path / "none.jsonl")]) == 1
    assert "no records in" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text("{}\nno json\n")
    assert tables.main([str(tmp_path / "bad.jsonl")]) == 2
    assert "bad.jsonl, line 2, is not a record" in capsys.readouterr().err
    assert tables.main([str(tmp_path / "bad.jsonl" / "x"), *RUN]) == 2
    assert "x cannot be written: File exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be a whole number of at least 1, given 0"),
        (["--batch-size", "1"], "--batch-size must be at least 2, given 1"),
        (["--minutes", "nan"], "--minutes must be a finite number, above 0, given nan"),
        (["--minutes", "-1"], "--minutes must be above 0, given -1.0"),
        (["--modules", "2", "0"], "--modules must be at least 1, given 0"),
        (["--seeds", "9" * 25], "--seeds must be at most"),
        (["--device", "mps"], "--device 'mps' cannot be used here"),
        (["--device", "gpu"], "--device 'gpu' cannot be used here"),
    ],
)
def test_wrong_values_are_told_before_anything_is_run(tables, programs, tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        tables.main([str(tmp_path / "r.jsonl"), *RUN, *arguments])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith(f"paper_tables: error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("network", ["resnet19", "raft_large"])
def test_networks_that_no_program_could_train(tables, programs, tmp_path, network, torchvision, capsys):
    assert tables.main([str(tmp_path / "r.jsonl"), *RUN, "--networks", "resnet20", network]) == 2
    assert capsys.readouterr().err.startswith("paper_tables: error: ") and not programs.ran


def test_a_run_that_diverged_is_shown_as_that(tables, programs, tmp_path, capsys, monkeypatch):
    diverged = SimpleNamespace(returncode=3, stdout="train_cifar: the loss is nan: training diverged\n")
    monkeypatch.setattr(tables.subprocess, "run", lambda *given, **options: diverged)
    assert tables.main([str(tmp_path / "r.jsonl"), *RUN, "--rules", "bp", "dgl"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("DIVERGED: no record\ntrain_cifar: the loss is nan: training diverged") == 2


def test_files_of_something_else(tables, tmp_path, capsys):
    for name, text in (("a.jsonl", '{"epochs": 3}\n'), ("b.jsonl", "[1, 2]\n")):
        (tmp_path / name).write_text(text)
        assert tables.main([str(tmp_path / name)]) == 2
        assert f"{name}, line 1, is not a record of a training" in capsys.readouterr().err


def test_without_a_file_those_of_trainings_are_read(tables, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"cka": []}\n')
    (tmp_path / "b.jsonl").write_text(json.dumps(record(0.8)) + "\n")
    (tmp_path / "c.jsonl").write_text("")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.main([]) == 0
    assert "| 80.00 |" in " ".join(capsys.readouterr().out.split())


def test_a_record_that_a_kill_cut_off_is_no_record(tables, tmp_path, capsys):
    whole = json.dumps(record(0.8)) + "\n"
    (tmp_path / "r.jsonl").write_text(whole + whole[:100])
    assert tables.main([str(tmp_path / "r.jsonl")]) == 0
    assert "| BP " in capsys.readouterr().out
