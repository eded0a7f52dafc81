"""Fine-tuning: what is frozen in front of the first trained layer runs forward only and keeps nothing, and the rest
trains as if by autograd."""

import copy
import pickle
import subprocess
import sys
from functools import partial

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import LocalTrainer, models, plan, train
from auglocal_ext.common.memory import LiveBytes
from auglocal_ext.engine.emit import Phase
from auglocal_ext.training.isolation import assert_isolated

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
CHANNELS_LAST = torch.channels_last
STEM = ("conv1", "bn1")


def frozen(*names, blocks=1, eval_mode=False):
    """A small ResNet with these parts frozen."""
    torch.manual_seed(0)
    model = models.CifarResNet(blocks)
    for part in map(model.get_submodule, names):
        part.requires_grad_(False).train(not eval_mode)
    return model


def assert_plan_is_exact(trainer, batch):
    trainer.step(*batch)
    with LiveBytes([*trainer.tensors(), *batch]) as live:
        result = trainer.step(*batch)
    assert live.peak == trainer.plan.peak_bytes
    return result


def exact_plan(trainer, batch):
    assert_plan_is_exact(trainer, batch)
    return trainer.plan


def check_a_step(model, images, labels, **options):
    """A step of SGD with lr 1 against autograd on the same local modules: gradients, statistics, logits; what is frozen
    stays. In float64. Returns the trainer."""
    trainer = LocalTrainer(model, depth=2, optimizer=partial(torch.optim.SGD, lr=1.0), **options)
    plain, whole = copy.deepcopy(trainer.local_modules), copy.deepcopy(model)
    result = trainer.step(images, labels)
    torch.testing.assert_close(result.logits, whole(images).detach(), rtol=1e-8, atol=1e-10)
    x = images
    for index, (ours, module) in enumerate(zip(trainer.local_modules, plain, strict=True)):
        features = module.body(x.detach())
        if result.trained[index]:
            loss = F.cross_entropy(module.head(features), labels)
            loss.backward()
            torch.testing.assert_close(result.module_losses[index], loss.detach())
        for (name, after), theirs in zip(ours.named_parameters(), module.parameters(), strict=True):
            gradient = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            assert theirs.requires_grad or theirs.grad is None
            torch.testing.assert_close(theirs.detach() - after.detach(), gradient, rtol=1e-7, atol=1e-9, msg=name)
        for (name, after), theirs in zip(ours.body.named_buffers(), module.body.buffers(), strict=True):
            torch.testing.assert_close(after, theirs, msg=name)
        x = features
    return trainer


