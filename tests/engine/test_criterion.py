"""What a criterion may be."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext.engine.criterion import CrossEntropy, as_criterion


def test_what_stands_for_which():
    assert as_criterion(None) == as_criterion(nn.CrossEntropyLoss()) == CrossEntropy(0.0)
    smoothed = as_criterion(nn.CrossEntropyLoss(label_smoothing=0.1))
    assert smoothed == CrossEntropy(0.1) and as_criterion(smoothed) is smoothed
    assert str(smoothed) == "CrossEntropyLoss(label_smoothing=0.1)"
    logits, labels = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    assert torch.equal(smoothed(logits, labels), F.cross_entropy(logits, labels, label_smoothing=0.1))
    assert torch.equal(as_criterion(None)(logits, labels), F.cross_entropy(logits, labels))


class Own(nn.CrossEntropyLoss):
    pass


@pytest.mark.parametrize(
    ("given", "kind", "what"),
    [
        (nn.MSELoss(), TypeError, "MSELoss"),
        (nn.CrossEntropyLoss, TypeError, "the class CrossEntropyLoss"),
        (Own(), TypeError, "Own"),
        (F.cross_entropy, TypeError, "cross_entropy"),
        ("cross-entropy", TypeError, "str"),
        (0.1, TypeError, "float"),
        (nn.CrossEntropyLoss(torch.ones(10)), ValueError, "class weights"),
        (nn.CrossEntropyLoss(ignore_index=0), ValueError, "ignore_index=0"),
        (nn.CrossEntropyLoss(reduction="sum"), ValueError, "reduction='sum'"),
        (nn.CrossEntropyLoss(reduction="none"), ValueError, "reduction='none'"),
        (nn.CrossEntropyLoss(label_smoothing=1.5), ValueError, "label_smoothing=1.5"),
        (nn.CrossEntropyLoss(label_smoothing=-0.1), ValueError, "label_smoothing=-0.1"),
        (nn.CrossEntropyLoss(label_smoothing=float("nan")), ValueError, "label_smoothing=nan"),
    ],
)
def test_what_is_refused(given, kind, what):
    with pytest.raises(kind) as error:
        as_criterion(given)
    assert str(error.value) == (
        f"criterion must be None or torch.nn.CrossEntropyLoss() with no argument but label_smoothing, from 0 to 1, "
        f"given {what}"
    )
