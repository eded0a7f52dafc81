"""--freeze and --freeze-norms, and --weights that begin a fine-tuning."""

import json
import urllib.error

import pytest
import torch

from auglocal_ext import models
from auglocal_ext.cli import weights
from auglocal_ext.cli.freeze import freeze
from auglocal_ext.cli.program import main

SMALL = ["--data", "fake:40", "--image-size", "8", "--batch-size", "16", "--depth", "2", "--quiet", "--epochs", "1"]
PARTS = ["conv1", "bn1", "layer1"]


def test_parts_are_frozen_by_name():
    model = models.CifarResNet(1)
    freeze(model, ["layer1", "fc.bias"], False, "resnet8")
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [name for name, _ in model.named_parameters() if name.startswith("layer1.") or name == "fc.bias"]
    assert all(module.training for module in model.modules())
    freeze(model, ["layer2"], True, "resnet8")
    evaluating = [name for name, module in model.named_modules() if not module.training]
    assert evaluating == ["layer2.0.bn1", "layer2.0.bn2", "layer2.0.downsample.1"]


def test_a_refused_name_freezes_nothing():
    model = models.CifarResNet(1)
    with pytest.raises(
        ValueError, match="--freeze layer is no part of resnet8 that has parameters: give names such as"
    ):
        freeze(model, ["conv1", "layer"], True, "resnet8")
    assert all(p.requires_grad for p in model.parameters())


def test_a_run_with_frozen_parts_goes_on(tmp_path):
    torch.manual_seed(3)
    begun = models.resnet20()
    torch.save(begun.state_dict(), tmp_path / "w.pt")
    options = ["--weights", str(tmp_path / "w.pt"), "--freeze", *PARTS, "--freeze-norms"]
    assert main(["train", *SMALL, *options, "--runs", str(tmp_path), "--name", "x"]) == 0
    saved = json.loads((tmp_path / "x" / "settings.json").read_text())["options"]
    assert saved["freeze"] == PARTS and saved["freeze_norms"] is True
    history = json.loads((tmp_path / "x" / "history.json").read_text())
    assert len(history[0]["module_losses"]) == 5 and None not in history[0]["module_losses"]  # layer2.0 is the first
    assert main(["resume", str(tmp_path / "x"), "--quiet", "--epochs", "2"]) == 0
    trained = torch.load(tmp_path / "x" / "model.pt")
    for name, value in begun.state_dict().items():
        assert torch.equal(trained[name], value) == name.startswith(("conv1.", "bn1.", "layer1.")), name


def test_a_run_is_planned_as_it_is_frozen(capsys):
    plain = ["plan", "--model", "resnet20", "--image-size", "8", "--batch-size", "16", "--depth", "2"]
    assert main([*plain, "--freeze", *PARTS, "--freeze-norms"]) == 0
    assert "frozen: 14,480 of 272,474 parameters" in capsys.readouterr().out
    assert main(plain) == 0
    assert "frozen" not in capsys.readouterr().out


# ---- weights -------------------------------------------------------------------------------------------------


def test_a_classifier_of_another_width_begins_fresh(tmp_path):
    torch.manual_seed(1)
    model, given = models.resnet20(10), models.resnet20(7)
    fresh = model.fc.weight.clone()
    torch.save(given.state_dict(), tmp_path / "w.pt")
    said = weights.begin_with(model, tmp_path / "w.pt", "resnet20", 10)
    assert said == f"the classifier has 10 classes, that of --weights {tmp_path / 'w.pt'} 7: it begins fresh"
    assert torch.equal(model.fc.weight, fresh) and torch.equal(model.conv1.weight, given.conv1.weight)
    torch.save(models.resnet20(10).state_dict(), tmp_path / "w.pt")
    assert weights.begin_with(model, tmp_path / "w.pt", "resnet20", 10) is None
    assert not torch.equal(model.fc.weight, fresh)


def test_what_does_not_fit_is_told_by_name_and_nothing_is_loaded(tmp_path):
    model, state = models.resnet20(10), models.resnet20(7).state_dict()
    before = model.conv1.weight.clone()
    state["other"], state["conv1.weight"] = state.pop("bn1.bias"), torch.zeros(16, 1, 3, 3)
    torch.save(state, tmp_path / "w.pt")
    expected = (
        r"does not fit resnet20 with 10 classes: conv1.weight is \(16, 1, 3, 3\), expected \(16, 3, 3, 3\), "
        "bn1.bias is not there, other is no part of it; give weights of this very model"
    )
    with pytest.raises(ValueError, match=expected):
        weights.begin_with(model, tmp_path / "w.pt", "resnet20", 10)
    assert torch.equal(model.conv1.weight, before)


@pytest.mark.parametrize("name", ["DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.DEFAULT"])
def test_weights_of_torchvision(torchvision, monkeypatch, name):
    torch.manual_seed(0)
    given = torchvision.models.resnet18()
    fetched = []

    def get_state_dict(self, **options):
        fetched.append((str(self), options["check_hash"]))
        return given.state_dict()

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", get_state_dict)
    weights.check_weights(name, "resnet18")
    model = torchvision.models.resnet18(num_classes=10)
    said = weights.begin_with(model, name, "resnet18", 10)
    assert fetched == [("ResNet18_Weights.IMAGENET1K_V1", True)]
    assert said == f"the classifier has 10 classes, that of --weights {name} 1000: it begins fresh"
    assert torch.equal(model.layer4[1].conv2.weight, given.layer4[1].conv2.weight)


def test_weights_that_cannot_be_fetched(torchvision, monkeypatch):
    def get_state_dict(self, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", get_state_dict)
    expected = (
        "--weights DEFAULT cannot be fetched .*no route to host.*: give a file with a state_dict where there is no"
    )
    with pytest.raises(ValueError, match=expected):
        weights.begin_with(torchvision.models.resnet18(), "DEFAULT", "resnet18", 1000)


def test_models_that_torchvision_has_no_weights_of():
    with pytest.raises(ValueError, match="--weights DEFAULT is no file: give a state_dict that torch.save wrote$"):
        weights.check_weights("DEFAULT", "resnet20")
