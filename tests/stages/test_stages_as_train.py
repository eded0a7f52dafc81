"""`train_stages` by two ranks against `train` by one process: whatever that does, they do."""

import math
import re
import warnings
from functools import partial
from itertools import starmap

import pytest
import torch
import torch.nn.functional as F
from ranks import together
from torch import nn

import auglocal_ext
from auglocal_ext import LocalTrainer, Rule, models, train_stages
from auglocal_ext.stages import costs
from auglocal_ext.stages.link import _Slot
from auglocal_ext.stages.trainer import StageTrainer


class Tokens(nn.Module):
    """A transformer's outside: parameters and buffers that are the model's, in no layer of it. `late` is of the second
    half, `scale` is used by both halves; buffers are in no state_dict."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.class_token, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 17, 8))
        self.late = nn.Parameter(torch.randn(1, 17, 8))
        self.register_buffer("scale", torch.rand(8) + 0.5, persistent=False)
        self.register_buffer("shift", torch.rand(8) - 0.5, persistent=False)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for layer in self.layers[:4]:
            x = F.gelu(layer(x * self.scale))
        x = x + self.late
        for layer in self.layers[4:]:
            x = F.gelu(layer(x * self.scale + self.shift))
        return self.head(x[:, 0])


def tokens(seed=0):
    torch.manual_seed(seed)
    return Tokens()


def resnet(seed=0):
    torch.manual_seed(seed)
    return models.CifarResNet(1)


def batches(sizes=(8, 8, 1, 6)):
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(n, 3, 16, 16, generator=generator) - 0.5 for n in sizes]
    return [(one, torch.randint(0, 10, (len(one),), generator=generator)) for one in images]


def now_and_then(logits, labels):
    """A loss that is NaN in some steps of some modules."""
    spoilt = logits[:4].sum() > logits[4:].sum()
    return F.cross_entropy(logits, labels) + torch.where(spoilt, torch.nan, 0.0)


CUT = {"modules": 4, "depth": 2}
COMMON = {"epochs": 2, "seed": 3, "progress": False, **CUT}
CASES = {  # a model, and arguments of both
    "parameters in no layer": (tokens, {}),
    "ignored labels": (resnet, {"criterion": nn.CrossEntropyLoss(ignore_index=3)}),
    "ignored labels, accumulated": (resnet, {"criterion": nn.CrossEntropyLoss(ignore_index=3), "accumulate": 2}),
    "steps that are skipped": (tokens, {"criterion": now_and_then, "nonfinite": "skip"}),
}


# Of an epoch, but for what time it took.
SAME = [
    *("loss", "train_accuracy", "module_losses", "module_accuracies", "skipped_steps", "lr"),
    *("val_loss", "val_accuracy", "val_top5_accuracy"),
]


def state_of(model):
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers()) if not t.is_meta}


def by_stages(make, **options):
    """One rank's part: (history, what the model has afterwards, warnings); its own model begins otherwise than rank
    0's."""
    model = make(torch.distributed.get_rank())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaders = [batches(), batches((5, 3))] if torch.distributed.get_rank() == 0 else [None, None]
        result = train_stages(model, loaders[0], val_loader=loaders[1], balance="arithmetic", **COMMON, **options)
    return result.history, state_of(model), [str(one.message) for one in caught]


def stopped_and_gone_on(folder):
    """As the first case, stopped behind the first epoch."""

    def stop(entry):
        if entry["epoch"] == 1:
            raise InterruptedError("a stop")

    with pytest.raises(InterruptedError):
        by_stages(tokens, checkpoint=folder, on_epoch=stop)
    return by_stages(tokens, checkpoint=folder)


def diverging(named_parameters):
    """An optimizer by which the last local module's weights become far too large."""
    last = any(name == "head.weight" for name, _ in named_parameters)
    return torch.optim.SGD([parameter for _, parameter in named_parameters], lr=1e30 if last else 0.01)


def late(epoch, epochs):
    return 1.0 if epoch >= 1 else 1e-30


DIVERGING = {"optimizer": diverging, "schedule": late}


class Counted(list):
    """Batches, and how many of them were read."""

    read = 0

    def __iter__(self):
        for batch in super().__iter__():
            self.read += 1
            yield batch


def diverged(train, loader, **options):
    """(what is said, the finished epochs, batches that were read)"""
    try:
        train(tokens(), loader, **COMMON, **DIVERGING, **options)
    except auglocal_ext.TrainingDiverged as error:
        return str(error), error.result.history, loader.read


