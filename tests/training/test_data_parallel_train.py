"""`train` by two ranks: what they end with, what is written, where it goes on, and what ends all of them."""

import os
import shutil
import signal
import time
import warnings
from functools import partial

import comparisons
import pytest
import torch
from ranks import Raised, together
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from auglocal_ext import LocalTrainer, data, models, train
from auglocal_ext.distributed.group import world
from auglocal_ext.training.epoch import Sums
from auglocal_ext.training.state import random_state

CUT = {"depth": 2, "modules": 2, "optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9)}
OPTIONS = CUT | {"seed": 3}
STEPS = {"clip_norm": 1.0, "accumulate": 2}


def model():
    torch.manual_seed(5 + world().rank)  # of which rank 0's are trained
    return models.CifarResNet(1, num_classes=10)


def images(count=26):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 10


def loader(distributed=True):
    dataset = TensorDataset(*images())
    if not distributed:
        return DataLoader(dataset, batch_size=4)
    return DataLoader(dataset, batch_size=4, sampler=DistributedSampler(dataset, seed=2))


def in_memory():
    """A loader with a place, from which a training can go on."""
    pixels, labels = torch.randint(0, 256, (24, 3, 8, 8), generator=torch.Generator().manual_seed(1)), images(24)[1]
    given = torch.full((3,), 0.5), torch.full((3,), 0.2)
    return data.DeviceLoader(
        pixels.to(torch.uint8), labels, 4, *given, augment=True, pad=1, part=(world().rank, world().size)
    )


def state_of(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def trained(folder):
    """Trainings that go well, in one start of the processes."""
    rank, found = world().rank, {}
    own_statistics, entries = [], []

    def on_step(epoch, step, result):
        own_statistics.append(nets[-1].bn1.running_mean.clone())

    nets = [model()]
    pixels, labels = images()
    part = [(pixels[rank::2], labels[rank::2])]
    options = OPTIONS | {"epochs": 2, "ema": 0.5}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = train(nets[0], loader(), val_loader=part, on_step=on_step, on_epoch=entries.append, **options)
    found["warned"] = [str(one.message) for one in warned if "DistributedSampler" in str(one.message)]
    found["state"], found["ema"], found["history"] = state_of(nets[0]), state_of(result.ema_model), result.history
    found["statistics"], found["bytes"] = own_statistics[0], (result.plan.peak_bytes, result.peak_bytes)
    assert entries == result.history
    nets.append(model())
    again = train(nets[-1], loader(), val_loader=[(pixels, labels)], **options, progress=False)
    found["whole"] = state_of(nets[-1]), [entry["val_accuracy"] for entry in again.history]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        train(model(), loader(distributed=False), epochs=1, **OPTIONS)
    found["warned of all"] = [str(one.message) for one in warned if "DistributedSampler" in str(one.message)]
    found["checkpoints"] = checkpoints(folder)
    found["rates"] = default_rate()
    return found


def checkpoints(folder):
    """The weights of a training that was never stopped, of one that went on behind an epoch, and of those that were
    stopped within one, on rank 1 by Ctrl-C or on both by the clock, or in a validation, and went on."""
    options, ends = OPTIONS | STEPS | {"schedule": None}, []
    net = model()
    train(net, in_memory(), epochs=2, **options)
    ends.append(state_of(net))
    for epochs in (1, 2):
        net = model()
        train(net, in_memory(), epochs=epochs, checkpoint=folder / "epochs", **options)
    ends.append(state_of(net))

    def interrupts(epoch, step, result):
        if (epoch, step, world().rank) == (2, 1, 1):
            os.kill(os.getpid(), signal.SIGINT)

    class Interrupting(list):
        """Images to validate on, after the first of which rank 1 is interrupted."""

        def __iter__(self):
            yield self[0]
            if world().rank == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield self[0]

    stops = {"on_step": interrupts}, {"max_seconds": 1e-9}, {"val_loader": Interrupting([images(4)])}
    for stop in stops:
        where, how = folder / next(iter(stop)), []
        try:
            result = train(model(), in_memory(), epochs=2, checkpoint=where, **stop, **options)
            how.append(result.stopped)
        except KeyboardInterrupt as error:
            how.append(str(error))
        saved = torch.load(where / "last.pt", weights_only=True)
        how.append((saved["epoch"], saved["sums"]["steps"], len(saved["others"])))
        if world().first:
            shutil.copytree(where, folder / "within" / where.name)
        net = model()
        train(net, in_memory(), epochs=2, checkpoint=where, **options)
        ends.append((state_of(net), how))
    return ends


def default_rate():
    """Of batches of 4 by two ranks."""
    options = {name: value for name, value in OPTIONS.items() if name != "optimizer"}
    return train(model(), loader(), epochs=1, schedule=None, **options).history[0]["lr"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def both(folder):
    found = together(trained, folder / "ranks", folder, seconds=30, limit=300)
    assert not any(isinstance(one, Raised) for one in found), found
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_rank_ends_with_the_same_model_and_history(both):
    first, second = both
    assert same(first["state"], second["state"]) and same(first["ema"], second["ema"])
    assert first["history"] == second["history"] and len(first["history"]) == 2
    assert not torch.equal(first["statistics"], second["statistics"])  # each rank's own until the epoch's end
    assert first["bytes"][0] == first["bytes"][1] == second["bytes"][1]


def test_the_history_is_of_all_ranks(both):
    entry, net = both[0]["history"][-1], models.CifarResNet(1)
    net.load_state_dict(both[0]["state"])
    net.eval()
    pixels, labels = images()
    with torch.no_grad():
        logits = net(pixels)
    assert entry["val_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert entry["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert entry["images_per_second"] * entry["seconds"] == pytest.approx(24)
    # Of 13 images on each rank, a batch of one of which is left out on both: 24 count.
    assert (entry["train_accuracy"] * 24) == pytest.approx(round(entry["train_accuracy"] * 24))


def test_whole_validation_loaders_come_to_what_parts_come_to(both):
    states, accuracies = both[0]["whole"]
    assert same(states, both[0]["state"])
    assert accuracies == [entry["val_accuracy"] for entry in both[0]["history"]]


def test_a_loader_that_gives_every_rank_all_images_is_told_once(both):
    assert [found["warned"] for found in both] == [[], []]
    assert [len(found["warned of all"]) for found in both] == [1, 0]
    assert "each of 2 ranks trains on every batch of its loader, which has no Distri" in both[0]["warned of all"][0]


def test_the_default_learning_rate_counts_all_ranks_images(both):
    assert [found["rates"] for found in both] == [0.1 * 8 / 128] * 2


def test_a_training_goes_on_to_the_bit_as_one_that_was_never_stopped(both):
    for found in both:
        whole, by_epochs, *stopped = found["checkpoints"]
        assert same(whole, by_epochs) and all(same(whole, ended) for ended, _ in stopped)
        assert [how for _, how in stopped] == [
            ["training interrupted after 1 whole epoch", (1, 2, 1)],
            ["max_seconds", (0, 1, 1)],
            ["training interrupted after 0 whole epochs", (0, 3, 1)],
        ]
    assert same(both[0]["checkpoints"][0], both[1]["checkpoints"][0])


@pytest.mark.parametrize(
    ("where", "epoch", "again"),
    [("epochs", 2, None), ("within/max_seconds", 0, "; epoch 1, which was under way, begins again")],
    ids=["behind an epoch", "within one"],
)
def test_one_process_goes_on_from_two(both, folder, where, epoch, again):
    """From the weights and momenta that they left, with batches of its own from an epoch's beginning."""
    where, expected = folder / where, model()
    state = torch.load(where / "last.pt", weights_only=True)["trainer"]
    trainer = LocalTrainer(expected, image_size=8, **CUT, **STEPS)
    if again:
        with pytest.raises(ValueError, match="the state is within a group of batches that 2 ranks accumulate together"):
            trainer.load_state_dict(state)
        state["stepper"] |= {"count": 0, "gradients": [[], []]}
    trainer.load_state_dict(state)
    torch.manual_seed(OPTIONS["seed"])
    batches = in_memory()
    batches.set_epoch(epoch)
    for given in batches:
        trainer.step(*given)
    net = model()
    with pytest.warns(
        UserWarning, match="has a training by 2 ranks, which goes on with 1: learning rates are "
    ) as told:
        result = train(
            net, in_memory(), epochs=epoch + 1, checkpoint=where, schedule=None, progress=False, **OPTIONS, **STEPS
        )
    [told] = [str(one.message) for one in told if "goes on with" in str(one.message)]
    assert again is None or told.endswith(again)
    assert len(result.history) == epoch + 1 and same(state_of(net), state_of(expected))


def test_after_an_epochs_batches_only_its_validation_is_left(both, folder):
    """What both ranks had of it is one's then; no step is taken."""
    where, net = folder / "within" / "val_loader", model()
    saved = torch.load(where / "last.pt", weights_only=True)
    parts = [saved["sums"], saved["others"][0][2]]
    with pytest.warns(UserWarning, match="has a training by 2 ranks, which goes on with 1") as told:
        options = OPTIONS | STEPS | {"schedule": None, "progress": False}
        result = train(net, in_memory(), epochs=1, val_loader=[images(4)], checkpoint=where, **options)
    assert not any("begins again" in str(one.message) for one in told)
    losses, counted, hits = (sum(part[name] for part in parts) for name in ("losses", "counted", "hits"))
    assert result.history[0]["module_losses"] == pytest.approx((losses.double() / counted).tolist())
    assert result.history[0]["module_accuracies"] == pytest.approx((hits / 24).tolist()) and counted[0] == 24
    weights = {name: value for name, value in saved["trainer"]["model"].items() if "num_batches" not in name}
    assert all(torch.equal(net.state_dict()[name], value) for name, value in weights.items())
    assert result.peak_bytes == 0  # of no step


def test_more_ranks_have_of_an_epoch_what_fewer_had():
    def part(value):
        tensors = dict.fromkeys(("losses", "counted", "judged", "hits"), torch.tensor([value, 0]))
        return tensors | {"seen": value, "steps": 3, "over": True}

    found = [Sums.shared_out([part(1), part(2), part(3)], rank, 2) for rank in range(2)]
    assert [one["seen"] for one in found] == [4, 2] and [one["losses"].tolist() for one in found] == [[4, 0], [2, 0]]
    found = [Sums.shared_out([part(5)], rank, 2) for rank in range(2)]
    assert [one["seen"] for one in found] == [5, 0] and found[1]["hits"].tolist() == [0, 0] and found[1]["steps"] == 3


def as_of_two_ranks(path, **changes):
    """Makes a checkpoint of one process one of two, alike but for rank 0's `changes`."""
    saved = torch.load(path, weights_only=True)
    own = [saved["trainer"]["random"], saved["trainer"]["stepper"]["gradients"], saved["sums"], saved["loader"]]
    saved["trainer"] |= changes
    torch.save(saved | {"others": [own]}, path)


def test_the_first_epochs_images_are_in_the_order_that_all_ranks_drew(tmp_path, nothing_compared):
    options = OPTIONS | {"checkpoint": tmp_path, "progress": False}
    train(model(), in_memory(), epochs=1, max_seconds=1e-9, **options)
    as_of_two_ranks(tmp_path / "last.pt", random=random_state(torch.device("cpu")) | {"torch": seeded(99)})
    batches = in_memory()
    with pytest.warns(UserWarning, match="epoch 1, which was under way, begins again"):
        train(model(), batches, epochs=2, **options)
    assert batches.state_dict()["seed"] == OPTIONS["seed"]


def seeded(seed):
    return torch.Generator().manual_seed(seed).get_state()


def test_a_scheduler_that_counts_steps_is_not_gone_on_from_by_other_ranks(tmp_path, nothing_compared):
    def one_cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12)

    options = OPTIONS | {"checkpoint": tmp_path, "schedule": one_cycle, "progress": False}
    train(model(), in_memory(), epochs=1, **options)
    as_of_two_ranks(tmp_path / "last.pt")
    with pytest.raises(ValueError, match="OneCycleLR counts steps, .* go on with 2 ranks as before, or train from the"):
        train(model(), in_memory(), epochs=2, **options)


@pytest.mark.parametrize(
    ("schedule", "lr", "told"),
    [
        (lambda epoch, epochs: 1.0, 0.02, "learning rates are by the optimizer that is given now, and what"),
        (lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), 0.025, "are as its schedulers had them"),
    ],
    ids=["function", "schedulers"],
)
def test_learning_rates_of_another_number_of_ranks(tmp_path, nothing_compared, schedule, lr, told):
    options = OPTIONS | {"checkpoint": tmp_path, "schedule": schedule, "progress": False}
    train(model(), in_memory(), epochs=1, **options)
    as_of_two_ranks(tmp_path / "last.pt")
    options["optimizer"] = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    with pytest.warns(UserWarning, match=told):
        history = train(model(), in_memory(), epochs=2, **options).history
    assert [entry["lr"] for entry in history] == pytest.approx([0.05, lr])


# ---- what ends all ranks ---------------------------------------------------------------------------------------------


class Unknown:
    """A loader that cannot tell its length, of so many batches."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        for _ in range(self.count):
            yield images(4)


class Known(Unknown):
    def __len__(self):
        return self.count


class Breaks(Unknown):
    """A loader that raises."""

    def __iter__(self):
        yield from super().__iter__()
        raise OSError("the disk is gone")


def failing(how):
    """(what it raised, seconds since rank 1 failed)"""
    comparisons.leave_out()
    rank, began = world().rank, []

    def on_step(epoch, step, result):
        if step == 2:
            began.append(time.monotonic())
            if rank == 1 and how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == 1 and how == "raises":
                raise RuntimeError("on_step has a bug")
            if rank == 1 and how == "hangs":
                time.sleep(3)

    def bad_gradient(gradient):
        if began and rank == 1 and how == "within a step":
            raise ArithmeticError("a hook has a bug")

    net = model()
    net.layer2[0].conv1.weight.register_hook(bad_gradient)
    loaders = {"unknown lengths": Unknown(3 + rank), "lengths": Known(3 + rank)}
    loaders["loader"] = Breaks(2) if rank else Unknown(4)
    started = time.monotonic()
    try:
        train(net, loaders.get(how, Known(4)), epochs=1, on_step=on_step, progress=False, **OPTIONS)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - (began[0] if began else started)
    return None


ENDED = "the loader of rank 0 ended after 3 batches, another rank's has more: every rank must have as many, as with a "
LENGTHS = "rank 1 has batches in an epoch 4, rank 0 has 3: give every rank the same"


@pytest.mark.parametrize(
    ("how", "first", "second"),
    [
        ("raises", "RankFailed: rank 1 stopped: RuntimeError: on_step has a bug", "RuntimeError: on_step has a bug"),
        ("within a step", "RankFailed: rank 1 stopped: ArithmeticError: a hook has a bug", "ArithmeticError: a hook "),
        ("loader", "RankFailed: rank 1 stopped: OSError: the disk is gone", "OSError: the disk is gone"),
        ("killed", "RankFailed: rank 1 ended in ", None),
        ("hangs", "RankFailed: rank 1 did not answer for 2 s in ", "RankFailed: "),
        ("unknown lengths", ENDED, ENDED),
        ("lengths", LENGTHS, LENGTHS),
    ],
)
def test_a_rank_that_fails_ends_all(tmp_path, how, first, second):
    """Soon, and not when the time for an answer is over."""
    found = together(failing, tmp_path / "ranks", how, seconds=2 if how == "hangs" else 30)
    for one, sentence in zip(found, (first, second), strict=True):
        assert (one is None) == (sentence is None), found
        assert one is None or (sentence in one[0] and one[1] < 15), found
