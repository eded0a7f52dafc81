"""A validation in parts: what eval mode is, and what is refused. Of several ranks see the tests of `train_stages`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import evaluation, models, train_stages
from auglocal_ext.stages.trainer import StageTrainer
from auglocal_ext.training.divergence import NotFinite, TrainingDiverged


class Net(nn.Module):
    """Drops features by a function and by a layer; scaled: also does by itself something else in eval mode."""

    def __init__(self, scaled=False):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.dropout, self.head = nn.Conv2d(8, 8, 3), nn.Dropout(0.5), nn.Linear(8, 10)
        self.scaled = scaled

    def forward(self, x):
        x = F.dropout(F.relu(self.norm(self.first(x))), 0.5, training=self.training)
        x = self.dropout(F.relu(self.second(x))).mean((2, 3))
        return self.head(x if self.training or not self.scaled else 2 * x)


def batches(sizes=(8, 8)):
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(n, 3, 16, 16, generator=generator), torch.arange(n) % 10) for n in sizes]


def trained(model, **options):
    trainer = StageTrainer(model, *batches()[0], modules=2, depth=2, balance="arithmetic", **options)
    trainer.epoch(batches())
    return trainer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_that_of_the_model(precision):
    torch.manual_seed(0)
    model = Net()
    trainer = trained(model, precision=precision)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loader = [*batches((7, 2)), (torch.empty(0, 3, 16, 16), torch.empty(0, dtype=torch.int64))]
    found, expected = trainer.evaluate(loader), evaluation(model, loader, precision=precision)
    assert (found.loss, found.top1, found.top5, found.images) == (expected.loss, expected.top1, expected.top5, 9)
    assert torch.equal(found.confusion, expected.confusion)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(part.training for part in model.modules())
    # Behind it functions drop as before.
    trainer.epoch(batches())
    first = trainer.stage.local_modules[0].body
    assert not torch.equal(first(batches()[0][0]), first(batches()[0][0]))


def test_a_forward_that_is_another_in_eval_mode_is_refused():
    trainer = trained(Net(scaled=True))
    with pytest.raises(ValueError, match="the units of Net do not compute what its forward does in eval mode"):
        trainer.evaluate(batches())


def test_batches_are_checked():
    trainer = trained(models.CifarResNet(1))
    with pytest.raises(ValueError, match="the validation loader is empty"):
        trainer.evaluate([])
    with pytest.raises(ValueError, match="validation labels"):
        trainer.evaluate([(batches()[0][0], torch.full((8,), 10))])
    given = {"modules": 2, "depth": 2, "progress": False, "epochs": 2}
    with pytest.raises(ValueError, match="val_loader's images must be"):
        train_stages(
            models.CifarResNet(1), batches(), val_loader=[(torch.rand(2, 1, 16, 16), torch.arange(2))], **given
        )
    with pytest.raises(ValueError, match="val_loader can be gone through only once"):
        train_stages(models.CifarResNet(1), batches(), val_loader=iter(batches()), **given)


def test_outputs_that_are_not_finite():
    model = models.CifarResNet(1)
    trainer = trained(model)
    with torch.no_grad():
        model.fc.weight.fill_(torch.inf)
    with pytest.raises(NotFinite, match="the model's outputs for validation images are NaN or infinite"):
        trainer.evaluate(batches())


def test_a_training_whose_outputs_are_not_finite_has_diverged():
    def spoil(net, given):
        return (given[0] * torch.inf,) if not net.training else None

    model = models.CifarResNet(1)
    model.fc.register_forward_pre_hook(spoil)
    with pytest.raises(TrainingDiverged, match="outputs for validation images .* training diverged"):
        train_stages(model, batches(), val_loader=batches(), modules=2, depth=2, progress=False, epochs=1)
