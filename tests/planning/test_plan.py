"""The plan: its numbers, its table, and that making it touches nothing."""

import numpy as np
import pytest
import torch

from auglocal_ext import LocalTrainer, models, plan


@pytest.mark.usefixtures("nothing_compared")
def test_numbers_agree_with_the_trainer():
    model = models.resnet32()
    planned = plan(model, (8, 3, 32, 32), depth=4)
    trainer = LocalTrainer(model, depth=4)
    result = trainer.step(torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.arange(8))
    assert trainer.plan == planned
    assert planned.parameters == sum(p.numel() for p in model.parameters())
    assert planned.aux_parameters == sum(p.numel() for p in trainer.aux_nets.parameters())
    for module, local in zip(planned.modules, trainer.local_modules, strict=True):
        assert module.parameters + module.aux_parameters == sum(p.numel() for p in local.parameters())
    assert len(planned.modules) == len(result.module_losses) == 13
    assert planned.modules[6].output_shape == (8, 32, 16, 16)
    assert planned.modules[0].aux_net == "layer1.4 (16, /1) layer2.4 (32, /2) layer3.4 (64, /2)"
    assert planned.modules[-1].aux_net == ""


@pytest.mark.usefixtures("nothing_compared")
@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("dgl", "Conv2d 32, Conv2d 32, Conv2d 32, Linear 128, Linear 128, Linear 10"),
        ("predsim", "Linear 10"),
        ("infopro", "Conv2d 64, Linear 128, Linear 10"),
    ],
)
def test_other_rules_are_planned_as_they_run(rule, words):
    model, shape = models.resnet20(), (8, 3, 32, 32)
    planned = plan(model, shape, rule=rule, modules=4)
    trainer = LocalTrainer(model, rule=rule, modules=4)
    trainer.step(torch.rand(shape).contiguous(memory_format=torch.channels_last) / 4, torch.arange(8))
    assert trainer.plan == planned and (planned.rule, planned.depth) == (rule, None)
    assert planned.modules[2].aux_net == words
    aux = sum(p.numel() for module in trainer.local_modules[:-1] for p in module.head.parameters())
    assert planned.aux_parameters == aux > 0
    assert str(planned).startswith(f"resnet20, rule {rule}: 4 local modules, input 8x3x32x32")
    with pytest.raises(ValueError, match=f"memory_budget chooses the cut of .* with '{rule}' give modules"):
        plan(model, shape, rule=rule, memory_budget="1GB")


def test_table():
    text = str(plan(models.resnet20(), (128, 3, 32, 32), depth=2, modules=3))
    lines = text.splitlines()
    assert lines[0] == "resnet20, rule auglocal, depth 2: 3 local modules, input 128x3x32x32"
    assert lines[3].split()[:4] == ["0", "stem", "..", "layer1.1"]
    assert "+ BatchNorm1d" in lines[3] and "16x32x32" in lines[3]
    assert "none: the classifier" in lines[5]
    total = next(line for line in lines if line.startswith("total")).split()
    assert total[1] == "272,474"
    peak = next(line for line in lines if line.startswith("a step's peak, "))
    assert "is in module 0: state " in peak
    assert lines[-5].startswith("this cut, 3 modules ") and lines[-2].startswith("eager BP ")
    assert str(plan(models.resnet20(), (2, 3, 32, 32), rule="bp")).startswith("resnet20, rule bp: 1 local module,")


def test_vgg13_at_full_size(torchvision):
    """The authors' code needs 21.59 GB of activations for this, eager backpropagation 29.91, and 31.62 in all."""
    with torch.device("meta"):
        model = torchvision.models.vgg13_bn()
    shape = (256, 3, 224, 224)
    planned, whole = plan(model, shape, depth=5), plan(model, shape, rule="bp")
    assert len(planned.modules) == 10 and all(len(module.units) == 1 for module in planned.modules)
    words = "features.7 (128, /2) features.14 (256, /2) features.24 (512, /2) features.31 (512, /1)"
    assert planned.modules[0].aux_net == words
    assert planned.comparison.eager.bytes == pytest.approx(31.62e9, rel=1e-3)
    assert planned.activation_bytes < 11e9 and whole.activation_bytes < 13e9
    # Multiply-accumulates of three passes, but for the first convolution's data gradient; linear layers too.
    assert whole.macs == planned.bp_macs == 256 * (3 * 11_308_466_176 - 9 * 3 * 64 * 224**2)


def test_planning_changes_nothing(tiny_model):
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    random = torch.get_rng_state()
    plan(tiny_model, (2, 3, 16, 16), depth=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    assert all(p.device.type == "cpu" for p in tiny_model.parameters())


def test_a_large_network_plans_on_meta_tensors(torchvision):
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    planned = plan(model, (256, 3, 224, 224), depth=5)
    assert len(planned.modules) == 17 and planned.modules[0].output_shape == (256, 64, 56, 56)
    assert planned.parameters == 25_557_032


@pytest.mark.usefixtures("nothing_compared")
def test_a_plan_for_one_image(torchvision):
    planned = plan(torchvision.models.resnet18(), (1, 3, 32, 32))
    assert planned.input_shape == (1, 3, 32, 32) and planned.modules[-1].output_shape == (1, 512, 1, 1)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (2, 3, 32, 32, 1), (2, 3, 0, 32)])
