"""Labels and losses of every kind in whole steps: values, planned bytes, what counts, what is refused."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import LocalTrainer, evaluate, models, plan, train
from auglocal_ext.common.memory import LiveBytes
from auglocal_ext.training.divergence import TrainingDiverged

WEIGHTS = torch.linspace(0.5, 2, 10)


class Focal(nn.Module):
    """(1 - p)^2 x the cross-entropy, each class by its own weight."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weights", WEIGHTS.clone())

    def forward(self, logits, labels):
        shares = labels if labels.is_floating_point() else F.one_hot(labels, 10)
        log_p = logits.log_softmax(1)
        return -(self.weights.to(logits.dtype) * shares * (1 - log_p.exp()) ** 2 * log_p).sum(1).mean()


CRITERIA = {
    "plain": nn.CrossEntropyLoss(),
    "weighted": nn.CrossEntropyLoss(WEIGHTS),
    "weighted and smoothed": nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1),
    "a class ignored": nn.CrossEntropyLoss(WEIGHTS, ignore_index=3, label_smoothing=0.1),
    "focal": Focal(),
    "a function": lambda logits, labels: F.cross_entropy(logits / 2, labels),
}
RULES = {"auglocal": {"depth": 2, "modules": 2}, "bp": {"rule": "bp"}, "predsim": {"rule": "predsim", "modules": 2}}


def soft(labels):
    """Labels mixed with the next image's, as MixUp does."""
    shares = F.one_hot(labels, 10).float()
    return 0.7 * shares + 0.3 * shares.roll(1, 0)


def labels_for(criterion, labels, are_soft):
    """Some of them ignored, where the criterion can."""
    if are_soft:
        return soft(labels)
    ignored = getattr(criterion, "ignore_index", None)
    return labels if ignored is None else labels.where(labels != 2, ignored)


def net(fused=True):
    torch.manual_seed(0)
    model = models.CifarResNet(1)
    if not fused:  # a classifier of two layers is no Head
        model.fc = nn.Sequential(model.fc, nn.Linear(10, 10))
    return model


CASES = [
    (criterion, are_soft)
    for criterion in CRITERIA
    for are_soft in (False, True)
    if not (are_soft and criterion == "a class ignored")
]


@pytest.mark.covering(2)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("criterion", "are_soft"), CASES)
def test_a_step_is_that_of_autograd_on_each_module(batch, criterion, are_soft, fused, rule):
    criterion = copy.deepcopy(CRITERIA[criterion])
    images, labels = batch[0].double(), labels_for(criterion, batch[1], are_soft)
    labels = labels.double() if are_soft else labels
    torch.manual_seed(1)
    trainer = LocalTrainer(net(fused).double(), **RULES[rule], criterion=criterion, image_size=16)
    trainer.plan_for(images, labels)
    theirs = criterion.double() if isinstance(criterion, nn.Module) else criterion
    x = images
    for index, module in enumerate(trainer.local_modules):
        twin = copy.deepcopy(module)
        features, logits = twin(x)
        expected = theirs(logits, labels)
        if index < len(trainer.local_modules) - 1:
            (extra_weight, weight), extra = module.head.weights, twin.head.extra
            expected = weight * expected + (0 if extra is None else extra_weight * extra(features, labels, images))
        expected.backward()
        _, ours, loss = trainer.backward(index, x, labels, images)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours, logits.detach(), rtol=1e-10, atol=1e-12)
        for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10, msg=name)
        x = features.detach()
    own = not isinstance(criterion, nn.CrossEntropyLoss)
    is_head = any(step.kind == "linear and loss" for step in trainer._programs[-1].steps)
    assert is_head == (fused and not own)


@pytest.mark.covering(1)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("criterion", "are_soft"), CASES)
def test_planned_bytes_are_those_that_are_measured(batch, criterion, are_soft, fused, rule, precision):
    criterion = CRITERIA[criterion]
    images, labels = batch[0].contiguous(memory_format=torch.channels_last), labels_for(criterion, batch[1], are_soft)
    options = {**RULES[rule], "precision": precision, "criterion": criterion}
    model = net(fused)
    planned = plan(model, images.shape, **options, soft_labels=are_soft)
    trainer = LocalTrainer(model, plan=planned)
    trainer.step(images, labels)
    with LiveBytes([*trainer.tensors(), images, labels]) as live:
        trainer.step(images, labels)
    assert trainer.plan is planned and live.peak == planned.peak_bytes
    assert planned.batch_bytes == images.nbytes + labels.nbytes


