"""Layer parallel training by two ranks, against one process."""

import os
import re
import time

import pytest
import torch
from ranks import Raised, together

from auglocal_ext import LocalTrainer, models, train_stages
from auglocal_ext.distributed.collectives import gathered
from auglocal_ext.optim import sgd
from auglocal_ext.stages import link
from auglocal_ext.stages.trainer import StageTrainer

CUT = {"modules": 4, "depth": 2}


def batches(last=5):
    """Four of random images, the last one smaller."""
    generator = torch.Generator().manual_seed(1)
    sizes = (8, 8, 8, last)
    images = [torch.rand(n, 3, 16, 16, generator=generator) - 0.5 for n in sizes]
    return [(one, torch.randint(0, 10, (len(one),), generator=generator)) for one in images]


def model():
    torch.manual_seed(0)
    return models.CifarResNet(1)


def by_one(epochs=2, factor=0.5, **options):
    """Of one process: the weights afterwards, and each step's losses."""
    trained = model()
    trainer, losses = LocalTrainer(trained, image_size=16, **CUT, **options), []
    for epoch in range(epochs):
        trainer.set_learning_rate_factor(factor**epoch)
        for images, labels in batches():
            losses.append(trainer.step(images.to(memory_format=torch.channels_last), labels).module_losses)
    return trained.state_dict(), torch.stack(losses)


def equal(ours, theirs):
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def by_two(options):
    """One rank's part: (weights on rank 0, entries, spans, bytes of parameters here, planned bytes of every rank)."""
    trained = model()
    trainer = StageTrainer(trained, *batches()[0], **CUT, **options)
    entries = []
    for epoch in range(2):
        trainer.set_learning_rate_factor(0.5**epoch)
        entries.append(trainer.epoch(batches()))
    here = sum(p.nbytes for p in (*trained.parameters(), *trainer.aux_nets.parameters()) if not p.is_meta)
    states = [state for optimizer in trainer.stage.optimizers for state in optimizer.state.values()]
    state = sum(tensor.nbytes for one in states for tensor in one.values() if tensor is not None)
    return trainer.gather(), entries, trainer.spans, here, state, trainer.rank_bytes


CASES = [
    {"schedule": "decoupled"},
    {"schedule": "synchronous", "balance": "arithmetic"},
    {"rule": "dgl", "balance": "memory", "max_lag": 1},
    {"rule": "infopro", "max_lag": 3},
    {"precision": "bf16", "accumulate": 2, "clip_norm": 1.0},
]


def all_cases():
    return [by_two(options) for options in CASES]


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    return together(all_cases, tmp_path_factory.mktemp("ranks") / "cases", seconds=30)


@pytest.mark.parametrize("case", range(len(CASES)), ids=str)
def test_two_ranks_train_as_one_process(of_two_ranks, case):
    first, second = (found[case] for found in of_two_ranks)
    placed = ("schedule", "balance", "max_lag")
    weights, losses = by_one(**{name: value for name, value in CASES[case].items() if name not in placed})
    assert equal(weights, first[0]) and second[0] is None
    sizes = torch.tensor([len(labels) for _, labels in batches()])
    for epoch, (ours, theirs) in enumerate(zip(first[1], second[1], strict=True)):
        assert ours == theirs
        expected = (losses[4 * epoch : 4 * epoch + 4].double() * sizes[:, None]).sum(0) / sizes.sum()
        torch.testing.assert_close(torch.tensor(ours.module_losses, dtype=torch.float64), expected, rtol=1e-5, atol=0)
        assert ours.loss == ours.module_losses[-1] and 0 <= ours.train_accuracy <= 1


def test_a_rank_holds_its_own_modules_alone(of_two_ranks):
    first, second = (found[1] for found in of_two_ranks)
    assert first[2] == second[2] and [*first[2][0], *first[2][1]] == list(range(4))
    trained = model()
    trainer = LocalTrainer(trained, **CUT)
    parameters = [sum(p.nbytes for p in module.parameters()) for module in trainer.local_modules]
    for rank, found in enumerate((first, second)):
        expected = sum(parameters[index] for index in found[2][rank])
        assert found[3] == found[4] == expected  # the weights, and their momentum
    assert first[5] == second[5] and all(own > 0 for own in first[5])


# ---- at most so many batches ahead -----------------------------------------------------------------------------------


def sent_at(max_lag):
    """When rank 0 has sent each of its messages, in seconds from the first, while rank 1 takes two seconds for its
    first batch."""
    trainer = StageTrainer(model(), *batches()[0], max_lag=max_lag, balance="arithmetic", **CUT)
    release, send, times = link.Receiver.release, link.Sender.send, []

    def late(receiver):
        time.sleep(0 if times else 2)
        times.append(None)
        release(receiver)

    def timed(sender, batch):
        send(sender, batch)
        times.append(time.monotonic())

    link.Receiver.release, link.Sender.send = late, timed
    trainer.epoch(batches())
    link.Receiver.release, link.Sender.send = release, send
    return [at - times[0] for at in times if at is not None]


