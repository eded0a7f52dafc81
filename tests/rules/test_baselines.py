"""PredSim, DGL and InfoPro: their losses against plain formulas, their memory against its plan, their errors."""

import math

import pytest
import torch

from auglocal_ext import LocalTrainer, models
from auglocal_ext.backbone import as_backbone
from auglocal_ext.common.memory import LiveBytes
from auglocal_ext.rules import DGL, InfoPro, PredSim
from auglocal_ext.rules.cutting import Span, local_heads


def head(rule, unit, size=(32, 32)):
    backbone = as_backbone(models.resnet20())
    return local_heads(backbone, rule, [Span(0, unit), Span(unit + 1, 9)], (3, *size))[0]


def test_similarity_loss():
    """By hand, pair by pair."""
    torch.manual_seed(0)
    extra = head(PredSim(), 3).extra.double()
    features, labels = torch.randn(4, 16, 8, 8, dtype=torch.float64), torch.tensor([1, 1, 3, 9])
    deviations = extra.net(features).flatten(2).std(2)

    def cosine(a, b):
        a, b = a - a.mean(), b - b.mean()
        return (a @ b / (a.norm() * b.norm())).item()

    one_hot = torch.eye(10, dtype=torch.float64)[labels]
    terms = [
        (cosine(deviations[i], deviations[j]) - cosine(one_hot[i], one_hot[j])) ** 2 for i in range(4) for j in range(4)
    ]
    assert extra(features, labels, None).item() == pytest.approx(sum(terms) / 16, rel=1e-6)


def test_similarity_of_maps_of_one_pixel():
    """Which have no deviation: the features themselves are compared."""
    extra = head(PredSim(), 3).extra.double()
    features, labels = torch.randn(4, 16, 1, 1, dtype=torch.float64), torch.tensor([1, 1, 3, 9])
    rows, one_hot = extra.net(features).flatten(1), torch.eye(10, dtype=torch.float64)[labels]
    expected = (torch.corrcoef(rows) - torch.corrcoef(one_hot)).square().mean()
    assert extra(features, labels, None).item() == pytest.approx(expected.item(), rel=1e-6)


def test_black_and_white_pixels_are_images_in_any_normalisation():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        mean, std = torch.rand(3, generator=generator), torch.rand(3, generator=generator) / 2 + 0.05
        extra = head(InfoPro(mean.tolist(), std.tolist()), 3).extra
        pixels = torch.tensor([0.0, 1.0]).expand(2, 3, 4, 2)
        images = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        for given in (images, images.bfloat16()):
            assert extra.loss(torch.zeros(2, 3, 4, 2), None, given).item() == pytest.approx(math.log(2), rel=1e-6)


def test_image_loss():
    """A prediction of the very image has its entropy as loss; elsewhere it is larger."""
    rule = InfoPro((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    extra = head(rule, 3).extra.double()
    image = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 0.8 + 0.1
    normalised = (image - extra.mean) / extra.std
    assert extra.mean.flatten().tolist() == pytest.approx((0.5, 0.4, 0.3))
    entropy = -(image * image.log() + (1 - image) * (1 - image).log()).mean()
    assert extra.loss(image.logit(), None, normalised).item() == pytest.approx(entropy.item(), rel=1e-6)
    assert extra.loss(torch.zeros_like(image), None, normalised).item() == pytest.approx(math.log(2), rel=1e-9)
    assert "mean" not in extra.state_dict()


@pytest.mark.parametrize(("unit", "size"), [(3, (32, 32)), (6, (32, 32)), (9 - 1, (37, 30))])
def test_the_decoder_draws_at_the_images_size(unit, size):
    made, shape = head(InfoPro(), unit, size), as_backbone(models.resnet20()).feature_shapes((3, *size))[unit]
    features = torch.randn(2, *shape)
    assert made.extra.net(features).shape == (2, 3, *size)
    assert made(features).shape == (2, 10)


def test_dgl_pools_to_a_quarter():
    net = head(DGL(), 3, (37, 30)).net
    assert net[0].output_size == (10, 8)
    assert net(torch.randn(2, 16, 37, 30)).shape == (2, 10)


@pytest.mark.covering(2)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("modules", [None, 3])
@pytest.mark.parametrize("rule", ["dgl", "predsim", "infopro", "checkpoint"])
def test_the_prediction_is_what_is_measured(rule, modules, precision):
    if rule == "checkpoint" and modules:
        modules = 1
    torch.manual_seed(0)
    trainer = LocalTrainer(models.resnet20(), rule=rule, modules=modules, precision=precision)
    images, labels = torch.rand(8, 3, 32, 32) / 2, torch.arange(8)
    trainer.step(images, labels)
    with LiveBytes([*trainer.tensors(), images, labels]) as live:
        result = trainer.step(images, labels)
    if precision == "fp32":
        assert live.peak == trainer.plan.peak_bytes
    else:  # on meta tensors what runs by autograd is counted in float32: autocast does not know them
        assert 0.8 * trainer.plan.peak_bytes < live.peak <= trainer.plan.peak_bytes
    assert result.module_losses.isfinite().all()


def test_checkpoint_is_bp_to_the_bit_with_less_memory():
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    trainers = {}
    for rule in ("bp", "checkpoint"):
        torch.manual_seed(0)
        trainers[rule] = LocalTrainer(models.resnet20(), rule=rule)
        trainers[rule].step(images, labels)
    states = [trainer.model.state_dict().values() for trainer in trainers.values()]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    ratio = trainers["checkpoint"].plan.activation_bytes / trainers["bp"].plan.activation_bytes
    assert ratio < 0.8 and trainers["checkpoint"].plan.macs > 1.2 * trainers["bp"].plan.macs


def test_images_that_are_not_of_the_normalisation():
    trainer = LocalTrainer(models.resnet20(), rule="infopro", modules=2)
    images = torch.rand(4, 3, 32, 32) * 5
    with pytest.raises(ValueError, match=r"draws images of 0 to 1: .* these go from 0\.\d+ to 1\.\d+; give"):
        trainer.step(images, torch.arange(4))
    rule = InfoPro((0, 0, 0), (0.2, 0.2, 0.2))
    LocalTrainer(models.resnet20(), rule=rule, modules=2).step(images, torch.arange(4))


def test_predsims_similarity_leaves_ignored_images_out_and_takes_soft_labels():
    loss = head(PredSim(), 3).extra.loss
    torch.manual_seed(0)
    prediction, labels = torch.randn(6, 16, 8, 8, requires_grad=True), torch.tensor([0, 1, -100, 1, 0, 9])
    value = loss(prediction, labels, None)
    (gradient,) = torch.autograd.grad(value, prediction)
    assert not gradient[2].any() and gradient[[0, 1, 3, 4, 5]].flatten(1).any(1).all()
    shares = torch.nn.functional.one_hot(labels.clamp(0), 10).float() * (labels >= 0)[:, None]
    assert torch.equal(loss(prediction, shares, None), value)