def all_cases(folder):
    found = {name: by_stages(make, **options) for name, (make, options) in CASES.items()}
    found["gone on"] = stopped_and_gone_on(folder)
    long = Counted(batches([8] * 40))
    found["diverged"] = diverged(train_stages, long, balance="arithmetic", max_lag=1)
    return found


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return together(all_cases, folder, folder / "checkpoint", seconds=30)


@pytest.mark.filterwarnings("ignore:epoch")
@pytest.mark.parametrize("case", [*CASES, "gone on"])
def test_losses_and_weights_are_those_of_train(of_two_ranks, case):
    make, options = CASES.get(case, CASES["parameters in no layer"])
    model = make()
    whole = auglocal_ext.train(model, batches(), val_loader=batches((5, 3)), **COMMON, **options)
    (history, weights, _), (others, parts, _) = (found[case] for found in of_two_ranks)
    assert history == others and len(parts) < len(weights)
    for ours, theirs in zip(history, whole.history, strict=True):
        assert [name for name in SAME if ours[name] != theirs[name]] == []
    assert case != "steps that are skipped" or sum(entry["skipped_steps"] for entry in history) > 2
    expected = state_of(model)
    assert list(weights) == list(expected)
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []


def test_rank_0_says_that_a_batch_of_one_image_is_skipped(of_two_ranks):
    (_, _, first), (_, _, second) = (found["ignored labels"] for found in of_two_ranks)
    assert [re.match(r"epoch ./2: a batch of one image is skipped", one) is not None for one in first] == [True] * 2
    assert second == []


def test_every_rank_ends_with_what_train_says_of_a_loss_that_is_not_finite(of_two_ranks):
    first, second = (found["diverged"] for found in of_two_ranks)
    said, history, _ = diverged(auglocal_ext.train, Counted(batches([8] * 40)))
    pattern = (
        r"epoch 2/2, step \d+: the loss of local module 3 of 4 \(layers.5\) is not finite; its last finite one was"
    )
    assert re.match(pattern, said)
    assert first[0].split(";")[0] == said.split(";")[0] and first[0] == second[0]
    assert first[0].endswith(said[said.index(": training diverged; lower the learning rate") :])
    assert len(history) == len(first[1]) == 1 and first[1] == second[1]
    assert first[1][0]["loss"] == history[0]["loss"]
    assert 40 < first[2] < 50 and second[2] == 0  # the others were not read


# ---- one process -----------------------------------------------------------------------------------------------------


class Shared(Rule):
    """A rule of one's own whose nets read by the classifier's weights."""

    shares_readout = True

    def aux_net(self, border):
        layers = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(border.shape[0], 64)
        return nn.Sequential(*layers, nn.Linear(64, border.num_classes))


@pytest.mark.parametrize("given", [{"rule": Shared()}, {"auxiliary": "readout=shared"}], ids=["a rule", "auxiliary"])
def test_a_readout_that_follows_the_classifier_is_refused(given):
    with pytest.raises(
        ValueError, match=r"end in the classifier's weights.*: leave readout=shared out, .*shares_readout"
    ):
        StageTrainer(resnet(), *batches()[0], modules=2, **given)


def test_what_is_not_shared_is_not_refused_by_its_name():
    """One local module has no aux net."""
    StageTrainer(resnet(), *batches()[0], modules=1, auxiliary="readout=shared", balance="arithmetic")


@pytest.mark.parametrize("factor", [float("nan"), -1.0, "0.1"])
def test_a_factor_that_is_none_is_refused(factor):
    trainer = StageTrainer(resnet(), *batches()[0], balance="memory", **CUT)
    with pytest.raises(ValueError, match="^factor must be a finite number of at least 0 to multiply .*, given "):
        trainer.set_learning_rate_factor(factor)


@pytest.mark.parametrize("given", [{}, {"accumulate": 2}, {"accumulate": 2, "precision": "bf16"}], ids=str)
def test_alone_a_rank_needs_what_the_plan_says(given):
    trainer = StageTrainer(resnet(), *batches()[0], balance="memory", **CUT, **given)
    assert trainer.rank_bytes == [trainer.plan.peak_bytes]