def test_bad_shapes(tiny_model, shape):
    with pytest.raises(ValueError, match=r"input_shape must be \(N, 3, H, W\) for this model, given \("):
        plan(tiny_model, shape)


@pytest.mark.parametrize("shape", [224, torch.zeros(2, 3, 32, 32)])
def test_what_is_no_shape(tiny_model, shape):
    with pytest.raises(TypeError, match=r"input_shape must be \(N, 3, H, W\) for this model, given (int|Tensor)$"):
        plan(tiny_model, shape)


@pytest.mark.usefixtures("nothing_compared")
def test_bf16_halves_the_activations():
    full = plan(models.resnet32(), (64, 3, 32, 32), 4)
    half = plan(models.resnet32(), (64, 3, 32, 32), 4, precision="bf16")
    assert 0.5 <= half.activation_bytes / full.activation_bytes < 0.52  # statistics and the head stay in float32
    assert half.state_bytes == full.state_bytes


def test_what_eager_needs_is_beside_the_plan():
    planned = plan(models.resnet32(), (64, 3, 32, 32), 4)
    # Two maps for each convolution and its ReLU: 2.58 GB in all at a batch of 1024.
    eager, checkpointed = planned.comparison.eager.bytes, planned.comparison.eager_checkpoint.bytes
    assert eager == pytest.approx(2.58e9 / 16, rel=0.04)
    assert planned.peak_bytes < checkpointed < eager
    assert "eager BP     " in str(planned)


@pytest.mark.parametrize("shape", [(2, 3, 16.0, 16), (True, 3, 16, 16), (2, 3, "16", 16), (2.5, 3, 16, 16), "2333"])
def test_shapes_that_are_no_whole_numbers(tiny_model, shape):
    with pytest.raises(ValueError, match=r"input_shape must be \(N, 3, H, W\) for this model, whole numbers, given"):
        plan(tiny_model, shape)


@pytest.mark.usefixtures("nothing_compared")
def test_shapes_of_any_integer_kind(tiny_model):
    expected = plan(tiny_model, (2, 3, 16, 16), 2)
    for shape in (
        np.array([2, 3, 16, 16]),
        [np.int64(2), np.uint8(3), torch.tensor(16), 16],
        torch.Size([2, 3, 16, 16]),
    ):
        planned = plan(tiny_model, shape, 2)
        assert planned == expected and {type(size) for size in planned.input_shape} == {int}


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "plan",
            ValueError,
            "path must end in .png, .pdf, .svg or another suffix that matplotlib knows, given '.*plan'",
        ),
        ("plan.doc", ValueError, "path must end in .png"),
        ("no/plan.png", OSError, "no/plan.png cannot be written: No such file or directory: .*; choose another path"),
    ],
)
def test_pictures_that_cannot_be_written(tiny_model, tmp_path, name, kind, message):
    planned = plan(tiny_model, (2, 3, 16, 16), 2, memory_budget="1GB")
    for save in (planned.save_picture, planned.save_front):
        with pytest.raises(kind, match=message):
            save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_compared")
@pytest.mark.parametrize("suffix", ["png", "PDF", "svg"])
def test_kinds_of_pictures(tiny_model, tmp_path, suffix):
    begin = {"png": b"\x89PNG", "PDF": b"%PDF", "svg": b"<?xml"}[suffix]
    path = tmp_path / f"x.{suffix}"
    plan(tiny_model, (2, 3, 16, 16), 2).save_picture(str(path))
    assert path.read_bytes().startswith(begin) and list(tmp_path.iterdir()) == [path]


def test_the_brief_table_is_narrow(torchvision):
    with torch.device("meta"):
        planned = plan(torchvision.models.vgg16(), (32, 3, 224, 224), 3)
    title, header, *lines = planned.brief().splitlines()
    assert title == "vgg16, rule auglocal, depth 3: 13 local modules, input 32x3x224x224"
    assert header.split("  ")[0] == "module" and "parameters (+aux)" in header and header.endswith("MACs / BP")
    assert max(map(len, (header, *lines))) <= 100 and len(lines) > 13 + 3
    second = f"{planned.modules[1].parameters:,} (+{planned.modules[1].aux_parameters:,})"
    assert second in lines[2] and "features.2 " in lines[2] and "64x112x112" in lines[2]
    assert "\n".join(lines).endswith(str(planned.comparison))


def test_of_an_island_that_keeps_nothing_the_plan_says_so():
    model = models.CifarResNet(1)
    model.fc = torch.nn.Sequential(
        torch.nn.Unflatten(1, (64, 1, 1)), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(256, 10)
    )
    planned = plan(model, (2, 3, 16, 16), modules=2, auxiliary="light")
    assert planned.modules[-1].timeline.kept_by_autograd == 0
    line = "module 1 runs by autograd, which keeps nothing for it: 3 (AdaptiveAvgPool2d)"
    assert line in str(planned).splitlines()