def test_a_rank_goes_ahead_by_max_lag_batches_and_no_more(tmp_path):
    times = together(sent_at, tmp_path / "lag", 2, seconds=30)[0]
    assert len(times) == 6  # four batches, and the end for each of the buffers
    assert times[1] < 1.8 < times[2], times


# ---- whole trainings, and checkpoints --------------------------------------------------------------------------------


def whole_training(folder):
    """Three epochs, and the same stopped after one and gone on from."""
    options = {"progress": False, "balance": "arithmetic", "seed": 0, "optimizer": sgd(64), **CUT}
    straight = model()
    result = train_stages(straight, batches(), epochs=3, **options)

    def stop(entry):
        if entry["epoch"] == 1:
            raise InterruptedError("a stop")

    with pytest.raises(InterruptedError):
        train_stages(model(), batches(), epochs=3, checkpoint=folder, on_epoch=stop, **options)
    stopped = model()
    again = train_stages(stopped, batches(), epochs=3, checkpoint=folder, **options)
    names = sorted(path.name for path in folder.iterdir())
    whole = [
        {name: tensor.clone() for name, tensor in trained.state_dict().items() if not tensor.is_meta}
        for trained in (straight, stopped)
    ]
    losses = [[entry["module_losses"] for entry in one.history] for one in (result, again)]
    return whole, losses, names, gathered(len(whole[0]), "a test")


def test_a_training_goes_on_from_its_checkpoint(tmp_path):
    (first, second) = together(whole_training, tmp_path / "ranks", tmp_path / "checkpoint", seconds=30)
    (straight, stopped), losses, names, counts = first
    assert equal(straight, stopped) and losses[0] == losses[1] and len(losses[0]) == 3
    assert names == ["step-3"]
    assert counts[0] == len(model().state_dict()) > counts[1] > 0


def one_epoch(folder):
    train_stages(model(), batches(), epochs=1, checkpoint=folder, progress=False, seed=0, schedule=None, **CUT)


def test_one_rank_goes_on_from_the_checkpoint_of_two(tmp_path):
    folder = tmp_path / "checkpoint"
    together(one_epoch, tmp_path / "ranks", folder, seconds=30)
    straight, resumed = model(), model()
    options = {"epochs": 2, "progress": False, "seed": 0, "schedule": None, **CUT}
    whole = train_stages(straight, batches(), **options)
    ours = train_stages(resumed, batches(), checkpoint=folder, **options)
    assert equal(straight.state_dict(), resumed.state_dict())
    assert [entry["module_losses"] for entry in ours.history] == [entry["module_losses"] for entry in whole.history]
    with pytest.raises(ValueError, match="is of another model or cut: its model.* has shape"):
        train_stages(models.CifarResNet(2), batches(), checkpoint=folder, epochs=2, progress=False, **CUT)


# ---- faults ---------------------------------------------------------------------------------------------------------


def faults(what):
    options = dict(CUT)
    if what == "modules":
        options["modules"] = 1
    if what == "depth" and torch.distributed.get_rank():
        options["depth"] = 3
    loader = batches()
    if what == "larger":
        loader = [(images.repeat(k, 1, 1, 1), labels.repeat(k)) for k, (images, labels) in enumerate(loader, 1)]
    trainer = StageTrainer(model(), *batches()[0], balance="arithmetic", **options)
    if what == "killed" and torch.distributed.get_rank():
        os._exit(1)
    if what == "killed at the end" and torch.distributed.get_rank():
        trainer.stage.stepper.flush = lambda: (time.sleep(0.5), os._exit(1))  # rank 0 waits for nothing but the totals
    if what == "raises" and torch.distributed.get_rank():
        trainer.stage._programs[0] = None
    trainer.epoch(loader)


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("modules", "1 local module cannot be spread over 2 stages", "1 local module cannot be spread"),
        ("depth", "rank 1 has .*depth.* 3, rank 0 has 2", "rank 1 has .*depth.* 3, rank 0 has 2"),
        ("killed", "rank 1 ended in what rank 1 takes", None),
        ("killed at the end", "rank 1 ended in the end of an epoch", None),
        ("raises", "rank 1 stopped: AttributeError", "'NoneType' object has no attribute 'run'"),
        ("larger", "the first batch must be the largest", "rank 0 stopped: ValueError: a batch has a tensor of shape"),
    ],
)
def test_every_rank_ends_and_says_why(tmp_path, what, first, second):
    began = time.monotonic()
    found = together(faults, tmp_path / "ranks", what, seconds=5, limit=30)
    assert time.monotonic() - began < 30
    for one, expected in zip(found, (first, second), strict=True):
        if expected is None:
            assert one is None
        else:
            assert isinstance(one, Raised), one
            assert re.search(expected, one.message), one
