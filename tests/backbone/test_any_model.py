"""Models that the library was not made for: each trains as autograd does, or is refused with the spot."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import auglocal_ext
from auglocal_ext.backbone import as_backbone

CLASSES = 5


class Stem(nn.Module):
    """What the models here begin and end with: (N, 3, H, W) -> (N, 8, H, W), and maps -> logits."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(channels, CLASSES)

    def begin(self, x):
        return F.relu(self.norm(self.conv(x)))

    def end(self, x):
        return self.fc(x.mean((2, 3)))


class Branches(Stem):
    """Branches of different kernels, side by side."""

    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.one, self.three = nn.Conv2d(channels, 4, 1), nn.Conv2d(channels, 6, 3, padding=1)
            self.pooled, self.norm = nn.Conv2d(channels, 2, 1), nn.BatchNorm2d(12)

        def forward(self, x):
            pooled = self.pooled(F.max_pool2d(x, 3, 1, 1))
            return F.relu(self.norm(torch.cat([self.one(x), self.three(x), pooled], 1)))

    def __init__(self):
        super().__init__(12)
        self.blocks = nn.Sequential(self.Block(8), nn.AvgPool2d(2), self.Block(12))

    def forward(self, x):
        return self.end(self.blocks(self.begin(x)))


class SharedWeight(Stem):
    """A weight that two convolutions of one block use, at two dilations."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

        def forward(self, x):
            return F.relu(self.norm(self.conv(x) + F.conv2d(x, self.conv.weight, padding=2, dilation=2)))

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(self.Block(), self.Block())

    def forward(self, x):
        return self.end(self.blocks(self.begin(x)))


class UsedTwice(Stem):
    """A block that runs twice, one after another."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            return x + F.silu(self.norm(self.conv(x)))

    def __init__(self):
        super().__init__()
        self.block, self.last = self.Block(), self.Block()

    def forward(self, x):
        return self.end(self.last(self.block(self.block(self.begin(x)))))


class BranchesOnValues(Stem):
    """A block whose way depends on what it is given."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            y = self.norm(self.conv(x))
            return x + y.relu() if x.mean() > 0.3 else self.other(y).tanh()

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(self.Block(), self.Block())

    def forward(self, x):
        return self.end(self.blocks(self.begin(x)))


class DecidesByValues(SharedWeight):
    """A model whose own forward depends on what it is given."""

    def forward(self, x):
        x = self.begin(x)
        if x.mean() > 0.3:
            x = x * 2
        return self.end(self.blocks(x))


class DecidesBySize(SharedWeight):
    """A model whose own forward depends on the size of the images."""

    def forward(self, x):
        x = self.begin(x)
        if x.shape[2] > 20:
            x = F.avg_pool2d(x, 2)
        return self.end(self.blocks(x))


class Keywords(SharedWeight):
    """A forward with more arguments, of which the images alone are needed."""

    def forward(self, x, scale=2.0, *, mask=None):
        x = self.begin(x) * scale
        if mask is not None:
            x = x * mask
        return self.end(self.blocks(x))


class NeedsMore(SharedWeight):
    """A forward that does not do with images."""

    def forward(self, x, scale):
        return self.end(self.blocks(self.begin(x) * scale))


class PutsOutDict(SharedWeight):
    def forward(self, x):
        features = self.blocks(self.begin(x))
        return {"logits": self.end(features), "features": features}


class PutsOutTuple(SharedWeight):
    def forward(self, x):
        features = self.blocks(self.begin(x))
        return self.end(features), features


class Normalising(SharedWeight):
    """A model that normalises its images by itself."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.2]).view(3, 1, 1))

    def forward(self, x):
        return self.end(self.blocks(self.begin((x - self.mean) / self.std)))


class Functional(nn.Module):
    """Residuals and activations in the model's own forward, no block anywhere."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b1, self.b2, self.skip = nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(8, 12, 1, 2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in (8, 8, 8, 12, 12))
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x):
        x = F.relu(self.norms[0](self.stem(x)))
        y = F.gelu(self.norms[1](self.a1(x)))
        x = F.relu(self.norms[2](self.a2(y)) + x)
        y = F.hardswish(self.norms[3](self.b1(x)))
        x = F.leaky_relu(self.norms[4](self.b2(y)) + self.skip(x), 0.1)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class PreActivation(nn.Module):
    """A ResNet whose blocks begin with the norm and the activation, and share them with the shortcut."""

    class Block(nn.Module):
        def __init__(self, channels, out, stride):
            super().__init__()
            self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 3, stride, 1, bias=False)
            self.norm2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1, bias=False)
            self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if channels != out else None

        def forward(self, x):
            y = F.relu(self.norm1(x))
            shortcut = x if self.shortcut is None else self.shortcut(y)
            return self.conv2(F.relu(self.norm2(self.conv1(y)))) + shortcut

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(self.Block(8, 8, 1), self.Block(8, 12, 2), self.Block(12, 12, 1))
        self.norm, self.fc = nn.BatchNorm2d(12), nn.Linear(12, CLASSES)

    def forward(self, x):
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class InPlace(Stem):
    """Operators in place, on values that nothing else reads afterwards."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.norm(self.conv(x))
            y += x
            y.mul_(0.5).relu_()
            return y

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(self.Block(), self.Block())

    def forward(self, x):
        return self.end(self.blocks(self.begin(x)))


