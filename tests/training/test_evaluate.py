"""What an evaluation tells of a model whose outputs are known."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import Evaluation, evaluate, evaluation


class Votes(nn.Module):
    """Gives its input out: the "images" are the logits."""

    def forward(self, x):
        return x


def test_loss_accuracies_and_confusion_over_all_batches():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 7, generator=generator), torch.randint(6, (50,), generator=generator)
    loader = list(zip(logits.split(16), labels.split(16), strict=True))
    loader.insert(1, (torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64)))
    found = evaluation(Votes(), loader)

    assert found.images == 50
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert found.top1 == evaluate(Votes(), loader) == (ranks == 0).sum().item() / 50
    assert found.top5 == (ranks < 5).sum().item() / 50
    confusion = torch.zeros(7, 7, dtype=torch.int64)
    for label, predicted in zip(labels, logits.argmax(1), strict=True):
        confusion[label, predicted] += 1
    assert torch.equal(found.confusion, confusion) and found.confusion.dtype == torch.int64
    found.confusion.add_(1).sub_(1)  # the user's own, to be written to
    for label in range(6):
        of_class = labels == label
        assert found.per_class[label] == pytest.approx((ranks[of_class] == 0).double().mean().item())
    assert found.per_class[6] is None  # no image is of this class


def test_it_prints_short():
    found = Evaluation(0.25, 0.9, 0.99, 12345, torch.zeros(10, 10, dtype=torch.int64))
    assert str(found) == "12,345 images: loss 0.2500, top-1 90.00%, top-5 99.00%"
    assert "tensor" not in repr(found)
    few = evaluation(Votes(), [(torch.eye(3), torch.arange(3))])
    assert few.top5 is None and str(few) == f"3 images: loss {math.log(math.e + 2) - 1:.4f}, top-1 100.00%"


class Masked(nn.Module):
    def forward(self, x):
        return x.masked_fill(torch.tensor([False, True]), -math.inf)


def test_a_masked_class_that_an_image_is_of_has_an_infinite_loss():
    found = evaluation(Masked(), [(torch.zeros(1, 2), torch.tensor([1]))])
    assert found.loss == math.inf and found.top1 == 0


class Half(nn.Module):
    def forward(self, x):
        return x.bfloat16()


def test_half_precision_is_summed_in_full():
    """bfloat16 outputs: a sum of a thousand in bfloat16 would be off by whole percents."""
    loader = [(torch.tensor([[1.0, 0.0]]).expand(1000, 2), torch.zeros(1000, dtype=torch.int64))]
    found = evaluation(Half(), loader, precision="bf16")
    assert found.loss == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-5)


def test_a_precision_that_there_is_none_of():
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, fp16, given 'fp8'"):
        evaluation(Votes(), [(torch.eye(3), torch.arange(3))], precision="fp8")
