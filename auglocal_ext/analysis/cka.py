"""Linear CKA between the units of two models: how alike their features are, up to rotation and scale.

Centred kernel alignment (Kornblith et al. 2019, arXiv:1905.00414) with the unbiased estimate of HSIC (Song et al.
2012), summed over mini-batches and divided once at the end (Nguyen et al. 2021, arXiv:2010.15327): the biased one calls
features alike that are not, where they outnumber the images, and a mean of the batches' own ratios is biased too.
Between two sets of features of the same n images, with gram matrices K and L,

    HSIC = sum over i != j of U(K)[i, j] U(L)[i, j] / (n (n - 3)),
    U(K)[i, j] = K[i, j] - sum_l K[i, l] / (n - 2) - sum_l K[l, j] / (n - 2) + sum_lm K[l, m] / ((n - 1) (n - 2)),

sums over K without its diagonal. That is Song's estimate, written as a product of matrices (Szekely and Rizzo 2014): so
all pairs of units take one matrix product, and a unit's own HSIC, a sum of squares, cannot come out negative.
"""

import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from ..common.checks import check_pair, whole_number
from ..report import cka_picture
from ..training.divergence import NotFinite
from ..training.loaders import length_of, no_bar
from .features import Features

__all__ = ["CKA", "Products", "centred", "centred_gram", "cka", "products"]

LEAST = 4  # images in a batch that the estimate is defined for


@dataclass(frozen=True, eq=False)
class CKA:
    """What `cka` returns.

    Attributes:
        matrix: (units of one model, units of the other), float64, on the CPU: about 0 for unrelated features, a little
            below too, as the estimate is unbiased; 1 for features that are equal up to rotation, scale and an offset.
        rows, columns: the units' names.
        images: how many were used.
    """

    matrix: torch.Tensor
    rows: list[str]
    columns: list[str]
    images: int

    def save_picture(self, path, title="linear CKA", row_label="unit", column_label="unit") -> None:
        """Draws the matrix as an image file.

        Args:
            path: its suffix says which kind of image: .png, .pdf, .svg or another that matplotlib knows.
            title: above the picture, followed by the number of images.
            row_label, column_label: what the units are of.

        Raises:
            ValueError: another suffix.
            OSError: the file cannot be written.
        """
        labels = {"row_label": row_label, "column_label": column_label}
        cka_picture(self.matrix.numpy(), self.rows, self.columns, path, f"{title}, {self.images:,} images", **labels)


def cka(
    model_a: nn.Module, model_b: nn.Module, loader: Iterable, images: int | None = None, *, progress: bool = False
) -> CKA:
    """Linear CKA between every unit of one model and every unit of another one, or of the same one.

    Trainings of one seed begin with the same weights and see the same images in the same order: compare models of
    different seeds where that is not to count.

    Both see the same batches, in eval mode; no image's features are kept, so memory does not grow with their number. Of
    a batch of n images a matrix (n, n) is kept of every unit. Gram matrices are computed in the features' dtype, at
    least float32, all behind them in float64.

    Args:
        model_a, model_b: what `as_backbone` takes.
        loader: an iterable of (images, labels), batches of at least 4 images in random order: batches of one class tell
            only what is alike within a class. A batch that is shorter than the first one is left out.
        images: at most so many, in whole batches; None: all.
        progress: a progress bar.

    Returns:
        CKA, with a row for each unit of model_a. A unit whose features are the same for all images has no CKA: a
        warning names it, and its entries are 0.

    Raises:
        ValueError, TypeError: a model has no units, a batch does not fit it or is too small, or there is none.
        FloatingPointError: features are not finite.

    The formula and its sources are in the docstring of the module `auglocal_ext.analysis.cka`.
    """
    if model_a is model_b:
        return products([Features(model_a)], loader, images, progress).between(0, 0)
    models, labels = [Features(model_a), Features(model_b)], ["model_a", "model_b"]
    return products(models, loader, images, progress, labels).between(0, 1)


