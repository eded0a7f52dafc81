"""Linear probes: accuracies are those of scikit-learn on the same features, by unit."""

import sys

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from auglocal_ext import analysis, models
from auglocal_ext.analysis import probes
from auglocal_ext.analysis.features import Features


def classes_of(count, seed, size=8):
    """Batches of images of three classes that differ in a channel's mean, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randn(count, 3, size, size, generator=generator)
    images += 0.5 * nn.functional.one_hot(labels, 3)[:, :, None, None]
    return list(zip(images.split(16), labels.split(16), strict=True))


def by_scikit_learn(train, labels, test, wanted):
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return pipeline.fit(train.numpy(), labels.numpy()).score(test.numpy(), wanted.numpy())


def test_they_are_scikit_learns(tiny_model):
    train, test = classes_of(90, 0), classes_of(60, 1)
    found = analysis.probe(tiny_model, train, test)
    assert [name for name, _ in found] == ["stem", "layer1.0", "layer2.0", "layer3.0"] and tiny_model.training
    features, values = [], []
    tiny_model.layer2.register_forward_hook(lambda module, args, out: features.append(out.detach().mean((2, 3))))
    tiny_model.eval()
    for part in (train, test):
        features.clear()
        for images, _ in part:
            tiny_model(images)
        values += [torch.cat(features), torch.cat([labels for _, labels in part])]
    assert found[2][1] == by_scikit_learn(*values) and 0.5 < found[2][1] < 1


def test_those_of_many_images_are_torchs(tiny_model, monkeypatch):
    """The same classifier but for rounding: the same images are taken for the same classes."""
    torch.manual_seed(0)
    labels = torch.arange(300) % 5 + 2  # there is none of 0 and 1
    features = torch.randn(500, 6, dtype=torch.float64) * torch.tensor([1, 10, 0.01, 1, 1, 0]) + 5
    features[:300, 0] += labels
    train, test = features[:300], features[300:]
    one, iterations = probes._by_scikit_learn(train, labels, test)
    other, steps = probes._by_torch(train, labels, test)
    assert (one == other).double().mean() >= 0.995 and 1 < min(iterations, steps) <= max(iterations, steps) < 1000
    assert set(other.tolist()) <= {2, 3, 4, 5, 6}
    small = analysis.probe(tiny_model, classes_of(90, 0), classes_of(60, 1))
    monkeypatch.setattr(probes, "MOST_ROWS", 89)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    many = analysis.probe(tiny_model, classes_of(90, 0), classes_of(60, 1))
    assert [accuracy for _, accuracy in many] == pytest.approx([accuracy for _, accuracy in small], abs=0.02)


def test_two_classes_have_scikit_learns_penalty():
    """Of few images it decides where the border lies."""
    torch.manual_seed(0)
    features = torch.randn(1000, 6, dtype=torch.float64)
    labels = (features[:12, 0] + 0.5 * features[:12, 1] > 0).long()
    one, _ = probes._by_scikit_learn(features[:12], labels, features[12:])
    other, _ = probes._by_torch(features[:12], labels, features[12:])
    assert (one == other).double().mean() >= 0.998


def test_features_that_are_not_finite_are_told(tiny_model, monkeypatch):
    nn.init.constant_(tiny_model.layer2[0].bn2.bias, float("nan"))
    for most in (89, 90):  # by torch, by scikit-learn
        monkeypatch.setattr(probes, "MOST_ROWS", most)
        with pytest.raises(FloatingPointError, match="the features of unit layer2.0 are NaN or infinite"):
            analysis.probe(tiny_model, classes_of(90, 0), classes_of(60, 1))


def test_they_are_told_apart_by_depth():
    """A unit that throws away what the classes differ by is as good as a guess; those before it are not."""
    torch.manual_seed(0)
    model = models.CifarResNet(1)
    for parameter in (model.layer3[0].bn2.weight, model.layer3[0].downsample[1].weight):
        nn.init.zeros_(parameter)
    accuracies = dict(analysis.probe(model, classes_of(90, 0), classes_of(60, 1)))
    assert accuracies["layer2.0"] > 0.6 and accuracies["layer3.0"] == pytest.approx(1 / 3)


def test_tokens_and_maps_are_pooled_as_their_layout_says(torchvision):
    vit = torchvision.models.VisionTransformer(16, 8, 1, 2, 6, 12, num_classes=10)
    features = Features(vit)
    with features.evaluating():
        *_, last = features.of((torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)))
    assert last.shape == (2, 5, 6) and torch.equal(features.pooled(1, last), last[:, 0])  # the class token
    swin = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [2, 2], num_classes=10)
    features = Features(swin)
    with features.evaluating():
        *_, last = features.of((torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)))
    assert last.shape == (2, 4, 4, 16)
    torch.testing.assert_close(features.pooled(len(features.names) - 1, last), last.mean((1, 2)))


def test_mistakes(tiny_model, monkeypatch):
    test = classes_of(16, 1)
    with pytest.raises(ValueError, match="a linear probe needs training images of at least 2 classes, given 1"):
        analysis.probe(tiny_model, [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))], test)
    with pytest.raises(ValueError, match="the loader of features to test on is empty"):
        analysis.probe(tiny_model, classes_of(16, 0), [])
    with pytest.raises(TypeError, match="the loader must give pairs of tensors"):
        analysis.probe(tiny_model, [torch.zeros(2)], test)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match="linear probes need the package scikit-learn, which does not import here"):
        analysis.probe(tiny_model, classes_of(16, 0), test)


def test_a_probe_that_is_not_at_its_best_is_told(tiny_model, monkeypatch):
    monkeypatch.setattr(probes, "ITERATIONS", 2)
    with pytest.warns(UserWarning, match="the probe of unit .* was not at its best after 2 iterations"):
        analysis.probe(tiny_model, classes_of(48, 0), classes_of(16, 1))