def test_a_budget_counts_soft_labels_and_class_weights(tiny_model, batch):
    """The bytes of a budgeted plan, and of the step that `train` makes of it, have both in them."""
    images, labels = batch
    hard = plan(tiny_model, images.shape, 2, memory_budget="5MB")
    options = {"criterion": nn.CrossEntropyLoss(WEIGHTS), "memory_budget": "5MB"}
    planned = plan(tiny_model, images.shape, 2, soft_labels=True, **options)
    assert planned.peak_bytes == hard.peak_bytes + 8 * 10 * 4 - 8 * 8 + 10 * 4
    assert planned.comparison.eager.bytes > hard.comparison.eager.bytes
    result = train(tiny_model, [(images, soft(labels))] * 3, 2, epochs=1, progress=False, **options)
    assert result.plan.peak_bytes == result.peak_bytes == planned.peak_bytes


def test_soft_labels_after_class_numbers_are_planned_for_once(tiny_model, batch, recwarn):
    images, labels = batch
    trainer = LocalTrainer(tiny_model, 2)
    trainer.step(images, labels)
    hard, message = trainer.plan, r"\(8, 3, 16, 16\) with soft labels does not fit the plan for \(8, 3, 16, 16\): "
    with pytest.warns(UserWarning, match=message):
        trainer.step(images, soft(labels))
    assert trainer.plan.batch_bytes == hard.batch_bytes - labels.nbytes + soft(labels).nbytes
    planned = trainer.plan
    for given in (labels, soft(labels)):
        trainer.step(images, given)
    assert trainer.plan is planned and len(recwarn) == 0


# ---- what counts ----------------------------------------------------------------------------------------------------


def test_accuracy_and_loss_of_an_epoch_are_of_what_counts(tiny_model, batch):
    """Two batches, of which half of the labels and one are ignored."""
    images, labels = batch
    ignored = [labels.where(labels % 2 == 0, -100), labels.where(labels != 5, -100)]
    twin = copy.deepcopy(tiny_model)
    loader = [(images.contiguous(memory_format=torch.channels_last), given) for given in ignored]
    options = {"rule": "bp", "optimizer": torch.optim.SGD}
    result = train(tiny_model, loader, **options, epochs=1, schedule=None, progress=False)
    trainer = LocalTrainer(twin, **options)
    steps = [trainer.step(*given) for given in loader]
    right = sum((step.logits.argmax(1) == given).sum().item() for step, given in zip(steps, ignored, strict=True))
    (entry,) = result.history
    assert entry["train_accuracy"] == pytest.approx(right / (4 + 7))
    assert entry["loss"] == pytest.approx((4 * steps[0].loss.item() + 7 * steps[1].loss.item()) / 11, rel=1e-6)
    losses = F.cross_entropy(steps[0].logits, labels, reduction="none")[::2]
    assert steps[0].loss.item() == pytest.approx(losses.mean().item(), rel=1e-5)


def test_where_all_labels_are_ignored_the_loss_is_nan_and_no_weight_goes_bad(tiny_model, batch):
    trainer = LocalTrainer(tiny_model, 2, modules=2, optimizer=torch.optim.SGD)
    before = copy.deepcopy(tiny_model.state_dict())
    result = trainer.step(batch[0], torch.full((8,), -100))
    assert result.module_losses.isnan().all() and trainer.module_hits.tolist() == [0, 0]
    assert all(torch.equal(p, before[name]) for name, p in tiny_model.named_parameters())