# ---- values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "norms"), [(64, "train"), (8, "eval"), (8, "fixed")])
def test_a_resnet18_with_its_first_stages_frozen(torchvision, width, norms):
    torch.manual_seed(0)
    layer = torchvision.ops.FrozenBatchNorm2d if norms == "fixed" else nn.BatchNorm2d
    model = nets.resnet(torchvision, blocks=(2, 2, 2, 2), width=width, norm_layer=layer)
    model.bn1 = layer(width)
    model.double()
    for part in (model.conv1, model.bn1, model.layer1, model.layer2):
        part.requires_grad_(False)
    if norms == "eval":
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_(0, 0.1)
            norm.eval()
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 7, 0, 3])
    trainer = check_a_step(model, images, labels, modules=2, image_size=32)
    frozen_units = ["stem", "layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    assert trainer.plan.modules[0].units[:5] == tuple(frozen_units)
    # Of what is frozen one map is kept, its last output.
    kept = [b for b in trainer.plan.modules[0].timeline.buffers if b.kind == "kept" and b.part in frozen_units]
    assert [(b.part, b.bytes) for b in kept] == [("layer2.1", 4 * 2 * width * 4 * 4 * 8)]
    moments = [m for m in trainer.plan.modules[0].timeline.moments if m.part in frozen_units]
    assert not any(m.rebuilds or m.phase is Phase.BACKWARD for m in moments)
    assert_plan_is_exact(trainer, (images, labels))
    everything = copy.deepcopy(model).requires_grad_(True)
    borders = trainer.plan.borders
    whole = LocalTrainer(everything, depth=2, optimizer=partial(torch.optim.SGD, lr=1.0), borders=borders)
    whole.plan_for(images)
    ours, theirs = trainer.plan.modules[0], whole.plan.modules[0]
    assert ours.peak_bytes < theirs.peak_bytes and ours.kept_bytes < theirs.kept_bytes and ours.macs < theirs.macs


@pytest.mark.covering(2)
@pytest.mark.parametrize("eval_mode", [False, True])
@pytest.mark.parametrize(
    "names", [STEM, ("conv1",), ("layer2",), (*STEM, "layer1", "layer2.0.conv1"), (*STEM, "layer1", "layer2", "layer3")]
)
@pytest.mark.parametrize("options", [{"borders": (0, 1)}, {"rule": "bp"}, {"recompute": True}])
def test_any_part_may_be_frozen(batch, names, eval_mode, options):
    model = frozen(*names, eval_mode=eval_mode).double()
    check_a_step(model, batch[0].double(), batch[1], **options)


@pytest.mark.covering(2)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("names", [(*STEM, "layer1"), ("layer2", "fc"), (*STEM, "layer1", "layer2", "layer3")])
@pytest.mark.parametrize("optimizer", [SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_the_plan_is_exact(batch, names, precision, optimizer):
    options = {"depth": 2, "optimizer": optimizer, "precision": precision}
    model, images = frozen(*names, eval_mode=precision == "bf16"), batch[0].contiguous(memory_format=CHANNELS_LAST)
    planned = plan(model, images.shape, **options)
    trainer = LocalTrainer(model, **options)
    assert_plan_is_exact(trainer, (images, batch[1]))
    assert trainer.plan.peak_bytes == planned.peak_bytes
    whole = LocalTrainer(frozen(), **options)
    whole.plan_for(images)
    assert planned.peak_bytes < whole.plan.peak_bytes or "layer1" not in names


def test_no_border_lies_in_front_of_what_trains(batch):
    trainer = LocalTrainer(frozen(*STEM, "layer1"), depth=2, form="imagenet", optimizer=SGD)
    units = [module.units for module in exact_plan(trainer, batch).modules]
    assert units == [("stem", "layer1.0", "layer2.0"), ("layer3.0",)]
    assert len(trainer.aux_nets) == 1
    assert_isolated(trainer, *batch)


def test_a_local_module_that_is_frozen_has_no_loss(batch):
    """Where borders, or what is frozen later, leave one."""
    model = frozen(*STEM)
    trainer = LocalTrainer(model, depth=2, borders=(0, 1), optimizer=SGD)
    net = copy.deepcopy(trainer.aux_nets[0].state_dict())
    result = assert_plan_is_exact(trainer, batch)
    assert result.trained == (False, True, True) and result.module_losses.isnan().tolist() == [True, False, False]
    assert all(torch.equal(value, net[name]) for name, value in trainer.aux_nets[0].state_dict().items())
    assert not trainer.optimizers[0].state and trainer.module_hits[0] == 0
    module = trainer.plan.modules[0]
    assert not module.trains and module.gradient_bytes == module.optimizer_bytes == module.kept_bytes == 0
    assert module.macs == 8 * 16 * 16 * 16 * 27
    assert trainer.backward(0, *batch)[1:] == (None, None)
    assert_isolated(trainer, *batch)
    told = str(trainer.plan)
    assert "unused" in told and "frozen: 464 of 78,042 parameters; module 0 runs forward only" in told
    model.requires_grad_(True)
    assert assert_plan_is_exact(trainer, batch).trained == (True, True, True)
    assert trainer.optimizers[0].state


def test_a_module_of_a_step_that_is_skipped_may_be_frozen(batch):
    trainer = LocalTrainer(frozen(*STEM), depth=2, borders=(0, 1), optimizer=SGD)
    trainer.nonfinite = "skip"
    assert trainer.step(*batch).trained == (False, True, True) and trainer.skipped_steps == [0, 0, 0]


def test_state_of_what_was_trained_before_is_counted(batch):
    trainer = LocalTrainer(frozen(), depth=2, borders=(0, 1), optimizer=torch.optim.AdamW)
    before = exact_plan(trainer, batch).state_bytes
    trainer.model.requires_grad_(False)
    trainer.model.fc.requires_grad_(True)
    assert_plan_is_exact(trainer, batch)
    held = sum(t.nbytes for t in trainer.tensors())
    assert held == before + trainer.module_hits.nbytes


# ---- trainings -----------------------------------------------------------------------------------------------


def loader():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 16, 16, generator=generator)
    return [(images[:8], torch.arange(8) % 10), (images[8:], torch.arange(8, 16) % 10)]


def tuned(model, epochs=2, **more):
    """Unfreezes everything behind the first epoch."""

    def unfreeze(entry):
        model.requires_grad_(True)

    options = {"optimizer": SGD, "schedule": None, "progress": False, "seed": 1} | more
    return train(model, loader(), 2, epochs=epochs, on_epoch=unfreeze, **options)


def test_gradual_unfreezing():
    model = frozen(*STEM, "layer1", "layer2")
    before = copy.deepcopy(model.state_dict())
    stays = []
    result = tuned(model, on_step=lambda *_: stays.append(torch.equal(model.conv1.weight, before["conv1.weight"])))
    assert stays == [True] * 2 + [False] * 2
    assert all(value is not None for entry in result.history for value in entry["module_losses"])
    assert result.plan.modules[0].units[0] == "stem"
    assert result.peak_bytes == result.plan.peak_bytes  # of the steps that train everything


def test_what_trains_later_than_its_module_does_so_with_the_default_optimizer(batch):
    """Which is fused; against the same one of torch's that is not."""

    def plain(parameters):
        return torch.optim.SGD(parameters, 0.1, 0.9, weight_decay=1e-4, nesterov=True, fused=False)

    trained = []
    for optimizer in (None, plain):
        torch.manual_seed(0)
        model = models.CifarResNet(1)
        model.conv1.requires_grad_(False)
        trainer = LocalTrainer(model, rule="bp", optimizer=optimizer)
        for step in range(4):
            model.conv1.requires_grad_(step >= 2)
            trainer.step(*batch)
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_module_frozen_between_epochs_has_no_entry():
    model = frozen()

    def freeze(entry):
        for part in (model.conv1, model.bn1):
            part.requires_grad_(False)

    result = train(model, loader(), 2, epochs=2, on_epoch=freeze, progress=False, optimizer=SGD)
    assert [entry["module_losses"][0] is None for entry in result.history] == [False, True]
    assert [entry["module_accuracies"][0] is None for entry in result.history] == [False, True]
    assert all(loss is not None for loss in result.history[1]["module_losses"][1:])


def test_a_training_that_goes_on(tmp_path):
    class Stop(Exception):
        pass

    def stop(epoch, step, result):
        if epoch == 2:
            raise Stop

    expected = frozen(*STEM)
    tuned(expected, checkpoint=tmp_path / "whole")
    with pytest.raises(Stop):
        tuned(frozen(*STEM), checkpoint=tmp_path / "part", on_step=stop)
    model = frozen(*STEM)
    tuned(model, checkpoint=tmp_path / "part")
    assert all(p.requires_grad for p in model.parameters())
    for (name, ours), theirs in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_norms_in_eval_mode_stay_so_through_validation():
    model = frozen(*STEM, "layer1", eval_mode=True)
    before = copy.deepcopy(model.state_dict())
    train(model, loader(), 2, epochs=1, val_loader=loader(), progress=False)
    assert model.training and not model.bn1.training and not model.layer1[0].bn1.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(("conv1", "bn1", "layer1")), name


@pytest.mark.parametrize("how", [lambda t: pickle.loads(pickle.dumps(t)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_trainer_of_frozen_parts_can_be_stored(batch, how):
    trainer = LocalTrainer(frozen(*STEM, eval_mode=True), depth=2, borders=(0, 1), optimizer=SGD)
    trainer.step(*batch)
    twin = how(trainer)
    for _ in range(2):
        ours, theirs = trainer.step(*batch), twin.step(*batch)
        assert torch.equal(ours.module_losses[1:], theirs.module_losses[1:]) and ours.trained == theirs.trained
    assert [p.requires_grad for p in twin.model.parameters()] == [p.requires_grad for p in trainer.model.parameters()]


def test_a_trained_model_loads_without_this_package(torchvision, tmp_path):
    torch.manual_seed(0)
    model = nets.vgg(torchvision, [4, "M", 8, 8], avgpool=nn.AdaptiveAvgPool2d(1), classifier=nn.Linear(8, 4))
    model.features[0].requires_grad_(False)
    LocalTrainer(model, depth=2, optimizer=SGD).step(torch.randn(2, 3, 16, 16), torch.tensor([0, 3]))
    torch.save(model, tmp_path / "model.pt")
    program = (
        "import sys, torch; sys.modules['auglocal_ext'] = None; "
        "model = torch.load(sys.argv[1], weights_only=False); "
        "print(type(model).__name__, sum(p.requires_grad for p in model.parameters()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "model.pt"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["VGG", str(sum(p.requires_grad for p in model.parameters()))]