class InPlaceShared(SharedWeight):
    """An operator in place on a value that is read again: the other reader sees what it wrote."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.norm(self.conv(x))
            z = y.sigmoid_()
            return y + z


class ReadsAttribute(SharedWeight):
    """A forward that reads a setting each time."""

    def __init__(self):
        super().__init__()
        self.scale = 2.0

    def forward(self, x):
        return self.end(self.blocks(self.begin(x) * self.scale))


class Counts(Stem):
    """A norm of its own, which counts its batches and has the activation in it, as timm's have."""

    class NormAct(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.act = nn.ReLU()

        def forward(self, x):
            self.num_batches_tracked.add_(1)
            mean, var = self.running_mean, self.running_var
            return self.act(F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps))

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), self.NormAct(8), nn.Conv2d(8, 8, 1), self.NormAct(8))

    def forward(self, x):
        return self.end(self.blocks(self.begin(x)))


class WritesBuffer(SharedWeight):
    """A forward of the model's own that keeps something."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.end(self.blocks(self.begin(x)))


BLOCKS = ["stem", "blocks.0", "blocks.1"]
TRAINED = {
    Branches: ["stem", "blocks.0", "blocks.2"],
    SharedWeight: BLOCKS,
    BranchesOnValues: BLOCKS,
    Keywords: BLOCKS,
    Normalising: BLOCKS,
    Functional: ["stem", "a1", "b1"],
    PreActivation: ["stem", "blocks.0", "blocks.1", "blocks.2"],
    InPlace: BLOCKS,
    InPlaceShared: BLOCKS,
    ReadsAttribute: BLOCKS,
    Counts: ["stem", "blocks.0", "blocks.2"],
}


@pytest.mark.parametrize(("kind", "units"), TRAINED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_what_trains_as_autograd(kind, units):
    """Each local module in float64: loss, logits, features, gradients and statistics; and the whole model's logits."""
    torch.manual_seed(0)
    model = kind().double()
    assert [unit.name for unit in as_backbone(model).units] == units
    images, labels = torch.rand(3, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 4, 2])
    whole = copy.deepcopy(model)
    trainer = auglocal_ext.LocalTrainer(model, depth=2, auxiliary="light", modules=2, image_size=32)
    assert len(trainer.local_modules) == 2
    own = copy.deepcopy(trainer.local_modules)
    features = images
    for index, module in enumerate(own):
        made, logits = module(features)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        ours = trainer.backward(index, features.clone(), labels)
        for a, b in zip(ours, (made if index == 0 else None, logits, loss), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        for (name, a), b in zip(trainer.local_modules[index].named_parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9, msg=f"{index} {name}")
        features = made.detach()
    torch.testing.assert_close(logits, whole(images), rtol=1e-9, atol=1e-10)
    for (name, a), b in zip(model.named_buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), whole.eval()(images))
    model.train()
    assert trainer.step(images, labels).loss.isfinite()


NO_GRAPH = "its forward\\(\\) has no graph of layers and functions"
REFUSED = {
    DecidesByValues: f"{NO_GRAPH} \\(.* control flow; test_any_model.py, line \\d+: if x.mean\\(\\) > 0.3:\\)$",
    NeedsMore: f"{NO_GRAPH} \\(.*missing 1 required positional argument: 'scale'",
    PutsOutDict: "its forward\\(\\) must put out the logits, a tensor, given dict$",
    PutsOutTuple: "its forward\\(\\) must put out the logits, a tensor, given tuple$",
    WritesBuffer: "its forward\\(\\) writes to calls, which no step here would do: put that into a module of its own",
}


@pytest.mark.parametrize(("kind", "message"), REFUSED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_what_cannot_be_followed_is_refused(kind, message):
    with pytest.raises(ValueError, match=f"^cannot cut {kind.__name__} into units: {message}"):
        as_backbone(kind())


def test_a_block_that_runs_twice_is_in_one_module_or_refused():
    model, images = UsedTwice(), torch.rand(3, 3, 16, 16)
    with pytest.raises(ValueError, match="parameter block.conv.weight is in local modules 0 and 1"):
        auglocal_ext.LocalTrainer(model, rule="dgl", borders=[1], image_size=16)
    trainer = auglocal_ext.LocalTrainer(model, rule="bp")
    own = copy.deepcopy(model)
    loss = F.cross_entropy(own(images), torch.tensor([0, 4, 2]))
    loss.backward()
    torch.testing.assert_close(trainer.backward(0, images, torch.tensor([0, 4, 2]))[2], loss)
    for (name, a), b in zip(model.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_forward_that_asks_for_the_size_is_read_for_one():
    """Of images for which it would go another way it is refused."""
    model, images = DecidesBySize(), torch.rand(3, 3, 32, 32)
    trainer = auglocal_ext.LocalTrainer(model, rule="bp")
    own = F.cross_entropy(copy.deepcopy(model)(images), torch.tensor([0, 4, 2]))
    torch.testing.assert_close(trainer.step(images, torch.tensor([0, 4, 2])).loss, own)
    with pytest.raises(ValueError, match="computes something else than its units .* first at aten.convolution behind"):
        auglocal_ext.LocalTrainer(model, rule="bp").step(images[..., :16, :16], torch.tensor([0, 4, 2]))


def test_an_attribute_that_was_read_may_not_change():
    model, images, labels = ReadsAttribute(), torch.rand(3, 3, 32, 32), torch.tensor([0, 4, 2])
    trainer = auglocal_ext.LocalTrainer(model, rule="bp")
    trainer.step(images, labels)
    model.scale, before = 3.0, copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="computes something else .* first at aten.mul behind norm.bias"):
        trainer.step(images, labels)
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())
    model.scale = 2.0
    trainer.step(images, labels)