def test_the_validations_loss_is_the_plain_cross_entropy(tiny_model, batch):
    loader = [batch]
    options = {"epochs": 1, "progress": False, "val_loader": loader}
    result = train(
        tiny_model, loader, 2, **options, criterion=lambda logits, labels: 7 * F.cross_entropy(logits, labels)
    )
    with torch.no_grad():
        expected = F.cross_entropy(tiny_model.eval()(batch[0]), batch[1])
    assert result.history[0]["val_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_loss_of_ones_own_that_ends_far_worse_is_told_without_a_guess(tiny_model, batch):
    scales = iter([1.0, 1, 1, 100, 100, 100])  # of the steps of two epochs

    def growing(logits, labels):
        return F.cross_entropy(logits, labels) * (1 if logits.is_meta else next(scales))

    options = {"rule": "bp", "optimizer": partial(torch.optim.SGD, lr=0.0), "schedule": None}
    with pytest.raises(TrainingDiverged, match=r"the classifier's loss was \d+.* in the first one: training diverged"):
        train(tiny_model, [batch] * 3, **options, epochs=2, criterion=growing, progress=False)


# ---- what is refused ------------------------------------------------------------------------------------------------

LABELS = torch.arange(8)
IGNORING = nn.CrossEntropyLoss(ignore_index=3)


@pytest.mark.parametrize(
    ("labels", "criterion", "kind", "message"),
    [
        (torch.ones(8, 9), None, ValueError, r"soft labels must be \(8, 10\), a share of each class .* shape \(8, 9\)"),
        (torch.ones(7, 10), None, ValueError, r"soft labels must be \(8, 10\), .* given shape \(7, 10\)"),
        (
            torch.ones(8, 10).double(),
            None,
            TypeError,
            r"soft labels must be torch.float32 .* call .to\(torch.float32\)",
        ),
        (
            torch.ones(8, 10).half(),
            None,
            TypeError,
            "soft labels must be torch.float32 like the model, given torch.float16",
        ),
        (torch.full((8, 10), torch.nan), None, ValueError, "soft labels must be finite, given NaN or infinite values"),
        (F.one_hot(LABELS, 10), None, ValueError, r"labels must be \(8,\), one per image, .*: take their .argmax\(1\)"),
        (LABELS - 100, None, ValueError, "labels must be from 0 to 9 .* given -99 to -93"),
        (LABELS + 3, IGNORING, ValueError, "labels must be from 0 to 9 .* given 4 to 10"),
        (LABELS.where(LABELS != 2, -100), IGNORING, ValueError, "labels must be from 0 to 9 .* given -100 to 7"),
        (soft(LABELS), IGNORING, ValueError, "labels must be class numbers with ignore_index=3, given soft ones"),
        (LABELS.where(LABELS != 2, -100), Focal(), ValueError, "labels must be from 0 to 9 .* given -100 to 7"),
    ],
)
def test_labels_that_are_refused(tiny_model, batch, labels, criterion, kind, message):
    before = copy.deepcopy(tiny_model.state_dict())
    trainer = LocalTrainer(tiny_model, 2, modules=2, criterion=criterion)
    with pytest.raises(kind, match=message):
        trainer.step(batch[0], labels)
    assert trainer.plan is None and all(torch.equal(t, before[name]) for name, t in tiny_model.state_dict().items())


def test_where_values_are_not_at_hand_they_are_flagged(tiny_model, batch):
    """What a CUDA device does, on the CPU: ignored labels stay what they are, others that are wrong are replaced."""
    images, labels = batch
    trainer, shares = LocalTrainer(tiny_model, 2, modules=2), soft(labels)
    trainer.plan_for(images, shares)
    trainer._values_are_at_hand = False
    assert trainer.step(images, labels.where(labels > 3, -100)).loss.isfinite()
    assert trainer.step(images, shares).loss.isfinite()
    trainer.check()
    shares[2, 3] = torch.inf
    assert trainer.step(images, shares).loss.isnan()
    assert all(p.isfinite().all() for p in tiny_model.parameters())
    with pytest.raises(ValueError, match="soft labels must be finite"):
        trainer.check()
    assert trainer.step(images, labels + 5).loss.isnan()
    with pytest.raises(ValueError, match="labels must be from 0 to 9"):
        trainer.check()


def test_a_validation_on_soft_labels_says_what_to_do(tiny_model, batch):
    with pytest.raises(
        ValueError, match=r"validation labels must be \(8,\), one per image, .*: take their .argmax\(1\)"
    ):
        evaluate(tiny_model, [(batch[0], soft(batch[1]))])


@pytest.mark.parametrize(
    ("criterion", "kind", "message"),
    [
        (nn.CrossEntropyLoss(torch.ones(5)), ValueError, r"criterion's weight must be \(10,\), one number per class"),
        (nn.CrossEntropyLoss(reduction="sum"), ValueError, "criterion must have reduction='mean'"),
        (lambda logits, labels: logits.detach().sum(), ValueError, "differentiate in the logits"),
        (lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"), TypeError, "floating-point scalar"),
        (lambda logits, labels: (logits * WEIGHTS).mean(), ValueError, "constant tensors belong into buffers"),
    ],
)
def test_losses_that_are_refused(tiny_model, batch, criterion, kind, message):
    before = copy.deepcopy(tiny_model.state_dict())
    with pytest.raises(kind, match=message):
        plan(tiny_model, batch[0].shape, 2, modules=2, criterion=criterion)
    with pytest.raises(kind, match=message):
        train(tiny_model, [batch], 2, modules=2, criterion=criterion, epochs=1, progress=False)
    assert all(torch.equal(t, before[name]) for name, t in tiny_model.state_dict().items())


def test_a_state_of_other_class_weights_is_refused(tiny_model):
    state = LocalTrainer(copy.deepcopy(tiny_model), 2, criterion=nn.CrossEntropyLoss(WEIGHTS)).state_dict()
    with pytest.raises(ValueError, match=r"saved with criterion CrossEntropyLoss\(.*weight=\[0.5, .*this trainer has"):
        LocalTrainer(tiny_model, 2, criterion=nn.CrossEntropyLoss(WEIGHTS.flip(0))).load_state_dict(state)
    LocalTrainer(tiny_model, 2, criterion=nn.CrossEntropyLoss(WEIGHTS)).load_state_dict(state)
