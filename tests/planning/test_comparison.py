"""What a step costs otherwise: each figure is that of the plan or of the step itself, and a cut of no use is told."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from auglocal_ext import LocalTrainer, models, plan
from auglocal_ext.common.memory import LiveBytes, MultiplyAccumulates, tensors_of
from auglocal_ext.planning.comparison import FEWER

SHAPE = (8, 3, 16, 16)


@pytest.mark.parametrize(
    "options",
    [
        {"modules": 2},
        {"rule": "predsim", "precision": "bf16"},
        {"recompute": True, "optimizer": partial(torch.optim.AdamW, lr=1e-3)},
        {"rule": "bp"},
        {"rule": "checkpoint"},
    ],
)
def test_this_engines_figures_are_those_of_their_plans(tiny_model, options):
    planned = plan(tiny_model, SHAPE, 2, **options)
    others = {name: options[name] for name in ("precision", "optimizer") if name in options}
    cut, bp, checkpoint = planned, *(plan(tiny_model, SHAPE, rule=rule, **others) for rule in ("bp", "checkpoint"))
    for cost, other in zip(("cut", "bp", "checkpoint"), (cut, bp, checkpoint), strict=True):
        found = getattr(planned.comparison, cost)
        assert (found.bytes, found.macs) == (other.peak_bytes, other.macs / other.bp_macs)
    assert planned.comparison.bp.macs == planned.comparison.eager.macs == 1
    assert planned.comparison.modules == len(planned.modules)


def test_eager_figures_are_those_of_eager_steps(tiny_model, batch):
    """With a larger batch, so that the peak is that of activations; checkpoints: see `eager_bytes`."""
    images, labels = torch.randn(64, 3, 16, 16), torch.arange(64) % 10
    comparison = plan(tiny_model, images.shape, 2, memory_format=torch.contiguous_format).comparison
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(2):
        state = [value["momentum_buffer"] for value in optimizer.state.values()]
        with LiveBytes([*tensors_of(tiny_model), *state, images, labels]) as live, MultiplyAccumulates() as counted:
            F.cross_entropy(tiny_model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    # autograd keeps what the criterion makes and counts of batches a little longer than a plan does.
    assert comparison.eager.bytes == pytest.approx(live.peak, rel=1e-3)
    assert counted.count == plan(tiny_model, images.shape, rule="bp").macs
    assert comparison.eager_checkpoint.bytes < comparison.eager.bytes
    assert 1.2 < comparison.eager_checkpoint.macs < 4 / 3


def test_an_optimizers_scratch_counts_in_eager_steps_too(tiny_model):
    adam = partial(torch.optim.AdamW, lr=1e-3, foreach=True)
    small = plan(tiny_model, (2, 3, 8, 8), rule="bp", optimizer=adam).comparison
    parameters = sum(p.nbytes for p in tiny_model.parameters())
    # Parameters, two moments, gradients, and for a moment what foreach makes of them.
    assert small.eager.bytes > 5 * parameters
    assert small.eager.bytes == pytest.approx(small.bp.bytes, rel=0.01)


def test_the_lines(tiny_model):
    lines = str(plan(models.CifarResNet(2), (64, 3, 16, 16), 2, modules=3).comparison).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "this cut, 3 modules",
        "BP on this engine, rule='bp'",
        "every unit checkpointed, rule='checkpoint'",
        "eager BP",
        "eager BP, every unit checkpointed",
    ]
    assert all(line.endswith(" x BP") and " MB  MACs " in line for line in lines)
    assert len(set(map(len, lines))) == 1 and len(lines[0]) <= 100
    lines = str(plan(tiny_model, (64, 3, 16, 16), rule="bp").comparison).splitlines()
    assert len(lines) == 4 and lines[0].startswith("this cut, 1 module: BP on this engine, rule='bp'  ")


def test_a_cut_that_needs_more_than_backpropagation_names_what_does_not():
    model, shape = models.resnet20(), (8, 3, 16, 16)
    planned = plan(model, shape, 4)
    others = {count: plan(model, shape, 4, modules=count).peak_bytes for count in FEWER if count < len(planned.modules)}
    best = min(others, key=others.get)
    assert others[best] < planned.comparison.bp.bytes < planned.peak_bytes
    assert planned.comparison.warning == (
        f"a step of this cut needs {planned.peak_bytes / 1e6:.3g} MB, more than the "
        f"{planned.comparison.bp.bytes / 1e6:.3g} MB of backpropagation on this engine: cut with modules={best}, which "
        f"needs {others[best] / 1e6:.3g} MB"
    )
    text = " ".join(str(planned).split())
    assert f"warning: {planned.comparison.warning}" in text
    assert plan(model, shape, 4, modules=best).comparison.warning is None


def test_where_no_cut_is_smaller_backpropagation_is_named(tiny_model):
    planned = plan(tiny_model, (2, 3, 16, 16), 2)
    assert len(planned.modules) > 2
    assert planned.comparison.warning.endswith("of backpropagation on this engine: train with rule='bp'")


def test_figures_that_read_the_same_are_told_to_the_byte(tiny_model, monkeypatch):
    monkeypatch.setattr("auglocal_ext.planning.comparison.format_bytes", lambda size: "1 MB")
    planned = plan(tiny_model, (2, 3, 16, 16), 2)
    assert f"needs {planned.peak_bytes:,} bytes, more than" in planned.comparison.warning


def test_a_cut_that_would_share_a_weight_is_not_named():
    model = models.CifarResNet(2)
    model.layer1[1].conv1.weight = model.layer1[0].conv2.weight
    borders = LocalTrainer(model, 2, borders=(2, 3, 4, 5))  # modules=4 would cut between the two
    borders.plan_for(torch.randn(2, 3, 16, 16), compare=True)
    assert borders.plan.comparison.warning is not None


def test_under_a_budget_nothing_is_told_twice():
    model, shape = models.CifarResNet(2), (64, 3, 16, 16)
    bp = plan(model, shape, rule="bp")
    planned = plan(model, shape, 3, memory_budget=bp.peak_bytes)
    assert planned.comparison == planned.choice.comparison and planned.comparison.cut == planned.comparison.bp
    text = str(planned.choice)
    assert text.splitlines()[0].startswith("budget ") and "1 module: BP on this engine, rule='bp'  " in text
    assert [text.count(what) for what in ("rule='bp'", "rule='checkpoint'", "eager BP ", "next smaller")] == [1] * 4
    smaller = plan(model, shape, 3, memory_budget=bp.peak_bytes - 1)
    assert len(smaller.modules) > 1 and "next cheaper: 1 module: BP on this engine" in str(smaller)
    assert str(smaller).count(str(smaller.choice)) == 1 and "this cut" not in str(smaller)


def test_a_trainer_compares_when_asked(tiny_model, batch):
    trainer = LocalTrainer(tiny_model, 2)
    trainer.step(*batch)
    assert trainer.plan.comparison is None
    trainer.plan_for(batch[0], compare=True)
    planned = plan(tiny_model, SHAPE, 2, memory_format=torch.contiguous_format)
    assert trainer.plan.comparison == planned.comparison and trainer.plan == planned
    before = trainer.plan
    trainer.plan_for(batch[0], compare=True)
    assert trainer.plan is before
    with pytest.warns(UserWarning, match="planning again"):  # and compared with a step of that batch
        trainer.plan_for(torch.cat([batch[0], batch[0]]))
    assert trainer.plan.comparison.cut.bytes == trainer.plan.peak_bytes > before.peak_bytes
    fresh = LocalTrainer(tiny_model, 2)
    fresh.plan_for(batch[0], compare=True)
    assert fresh.plan.comparison == planned.comparison
