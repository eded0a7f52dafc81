"""What a criterion may be."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext.engine.criterion import CrossEntropy, OwnLoss, as_criterion

WEIGHTS = torch.tensor([1.0, 0, 2.5, 1, 3])


def test_what_stands_for_which():
    assert as_criterion(None) == as_criterion(nn.CrossEntropyLoss()) == CrossEntropy(0.0)
    smoothed = as_criterion(nn.CrossEntropyLoss(label_smoothing=0.1))
    assert smoothed == CrossEntropy(0.1) and as_criterion(smoothed) is smoothed
    assert str(smoothed) == "CrossEntropyLoss(label_smoothing=0.1)"
    weighted = as_criterion(nn.CrossEntropyLoss(WEIGHTS, ignore_index=2))
    assert weighted == CrossEntropy(0.0, 2, (1.0, 0.0, 2.5, 1.0, 3.0)) != CrossEntropy(0.0, 2)
    assert str(weighted) == "CrossEntropyLoss(label_smoothing=0, ignore_index=2, weight=[1, 0, 2.5, 1, 3])"
    many, other = (str(as_criterion(nn.CrossEntropyLoss(torch.arange(11.0).roll(by)))) for by in (0, 1))
    assert many != other and len(many) < 70
    assert many.startswith("CrossEntropyLoss(label_smoothing=0, weight=(11 numbers, ")
    own = as_criterion(F.cross_entropy)
    assert own == OwnLoss(F.cross_entropy) and as_criterion(own) is own


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1),
        nn.CrossEntropyLoss(WEIGHTS),
        nn.CrossEntropyLoss(WEIGHTS, ignore_index=2),
    ],
)
def test_the_values_are_torchs(loss):
    logits, labels = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    ours = as_criterion(loss).on("cpu", torch.float32, 5)
    assert torch.equal(ours(logits, labels), loss(logits, labels))
    if loss.ignore_index < 0:
        shares = torch.rand(4, 5)
        assert torch.equal(ours(logits, shares), loss(logits, shares))


class Own(nn.CrossEntropyLoss):
    pass


@pytest.mark.parametrize(
    ("given", "words", "ignored"),
    [
        (nn.MSELoss(), "MSELoss()", None),
        (Own(ignore_index=3), "Own()", 3),
        (F.cross_entropy, "cross_entropy", None),
        (functools.partial(F.cross_entropy, ignore_index=3), "partial", None),
        (lambda logits, labels: logits.sum(), "test_what_is_a_loss_of_the_users_own.<locals>.<lambda>", None),
    ],
)
def test_what_is_a_loss_of_the_users_own(given, words, ignored):
    own = as_criterion(given)
    assert own.function is given and own.ignore_index == ignored and own.tensors == []
    assert str(own) == words or words.endswith("<lambda>")


class Focal(nn.Module):
    """(1 - p)^gamma x the cross-entropy, each class by its own weight; Lin et al. 2017 (arXiv:1708.02002)."""

    def __init__(self, weights, gamma=2.0):
        super().__init__()
        self.gamma = gamma
        self.register_buffer("weights", weights)

    def forward(self, logits, labels):
        log_p = logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
        return -(self.weights.to(logits.dtype)[labels] * (1 - log_p.exp()) ** self.gamma * log_p).mean()


def test_the_buffers_of_a_module_go_where_the_model_is():
    focal = Focal(WEIGHTS)
    own = as_criterion(focal)
    assert own.on("cpu", torch.float32, 5).function is focal and own.tensors == [focal.weights]
    without_data = own.on("meta", torch.float32, 5)
    assert [t.is_meta for t in without_data.tensors] == [True] and not focal.weights.is_meta
    logits = torch.empty(4, 5, device="meta", requires_grad=True)
    assert without_data(logits, torch.empty(4, dtype=torch.int64, device="meta")).shape == ()


def test_class_weights_have_the_models_dtype_and_device():
    weighted = as_criterion(nn.CrossEntropyLoss(WEIGHTS))
    assert weighted.tensors == []
    (weight,) = weighted.on("cpu", torch.float64, 5).tensors
    assert torch.equal(weight, WEIGHTS.double())
    assert weighted.on("meta", torch.float32, 5).weight.is_meta
    with pytest.raises(ValueError, match=r"criterion's weight must be \(7,\), one number per class .* shape \(5,\)"):
        weighted.on("cpu", torch.float32, 7)


class Trained(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, logits, labels):
        return F.cross_entropy(logits * self.temperature, labels)


def test_a_module_with_parameters_is_refused_where_they_would_be_trained():
    with pytest.raises(ValueError, match="criterion Trained has a parameter, temperature, which nothing would train"):
        as_criterion(Trained())
    frozen = Trained().requires_grad_(False)
    assert as_criterion(frozen).tensors == [frozen.temperature]


@pytest.mark.parametrize(
    ("given", "what"), [(nn.CrossEntropyLoss, "the class CrossEntropyLoss"), ("cross-entropy", "str"), (0.1, "float")]
)
def test_what_is_no_loss_is_refused(given, what):
    with pytest.raises(TypeError) as error:
        as_criterion(given)
    assert str(error.value) == (
        f"criterion must be None, a torch.nn.CrossEntropyLoss() or a function (logits, labels) -> scalar, given {what}"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "sum"}, "criterion must have reduction='mean', given reduction='sum'"),
        ({"reduction": "none"}, "criterion must have reduction='mean', given reduction='none'"),
        ({"label_smoothing": 1.5}, "criterion's label_smoothing must be from 0 to 1, given 1.5"),
        ({"label_smoothing": -0.1}, "criterion's label_smoothing must be from 0 to 1, given -0.1"),
        ({"label_smoothing": float("nan")}, "criterion's label_smoothing must be from 0 to 1, given nan"),
        ({"ignore_index": 1.5}, "criterion's ignore_index must be a whole number, given 1.5"),
        ({"ignore_index": None}, "criterion's ignore_index must be a whole number, given None"),
        ({"weight": torch.ones(2, 5)}, r"weight must be \(classes,\) of floating-point numbers, given \(2, 5\)"),
        ({"weight": torch.arange(5)}, r"weight must be \(classes,\) of floating-point numbers, .* of torch.int64"),
        ({"weight": torch.tensor([1.0, -2])}, "weight must be finite numbers of at least 0, given -2.0"),
        ({"weight": torch.tensor([1.0, torch.nan])}, "weight must be finite numbers of at least 0, given nan"),
        ({"weight": torch.tensor([torch.inf, 1])}, "weight must be finite numbers of at least 0, given inf"),
    ],
)
def test_options_of_the_cross_entropy_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        as_criterion(nn.CrossEntropyLoss(**options))


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (lambda x, y: F.cross_entropy(x, y, reduction="none"), TypeError, r"scalar, a tensor \(\), given \(4,\) of"),
        (lambda x, y: x.argmax(1).sum(), TypeError, r"a floating-point scalar, .* given \(\) of torch.int64"),
        (lambda x, y: 1.0, TypeError, "must return a floating-point scalar, .* given a float"),
        (lambda x, y: None, TypeError, "given a NoneType"),
        (lambda x, y: x.detach().sum(), ValueError, "differentiate in the logits, given a value that does not depend"),
        (
            lambda x, y: x.sum().item() * x.sum(),
            ValueError,
            r"does not run on logits \(4, 5\) and labels \(4,\) of tor",
        ),
        (lambda x, y: (x * torch.ones(5)).sum(), ValueError, "constant tensors belong into buffers of an nn.Module"),
        (
            nn.BCEWithLogitsLoss(),
            ValueError,
            r"criterion BCEWithLogitsLoss\(\) does not run on .* without data, as plan",
        ),
    ],
)
def test_what_a_function_may_not_do(function, kind, message):
    own = as_criterion(function).on("meta", torch.float32, 5)
    logits = torch.empty(4, 5, device="meta", requires_grad=True)
    with pytest.raises(kind, match=message):
        own(logits, torch.empty(4, dtype=torch.int64, device="meta"))


def test_errors_of_a_function_on_real_tensors_stay_what_they_are():
    def broken(logits, labels):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        as_criterion(broken)(torch.ones(4, 5), torch.zeros(4).long())


def test_a_function_is_given_float32_at_least():
    given = []
    own = as_criterion(lambda logits, labels: given.append(logits.dtype) or logits.sum())
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        own(torch.ones(4, 5, dtype=dtype), None)
    assert given == [torch.float32, torch.float32, torch.float64]