class Products:
    """The sums that CKA is a ratio of: HSIC of every two units of several models, but for a factor that all share.

    Args:
        names: of the units, a list for each model.
        labels: what messages call the models, if there are several.
    """

    def __init__(self, names: Sequence[list[str]], labels: Sequence[str] | None = None) -> None:
        self.names, self.labels, self.images = names, labels, 0
        count = sum(map(len, names))
        self.sums = torch.zeros(count, count, dtype=torch.float64)

    def add(self, grams: torch.Tensor) -> None:
        """Adds a batch of n images; grams: (units of all models, n, n), each by `centred_gram`. n is the same for all
        batches."""
        flat = grams.flatten(1)
        self.sums += (flat @ flat.T).cpu()
        self.images += grams.shape[1]

    def between(self, one: int, other: int) -> CKA:
        """The CKA of two models, `one` and `other` their numbers. FloatingPointError where features were not finite."""
        rows, columns = self._place(one), self._place(other)
        own = self.sums.diagonal()
        if not own.isfinite().all():
            spoilt = [name for name, finite in zip(self._all(), own.isfinite().tolist(), strict=True) if not finite]
            raise NotFinite(f"the features of unit {spoilt[0]} are NaN or infinite, or far too large")
        for index in sorted({*range(*rows), *range(*columns)}):
            if own[index] <= 0:
                warnings.warn(
                    f"unit {self._all()[index]} puts out the same for all images: it has no CKA, and 0 is put there",
                    stacklevel=3,
                )
        scale = own[slice(*rows), None].sqrt() * own[None, slice(*columns)].sqrt()
        matrix = torch.where(scale > 0, self.sums[slice(*rows), slice(*columns)] / scale, 0)
        return CKA(matrix, list(self.names[one]), list(self.names[other]), self.images)

    def _all(self):
        """The units' names, as messages tell them."""
        of = [f" of {label}" for label in self.labels] if self.labels else [""] * len(self.names)
        return [name + suffix for names, suffix in zip(self.names, of, strict=True) for name in names]

    def _place(self, model):
        begin = sum(map(len, self.names[:model]))
        return begin, begin + len(self.names[model])


def products(models: Sequence[Features], loader: Iterable, images=None, progress=False, labels=None) -> Products:
    """The Products of models on a loader's batches; for arguments and errors see `cka`, for labels `Products`."""
    if images is not None:
        images = whole_number(images, f"images must be a whole number of at least {LEAST}", LEAST)
    found = Products([model.names for model in models], labels)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(model.evaluating())
        bar = stack.enter_context(
            tqdm(desc="CKA", total=length_of(loader), unit="batch", leave=False, disable=no_bar(progress))
        )
        for batch in _whole_batches(loader, images):
            # Of different devices on that of the first one.
            grams = [centred_gram(features) for model in models for features in model.of(batch)]
            found.add(torch.stack([gram.to(grams[0].device) for gram in grams]))
            bar.update()
    if not found.images:
        raise ValueError("the loader is empty: it gave no batch, or it can be gone through only once")
    return found


def _whole_batches(loader, images):
    """Batches of as many images as the first one, of so many in all at most."""
    size, left = None, images
    for batch in loader:
        check_pair(batch, "the loader")
        if size is None:
            size = len(batch[0]) if left is None else min(len(batch[0]), left)
            if size < LEAST:
                raise ValueError(
                    f"CKA needs batches of at least {LEAST} images, given {size}: give a larger batch size"
                )
        if left is not None and left < size:
            return
        if len(batch[0]) >= size:
            yield [part[:size] for part in batch]
            left = None if left is None else left - size


def centred_gram(features: torch.Tensor) -> torch.Tensor:
    """U(K) of features (n, ...) whose gram matrix is K: (n, n), float64; see above."""
    x = features.flatten(1)
    x = x.float() if x.dtype.itemsize < 4 else x
    # U does not see an offset. Without this one small differences between large features are not lost in float32, and
    # those that are all equal give 0 to the bit.
    x = x - x[:1]
    return centred((x @ x.T).double())


def centred(gram: torch.Tensor) -> torch.Tensor:
    """U(K) of a gram matrix K, (n, n), which is overwritten by it; its diagonal is 0."""
    means = gram.fill_diagonal_(0).sum(1) / (len(gram) - 2)
    gram += means.sum() / (len(gram) - 1) - means[:, None] - means
    return gram.fill_diagonal_(0)
