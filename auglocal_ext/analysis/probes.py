"""Linear probes: how well the classes are told from a unit's features by a linear classifier alone."""

import warnings
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ..training.divergence import NotFinite
from ..training.loaders import length_of, no_bar
from .features import Features

__all__ = ["MOST_ROWS", "accuracies", "probe"]

MOST_ROWS = 20_000  # images to train on up to which scikit-learn fits the classifier, torch above
ITERATIONS = 1000  # of L-BFGS, at most


def probe(
    model: nn.Module, train_loader: Iterable, test_loader: Iterable, *, progress: bool = False
) -> list[tuple[str, float]]:
    """The accuracy of a linear classifier on the features of each unit.

    Features are averaged over pixels, or tokens (the class token where the model's classifier reads one), and
    standardised by those of the training images. The classifier is logistic regression with a penalty of
    |weights|^2 / 2 on the sum of losses: scikit-learn's up to 20,000 training images, else the same on the model's
    device. The model is in eval mode and is not changed.

    Args:
        model: what `as_backbone` takes.
        train_loader: an iterable of (images, labels), as `auglocal_ext.evaluate` takes, to train the classifiers on,
            once through. All images' pooled features are held at once.
        test_loader: likewise, to test them on.
        progress: progress bars.

    Returns:
        [(unit, accuracy from 0 to 1)], in the order of the units.

    Raises:
        ValueError, TypeError: the model has no units, a batch does not fit it, a loader gives none, or the training
            images are of one class.
        FloatingPointError: features are not finite.
        ImportError: scikit-learn is needed and does not import.
    """
    return accuracies(Features(model), train_loader, test_loader, progress)


def accuracies(features: Features, train_loader, test_loader, progress=False) -> list[tuple[str, float]]:
    """See `probe`."""
    parts = (("features to train on", train_loader), ("features to test on", test_loader))
    (train, labels), (test, wanted) = (_collected(features, loader, name, progress) for name, loader in parts)
    if len(labels.unique()) < 2:
        raise ValueError("a linear probe needs training images of at least 2 classes, given 1: give others, or more")
    fitted, found = _by_scikit_learn if len(labels) <= MOST_ROWS else _by_torch, []
    units = tqdm(features.names, desc="probes", unit="unit", leave=False, disable=no_bar(progress))
    for index, name in enumerate(units):
        device = train[index].device
        if not (train[index].isfinite().all() and test[index].isfinite().all()):
            raise NotFinite(f"the features of unit {name} are NaN or infinite")
        predicted, iterations = fitted(train[index], labels.to(device), test[index])
        if iterations >= ITERATIONS:
            warnings.warn(f"the probe of unit {name} was not at its best after {ITERATIONS} iterations", stacklevel=2)
        found.append((name, (predicted == wanted.to(device)).double().mean().item()))
    return found


def _collected(features, loader, name, progress):
    """([pooled features (images, C) of each unit], labels (images,)) of a loader."""
    pooled, labels = [[] for _ in features.names], []
    bar = tqdm(loader, desc=name, total=length_of(loader), unit="batch", leave=False, disable=no_bar(progress))
    with features.evaluating():
        for batch in bar:
            for index, value in enumerate(features.of(batch)):
                value = features.pooled(index, value)
                pooled[index].append(value.float() if value.dtype.itemsize < 4 else value)
            labels.append(batch[1])
    if not sum(map(len, labels)):
        raise ValueError(f"the loader of {name} is empty: it gave no image, or it can be gone through only once")
    return [torch.cat(parts) for parts in pooled], torch.cat(labels)


def _by_scikit_learn(train, labels, test):
    """(predicted labels of test, iterations)."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            f"linear probes need the package scikit-learn, which does not import here ({error}): install it with pip "
            f"install scikit-learn, or leave the probes out"
        ) from None
    classifier = LogisticRegression(max_iter=ITERATIONS)
    pipeline = make_pipeline(StandardScaler(), classifier)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told of by the caller
        pipeline.fit(train.cpu().numpy(), labels.cpu().numpy())
    predicted = torch.from_numpy(pipeline.predict(test.cpu().numpy()))
    return predicted.to(test.device), int(classifier.n_iter_.max())


@torch.enable_grad()
def _by_torch(train, labels, test):
    """As `_by_scikit_learn`, on the features' device."""
    classes, labels = labels.unique(return_inverse=True)
    std, mean = torch.std_mean(train, 0, correction=0)
    std = torch.where(std > 0, std, 1)
    train, test = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(len(classes), train.shape[1], dtype=train.dtype, device=train.device, requires_grad=True)
    bias = torch.zeros(len(classes), dtype=train.dtype, device=train.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-4, line_search_fn="strong_wolfe"
    )
    # Of two classes scikit-learn has one vector of weights, w. Here they have w / 2 and -w / 2: half as many squares.
    penalty = (1 if len(classes) == 2 else 0.5) / len(labels)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(train, weight, bias), labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return classes[F.linear(test, weight, bias).argmax(1)], optimizer.state[weight]["n_iter"]