def test_a_group_costs_what_stays_of_it_and_the_step_of_one():
    trainer = LocalTrainer(resnet(), image_size=16, accumulate=2, **CUT)
    trainer.plan_for(*batches()[0])
    plan, cost = trainer.plan, costs.cost_of(trainer, *batches()[0], "memory")
    own = [module.state_bytes + module.optimizer_bytes + module.gradient_bytes for module in plan.modules]
    step = [module.peak_bytes - sum(own) for module in plan.modules]
    for group in starmap(range, [(0, 4), (0, 2), (1, 3), (3, 4)]):
        assert cost(group) == sum(own[i] for i in group) + max(step[i] for i in group)


def test_by_time_a_module_costs_its_optimizers_step_too(monkeypatch):
    trainer = LocalTrainer(resnet(), image_size=16, accumulate=2, **CUT)
    trainer.plan_for(*batches()[0])
    monkeypatch.setattr(costs, "measured_seconds", lambda *given: [1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(costs, "optimizer_seconds", lambda factory, module, device: 0.5)
    cost = costs.cost_of(trainer, *batches()[0], "time")
    assert math.isclose(cost(range(1, 3)), 5.5)  # a step every second batch


def test_a_message_is_aligned():
    specs = [((3,), (1,), torch.int64), ((3, 1, 5, 7), (35, 35, 7, 1), torch.bfloat16), ((3, 2), (2, 1), torch.float64)]
    slot = _Slot(0, specs, "cpu")
    for value, tensor in enumerate(slot.tensors, 1):
        assert (tensor.data_ptr() - slot.bytes.data_ptr()) % 64 == 0
        tensor.fill_(value)
    slot.header.fill_(9)
    assert [tensor.unique().tolist() for tensor in slot.tensors] == [[1], [2], [3]]


def test_a_first_batch_of_one_image_is_refused():
    with pytest.raises(ValueError, match="the first batch must be the largest, and have at least 2 images: given 1"):
        train_stages(resnet(), batches((1, 8)), **COMMON)
    with pytest.raises(ValueError, match="nonfinite must be 'stop' or 'skip', given 'go on'"):
        train_stages(resnet(), batches(), nonfinite="go on", **COMMON)


def test_what_is_refused_leaves_the_model_as_it_is():
    trained, step = resnet(), partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    with pytest.raises(ValueError, match="schedule must be a function .* with several stages, given a scheduler's"):
        train_stages(trained, batches(), schedule=step, **COMMON)
    with pytest.raises(ValueError, match="accumulate must be a whole number of batches, at least 1, given 0"):
        train_stages(trained, batches(), accumulate=0, **COMMON)
    assert list(state_of(trained)) == list(state_of(resnet()))


def test_where_values_are_not_at_hand_a_bad_batch_is_told_behind_the_epoch():
    """What a GPU does, on the CPU."""
    good, other = batches((8, 8))
    trainer = StageTrainer(resnet(), *good, balance="arithmetic", **CUT)
    trainer._values_are_at_hand = False
    for bad in ((good[0] / 0, good[1]), (good[0], good[1] + 10)):
        with pytest.raises(ValueError, match="images must be finite|labels must be from 0 to 9"):
            trainer.epoch([good, bad, other])
    assert math.isfinite(trainer.epoch([good, other]).loss)


def standing_still(**options):
    """(why it stopped, how many epochs) of a training whose accuracy stays as it is."""
    still = {"optimizer": partial(torch.optim.SGD, lr=0.0), "epochs": 6, "progress": False, **CUT}
    result = train_stages(resnet(), batches((8, 8)), **still, **options)
    return result.stopped, len(result.history)


def test_patience(tmp_path):
    assert standing_still(patience=2, checkpoint=tmp_path) == ("patience", 3)
    assert standing_still(patience=2, checkpoint=tmp_path) == ("patience", 3)  # as it was left
    assert standing_still(patience=3, checkpoint=tmp_path) == ("patience", 4)
    assert standing_still(patience=5) == (None, 6)  # over with the last epoch, it stops nothing
    with pytest.raises(ValueError, match="patience must be a whole number of epochs, at least 1, given 0"):
        standing_still(patience=0)


def test_a_limit_of_time(tmp_path):
    """An epoch is ended; what goes on from there is given the time anew."""
    assert standing_still(max_seconds=0, checkpoint=tmp_path) == ("max_seconds", 1)
    assert standing_still(max_seconds=0, checkpoint=tmp_path) == ("max_seconds", 2)
    assert standing_still(max_seconds=600, checkpoint=tmp_path) == (None, 6)
    with pytest.raises(ValueError, match="max_seconds"):
        standing_still(max_seconds=-1)
