"""The options of a training: what stands above what, what goes together, and what they make of it."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from auglocal_ext import data, models
from auglocal_ext.cli import job
from auglocal_ext.cli.options import Parser
from auglocal_ext.cli.presets import DEFAULTS, PRESETS
from auglocal_ext.cli.program import main
from auglocal_ext.cli.training_options import add_run, settled, told
from auglocal_ext.optim import cosine, step

pytestmark = pytest.mark.usefixtures("nothing_compared")
BEGUN = ["train", "--data", "fake:20", "--epochs", "1", "--rule", "bp", "--quiet", "--name", "x", "--runs"]


def options(*typed):
    parser = Parser("auglocal")
    add_run(parser)
    return settled(vars(parser.parse_args(typed)), add_run)


def test_every_option_has_its_default():
    assert vars(options()) == DEFAULTS | {"lr": 0.1, "device": options().device}
    for preset in PRESETS.values():
        assert preset.keys() <= DEFAULTS.keys()


def test_what_is_typed_stands_above_a_file_above_a_preset(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"preset": "svhn", "batch-size": 256, "depth": "auto", "quiet": True, "wd": 0.01}))
    found = options("--config", str(path), "--batch-size", "64", "--budget", "6GB")
    assert (found.batch_size, found.depth, found.quiet, found.weight_decay) == (64, "auto", True, 0.01)
    assert (found.model, found.epochs, found.data, found.preset) == ("resnet32", 400, "svhn:data", "svhn")
    assert found.lr == 0.05 and "config" not in found
    assert options("--config", str(path), "--preset", "stl10", "--budget", "1GB").data == "stl10:data"
    path.write_text(json.dumps({"epochs": None, "recompute": False, "preset": "cifar10"}))
    assert options("--config", str(path)).epochs == DEFAULTS["epochs"]  # null: as without it


def test_the_settings_of_a_run_are_a_config(tmp_path):
    assert (
        main(
            [
                *[
                    "train",
                    "--data",
                    "fake:20",
                    "--epochs",
                    "1",
                    "--rule",
                    "bp",
                    "--quiet",
                    "--opt",
                    "adamw",
                    "--name",
                    "x",
                    "--runs",
                ],
                str(tmp_path),
            ]
        )
        == 0
    )
    found = options("--config", str(tmp_path / "x" / "settings.json"), "--epochs", "2")
    assert (found.rule, found.optimizer, found.lr, found.epochs) == ("bp", "adamw", 1e-3, 2)
    assert found.name is None and found.runs == DEFAULTS["runs"]  # the new run's own


def test_other_names_of_options():
    typed = "--opt rmsprop --wd 0.1 --lr-scheduler step --lr-warmup-epochs 2 -j 3 -b 32"
    found = options(*typed.split())
    assert (found.optimizer, found.weight_decay, found.schedule, found.warmup) == ("rmsprop", 0.1, "step", 2)
    assert (found.workers, found.batch_size, found.lr) == (3, 32, 0.01)


@pytest.mark.parametrize(
    ("typed", "lr"),
    [("", 0.1), ("-b 256", 0.2), ("--preset imagenet --data x", 0.4), ("--opt adam -b 512", 1e-3), ("--lr 0", 0.0)],
)
def test_learning_rate(typed, lr):
    assert options(*typed.split()).lr == lr


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            "--momentum 0.9 --opt adamw",
            "--momentum goes with --optimizer sgd or rmsprop, given --optimizer adamw: leave",
        ),
        (
            "--schedule paper --warmup 3",
            "--warmup does not go with --schedule paper, which has its own, given 3: leave",
        ),
        ("--schedule paper --lr 0", "--lr must be above 0 with --schedule paper, given 0: choose another"),
        ("--warmup 9 --epochs 5", "--warmup must be at most --epochs, 5, given 9"),
        ("--preset imagenet", "--data must be given with --preset imagenet, for instance --data imagefolder:ROOT"),
        ("--config /nowhere", "--config /nowhere cannot be read: .*No such file.*; expected a JSON object of options"),
        ("--weights /nowhere", "--weights /nowhere is no file: give a state_dict that torch.save wrote"),
        ("--mixup -1", "--mixup must be at least 0, given -1.0"),
        ("--cutmix-alpha nan", "--cutmix must be a finite number, at least 0, given nan"),
        (
            "--model resnet18 --weights IMAGENET1K_V3",
            "--weights IMAGENET1K_V3 is no file: give a state_dict that torch.save wrote, or one of torchvision's for "
            "resnet18, IMAGENET1K_V1, DEFAULT$",
        ),
        (
            "--freeze layer4",
            "--freeze layer4 is no part of resnet20 that has parameters: give names such as conv1, bn1",
        ),
        ("--freeze conv", "--freeze conv is no part of resnet20"),
        (
            "--freeze conv1 bn1 layer1 layer2 layer3 fc",
            "--freeze conv1 bn1 .* fc leaves nothing of resnet20 to train: leave out what is to learn",
        ),
        ("--freeze-norms", "--freeze-norms goes with --freeze, whose BatchNorms it is about: give --freeze too"),
        (
            "--freeze conv1 bn1 layer1 --modules 8",
            "--modules must be a whole number from 1 to 6, the units of this network from layer2.0 on, all",
        ),
        ("--label-smoothing 1", "--label-smoothing must be at least 0 and below 1, given 1.0"),
        ("--val-split -0.1", "--val-split must be at least 0 and below 1, given -0.1"),
        ("-b 1", "--batch-size must be at least 2, given 1"),
        ("--wd=-1", "--weight-decay must be at least 0, given -1.0"),
        ("--accumulate 0", "--accumulate must be at least 1, given 0"),
        ("--clip-grad-norm 0", "--clip-grad-norm must be above 0, given 0.0"),
        ("--clip-grad-value -1", "--clip-grad-value must be above 0, given -1.0"),
        ("--model-ema-decay 0.9", "--model-ema-decay goes with --model-ema, given 0.9 alone: give both, or neither"),
        ("--model-ema-decay 1", "--model-ema-decay must be at least 0 and below 1, given 1.0"),
        (
            "--clip global --clip-grad-norm 1",
            "--clip global needs --accumulate 2 or more: with --accumulate 1 a module's gradients are gone before the "
            "next one's exist; give that, or leave --clip at 'module'",
        ),
        (
            "--clip global",
            "--clip global is how --clip-grad-norm is meant: give --clip-grad-norm too, for instance --c",
        ),
        ("--max-seconds 0", "--max-seconds must be above 0, given 0.0"),
        ("--patience 0", "--patience must be at least 1, given 0"),
        ("--opt lion", "argument --optimizer/--opt: invalid choice: 'lion'"),
    ],
)
def test_mistakes(typed, message, capsys, tmp_path):
    refused(["train", *typed.split(), "--runs", str(tmp_path / "runs")], message, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "--config .* must be a JSON object of options, given a list"),
        ("{", "--config .* cannot be read: .*; expected a JSON object"),
        ('{"learning_rate": 1}', ".*: learning_rate is no option of a training: see `auglocal train --help`"),
        ('{"learning_rate": null}', ".*: learning_rate is no option of a training"),
        ('{"help": true}', ".*: help is no option of a training"),
        ('{"config": "x"}', ".*: config is no option of a training"),
        ('{"lr": -1}', ".*config.json: --lr must be at least 0, given -1.0"),
        ('{"lr": [1]}', r".*config.json: lr must be a number or a text, given \[1\]"),
        ('{"freeze": [1]}', r".*config.json: freeze must be a number or a text, given \[1\]"),
        ('{"lr": false}', ".*config.json: lr must be a number or a text, given false"),
        ('{"quiet": 3}', ".*config.json: argument --quiet: ignored explicit argument '3'"),
        ('{"optimizer": "lion"}', ".*config.json: argument --optimizer/--opt: invalid choice: 'lion'"),
    ],
)
def test_a_config_is_checked_as_what_is_typed(text, message, capsys, tmp_path):
    (tmp_path / "config.json").write_text(text)
    refused(["train", "--config", str(tmp_path / "config.json"), "--runs", str(tmp_path / "runs")], message, capsys)
    assert not (tmp_path / "runs").exists()


def refused(arguments, message, capsys):
    __tracebackhide__ = True
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and not captured.out
    assert re.match(f"auglocal: error: {message}", captured.err), captured.err


@pytest.fixture
def asked(monkeypatch):
    """What the data and the training were asked for; nothing is trained."""
    asked, real = SimpleNamespace(), data.load

    def load(source, batch_size, **options):
        asked.source, asked.batch_size, asked.reading = source, batch_size, options
        made = real("fake:20", 16)
        return SimpleNamespace(**vars(made) | {"val": "the validation images"}) if options["val_split"] else made

    def train(model, loader, depth, **options):
        asked.model, asked.loader, asked.training = model, loader, options
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(job, "train", train)
    return asked


def test_what_the_library_is_asked_for(asked, tmp_path):
    typed = "--opt sgd --lr 0.2 --momentum 0 --wd 0.5 --schedule step --warmup 2 --label-smoothing 0.1 --val-split 0.2 "
    typed += (
        "--image-size 48 --max-seconds 60 --patience 3 --nonfinite skip --checkpoint-minutes 5 --preset svhn --seed 7"
    )
    assert main(["train", *typed.split(), "--quiet", "--runs", str(tmp_path)]) == 130
    asking = asked.training
    (group,) = asking["optimizer"]([torch.zeros(1, requires_grad=True)]).param_groups
    assert [group[name] for name in ("lr", "momentum", "nesterov", "weight_decay")] == [0.2, 0, False, 0.5]
    assert asking["schedule"](1, 9) == step(1, 9, 2) and asking["criterion"].label_smoothing == 0.1
    wanted = {"max_seconds": 60, "patience": 3, "nonfinite": "skip", "checkpoint_minutes": 5, "epochs": 400}
    assert {name: asking[name] for name in wanted} == wanted and asking["val_loader"] == "the validation images"
    reading = {"image_size": 48, "val_split": 0.2, "augmentation": data.AUGMENTATIONS["svhn"]}
    assert {name: asked.reading[name] for name in reading} == reading and asked.source == "svhn:data"


@pytest.mark.parametrize("names", [("--mixup", "--cutmix"), ("--mixup-alpha", "--cutmix-alpha")])
def test_mixed_batches_are_asked_for(asked, tmp_path, torchvision, names):
    for typed, kinds in (([0.2, 0], ["MixUp"]), ([0, 1], ["CutMix"]), ([0.2, 1], ["MixUp", "CutMix"]), ([0, 0], [])):
        options = [word for name, alpha in zip(names, typed, strict=True) for word in (name, str(alpha))]
        assert main(["train", *options, "--quiet", "--runs", str(tmp_path)]) == 130
        _, labels = next(iter(asked.loader))
        assert labels.shape == ((16, 10) if kinds else (16,))
        mix = getattr(asked.loader, "_mix", None)
        assert [type(one).__name__ for one in getattr(mix, "transforms", [mix] if mix else [])] == kinds


def test_what_steps_and_decays_the_library_is_asked_for(asked, tmp_path):
    typed = "--grad-accum-steps 4 --clip-grad-norm 0.5 --clip-grad-value 2 --clip global --model-ema --wd 0.5 "
    typed += "--model-ema-decay 0.99 --norm-weight-decay 0 --bias-weight-decay 0.1 -b 32"
    assert main(["train", *typed.split(), "--quiet", "--runs", str(tmp_path)]) == 130
    wanted = {"accumulate": 4, "clip_norm": 0.5, "clip_value": 2, "clip": "global", "ema": 0.99}
    assert {name: asked.training[name] for name in wanted} == wanted
    named = [(name, p) for name, p in models.resnet20().named_parameters() if name.startswith(("bn1", "fc"))]
    groups = asked.training["optimizer"](named).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.5, 1), (0, 1), (0.1, 2)]
    assert groups[0]["lr"] == 0.1  # of 4 x 32 images
    main(["train", "--quiet", "--model-ema", "--runs", str(tmp_path)])
    assert asked.training["ema"] == 0.999 and asked.training["accumulate"] == 1
    main(["train", "--quiet", "--runs", str(tmp_path)])
    assert asked.training["ema"] is None


def test_the_papers_schedule_from_a_hundred_epochs_on(asked, tmp_path):
    for epochs, first in ((400, pytest.approx(0.01 / 0.8)), (99, cosine(0, 99))):
        main(["train", "--preset", "cifar10", "--quiet", "--epochs", str(epochs), "--runs", str(tmp_path)])
        assert asked.training["schedule"](0, epochs) == first


def test_weights_to_begin_with(asked, tmp_path, capsys):
    path, run = (
        tmp_path / "w.pt",
        ["train", "--quiet", "--runs", str(tmp_path / "runs"), "--weights", str(tmp_path / "w.pt")],
    )
    torch.manual_seed(1)
    given = models.resnet20()
    for kept in (given.state_dict(), {"model": given.state_dict(), "epoch": 3}, {"state_dict": given.state_dict()}):
        torch.save(kept, path)
        assert main(run) == 130
        assert torch.equal(asked.model.fc.weight, given.fc.weight)
    capsys.readouterr()
    torch.save(models.resnet32(10).state_dict(), path)
    refused(run, "--weights .* does not fit resnet20 with 10 classes: layer1.3.conv1.weight is no part of it, ", capsys)
    changed = given.state_dict() | {"conv1.weight": torch.zeros(16, 1, 3, 3), "fc.weight": torch.zeros(10, 8)}
    torch.save(changed, path)
    message = (
        r"--weights .* does not fit resnet20 with 10 classes: conv1.weight is \(16, 1, 3, 3\), expected "
        r"\(16, 3, 3, 3\), fc.weight is \(10, 8\), expected \(10, 64\); give"
    )
    refused(run, message, capsys)
    torch.save({"a": 1}, path)
    refused(
        run, "--weights .* has no state_dict, expected a dict of tensors, or one under 'model' or 'state_dict'", capsys
    )
    torch.save({"a": SimpleNamespace()}, path)
    refused(run, "--weights .* cannot be read as weights \\(UnpicklingError\\): expected what torch.save", capsys)
    assert not (tmp_path / "runs").exists()


def test_the_settings_in_a_few_lines():
    found = told(options("--depth", "3", "--label-smoothing", "0.1", "--recompute", "--device", "cpu"))
    assert found.splitlines() == [
        "resnet20 on digits, rule auglocal, depth 3, fp32 on cpu, seed 0",
        "15 epochs in batches of 128, sgd with lr 0.1, schedule cosine",
        "recompute on, label smoothing 0.1",
    ]
    first, *_, last = told(options("--budget", "1GB", "--device", "cpu")).splitlines()
    assert (
        first.startswith("resnet20 on digits, rule auglocal, bp or checkpoint, as the search finds, depth ")
        and last == "budget 1GB"
    )


def test_resume_refuses_what_would_be_another_training(tmp_path, capsys):
    assert main([*BEGUN, str(tmp_path)]) == 0
    capsys.readouterr()
    folder, settings = str(tmp_path / "x"), (tmp_path / "x" / "settings.json").read_text()
    for command in (["resume", folder], ["train", "--resume", folder]):
        refused(
            [*command, "--lr", "0.2"], "--lr is 0.1 in this run, given 0.2: leave it out, or begin a new run", capsys
        )
        refused([*command, "--modules", "1"], "--modules is not set in this run, given 1: leave it out, or", capsys)
        refused([*command, "--recompute"], "--recompute is off in this run, given on: leave it out, or", capsys)
        refused([*command, "--config", "x"], "--config is not set in this run, given x: leave it out, or", capsys)
    assert (tmp_path / "x" / "settings.json").read_text() == settings
    again = ["--lr", "0.1", "--rule", "bp", "--quiet", "--workers", "1", "--epochs"]
    assert main(["train", "--resume", folder, *again, "2"]) == 0 == main(["resume", folder, *again, "3"])
    assert len(json.loads((tmp_path / "x" / "history.json").read_text())) == 3
    assert json.loads((tmp_path / "x" / "settings.json").read_text())["options"]["workers"] == 1
