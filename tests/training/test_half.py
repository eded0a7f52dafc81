"""Training with features in float16: gradients against float32's, loss scales that back off, steps left out."""

import copy
import pickle

import pytest
import torch

from auglocal_ext import LocalTrainer, models, train

IMAGES, LABELS = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 4
LR = 0.125


def trainer_of(precision="fp16", lr=LR, **options):
    torch.manual_seed(0)
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=lr)  # noqa: E731
    model = models.CifarResNet(1, num_classes=4)
    return LocalTrainer(model, 2, modules=2, optimizer=sgd, precision=precision, **options)


def weights(trainer):
    both = torch.nn.ModuleList([trainer.model, trainer.aux_nets])
    return {name: value.detach().clone() for name, value in both.named_parameters()}


def changes(trainer, lr=LR):
    """What a step of SGD changes, over the learning rate: the gradients."""
    before = weights(trainer)
    trainer.step(IMAGES, LABELS)
    return {name: (before[name] - value) / lr for name, value in weights(trainer).items()}


@pytest.mark.parametrize("rule", ["auglocal", "predsim"])
def test_gradients_are_float32s_to_a_tenth_and_nearer_than_bfloat16s(rule):
    """Features are rounded to 11 bits, of bfloat16 to 8; here and there that turns a ReLU on or off."""
    half, brain, full = (changes(trainer_of(p, rule=rule, image_size=16)) for p in ("fp16", "bf16", "fp32"))
    assert half.keys() == full.keys()
    for name, exact in full.items():
        assert (half[name] - exact).norm() <= 0.1 * exact.norm() + 1e-5, name
    errors = [sum((found[name] - full[name]).norm() for name in full) for found in (half, brain)]
    assert errors[0] < 0.5 * errors[1]


def test_features_are_float16_and_what_is_trained_is_float32():
    trainer = trainer_of()
    trainer.plan_for(IMAGES)
    features, logits, loss = trainer.backward(0, IMAGES, LABELS)
    assert (features.dtype, logits.dtype, loss.dtype) == (torch.float16, torch.float16, torch.float32) or (
        features.dtype,
        loss.dtype,
    ) == (torch.float16, torch.float32)
    assert all(value.dtype == torch.float32 for value in trainer.model.state_dict().values() if value.dim())
    trainer.step(IMAGES.half(), LABELS)


def test_what_is_too_small_for_float16_is_not_lost():
    """A loss of a millionth: its gradients in feature maps are below what float16 has."""
    criterion = lambda logits, labels: 1e-6 * torch.nn.functional.cross_entropy(logits, labels)  # noqa: E731
    half, full = (changes(trainer_of(p, 2.0**17, criterion=criterion), 2.0**17) for p in ("fp16", "fp32"))
    for name, exact in full.items():
        assert (half[name] - exact).norm() <= 0.1 * exact.norm() + 1e-11, name


def scale_to(trainer, index, scale):
    scaler = trainer.stepper.scalers[index]
    scaler.load_state_dict(scaler.state_dict() | {"scale": scale})


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_module_that_overflows_is_left_out_and_its_scale_halved(nonfinite):
    trainer = trainer_of()
    trainer.nonfinite = nonfinite
    trainer.step(IMAGES, LABELS)
    scale_to(trainer, 0, 2.0**40)
    before, statistics = weights(trainer), trainer.model.bn1.num_batches_tracked.item()
    result = trainer.step(IMAGES, LABELS)
    assert result.module_losses.isfinite().all() and trainer.loss_scales == [2.0**39, 2.0**16]
    assert trainer.model.bn1.num_batches_tracked == statistics + 1
    own = {id(p) for p in trainer.local_modules[0].parameters()}
    for name, parameter in torch.nn.ModuleList([trainer.model, trainer.aux_nets]).named_parameters():
        assert torch.equal(before[name], parameter) == (id(parameter) in own), name
    for _ in range(40):
        trainer.step(IMAGES, LABELS)
    assert 1 < trainer.loss_scales[0] < 2.0**30
    assert not torch.equal(before["0.conv1.weight"], trainer.model.conv1.weight)


def test_an_overflow_in_the_first_step_leaves_no_momentum():
    """With the default optimizer, which is fused."""
    torch.manual_seed(0)
    trainer = LocalTrainer(models.CifarResNet(1, num_classes=4), 2, modules=2, precision="fp16")
    scale_to(trainer, 0, 2.0**40)
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills memory that nobody has written with NaN
    try:
        trainer.step(IMAGES, LABELS)
        scale_to(trainer, 0, 2.0**10)
        assert trainer.step(IMAGES, LABELS).module_losses.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_modules_clipped_together_do_not_spoil_one_another():
    trainer = trainer_of(accumulate=2, clip_norm=0.1, clip="global")
    scale_to(trainer, 0, 2.0**40)
    before = weights(trainer)
    for _ in range(2):
        trainer.step(IMAGES, LABELS)
    after = weights(trainer)
    assert all(value.isfinite().all() for value in after.values()) and trainer.loss_scales[0] == 2.0**39
    moved = [(after[name] - before[name]).square().sum() for name in after]
    assert torch.stack(moved).sum().sqrt() == pytest.approx(0.1 * LR, rel=1e-3)


def test_scales_are_kept_in_states_and_copies():
    trainer = trainer_of()
    scale_to(trainer, 1, 2.0**30)
    trainer.step(IMAGES, LABELS)
    twin, copied = trainer_of(), copy.deepcopy(trainer)
    twin.load_state_dict(trainer.state_dict())
    assert twin.loss_scales == copied.loss_scales == trainer.loss_scales
    for one in (trainer, twin, copied):
        one.step(IMAGES, LABELS)
    for name, value in weights(trainer).items():
        assert torch.equal(value, weights(twin)[name]) and torch.equal(value, weights(copied)[name]), name


def test_copies_hold_the_bytes_that_are_planned():
    trainer = trainer_of(accumulate=2)
    trainer.step(IMAGES, LABELS)
    for copied in (copy.deepcopy(trainer), pickle.loads(pickle.dumps(copy.deepcopy(trainer.stepper)))):
        stepper = getattr(copied, "stepper", copied)
        assert sum(t.nbytes for t in stepper.tensors()) == sum(t.nbytes for t in trainer.stepper.tensors())


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip_norm": 1.0, "clip": "global"}], ids=str)
def test_goes_on_where_an_optimizer_failed(options, monkeypatch):
    """Behind a scaler's unscaling, which it refuses to do twice."""
    trainer = trainer_of(**options)
    trainer.step(IMAGES, LABELS)
    scale_to(trainer, 1, 2.0**10)
    with monkeypatch.context() as patched:
        patched.setattr(trainer.optimizers[1], "step", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.step(IMAGES, LABELS)
    assert trainer.loss_scales[1] == 2.0**10
    before = weights(trainer)
    for _ in range(2):
        trainer.step(IMAGES, LABELS)
    assert not torch.equal(before["0.fc.weight"], trainer.model.fc.weight)


def test_a_training_in_float16(tmp_path):
    torch.manual_seed(0)
    batches = [(IMAGES + LABELS.view(-1, 1, 1, 1), LABELS)] * 4
    model = models.CifarResNet(1, num_classes=4)
    result = train(model, batches, 2, modules=2, epochs=6, precision="fp16", progress=False, val_loader=batches)
    assert result.history[-1]["loss"] < result.history[0]["loss"] and result.history[-1]["val_accuracy"] > 0.5
