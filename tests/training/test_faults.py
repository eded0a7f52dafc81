"""What goes wrong under a training: a loader, its workers, the disk, the numbers. The last checkpoint stays whole."""

import errno
import os
import resource
import signal

import processes
import pytest
import torch
from test_checkpoint import SGD, loader, model, same
from torch import nn
from torch.utils.data import DataLoader, Dataset

from auglocal_ext import LocalTrainer, TrainingDiverged, models, train

pytestmark = pytest.mark.usefixtures("nothing_compared")

OPTIONS = {"depth": 2, "seed": 3, "progress": False, "optimizer": SGD}


def saved(folder):
    return torch.load(folder / "last.pt", weights_only=True)


class Fails:
    """A loader that raises in its second epoch, and has ended before."""

    def __init__(self, error):
        self.batches, self.error, self.passes = list(loader("DeviceLoader")), error, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.passes += 1
        yield self.batches[0]
        if self.passes > 1:
            raise self.error
        yield from self.batches[1:]


def test_a_loader_that_raises_is_told_as_it_is(tmp_path):
    net, error = model().eval(), KeyError("image 7")
    batches = Fails(error)
    with pytest.raises(KeyError) as told:
        train(net, batches, epochs=2, checkpoint=tmp_path, **OPTIONS)
    assert told.value is error and not net.training
    assert saved(tmp_path)["epoch"] == 1 and not list(tmp_path.glob(".*"))
    trained = model()
    result = train(trained, batches.batches, epochs=2, checkpoint=tmp_path, **OPTIONS)
    expected = model()
    train(expected, batches.batches, epochs=2, **OPTIONS)
    assert [entry["epoch"] for entry in result.history] == [1, 2] and same(trained.state_dict(), expected.state_dict())


class Dies(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        if index == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 8, 8), index % 10


def test_a_worker_that_dies_is_told(tmp_path):
    batches = DataLoader(Dies(), batch_size=8, num_workers=1, prefetch_factor=1)
    with pytest.raises(RuntimeError, match="DataLoader worker .* (is killed by signal|exited unexpectedly)"):
        train(model(), batches, epochs=1, checkpoint=tmp_path, **OPTIONS)
    assert not (tmp_path / "last.pt").exists() and not list(tmp_path.glob(".*"))


def train_on_a_disk_that_fills_up(folder, size, told):
    def fill(entry):
        if entry["epoch"] == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        train(model(), loader("DeviceLoader"), 2, epochs=3, progress=False, checkpoint=folder, on_epoch=fill)
    except OSError as error:
        told.put(str(error))


def test_a_disk_that_is_full_costs_the_newest_checkpoint_only(tmp_path):
    train(model(), loader("DeviceLoader"), 2, epochs=1, progress=False, checkpoint=tmp_path / "first")
    size = (tmp_path / "first" / "last.pt").stat().st_size // 2  # half of what a checkpoint takes
    told = processes.FORKS.SimpleQueue()
    process = processes.begun(train_on_a_disk_that_fills_up, tmp_path / "run", size, told)
    process.join()
    assert process.exitcode == 0 and not told.empty()
    expected = f"{tmp_path}/run/last.pt cannot be written: {os.strerror(errno.EFBIG)}; free some space there"
    assert told.get().startswith(expected)
    assert saved(tmp_path / "run")["epoch"] == 1 and {"last.pt", "best.pt"} == set(os.listdir(tmp_path / "run"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] in (-1, resource.RLIM_INFINITY)


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    net = model()
    with pytest.raises(OSError, match="file.* cannot be written: .*; choose another checkpoint"):
        train(net, loader("DeviceLoader"), epochs=1, checkpoint=tmp_path / "file" / "run", **OPTIONS)
    assert same(net.state_dict(), model().state_dict())


def test_out_of_memory_says_what_was_planned(tmp_path, monkeypatch):
    steps = iter(range(10))

    def step(self, *batch):
        if next(steps) == 4:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, *batch)

    real = LocalTrainer.step
    monkeypatch.setattr(LocalTrainer, "step", step)
    with pytest.raises(torch.OutOfMemoryError):
        train(model(), loader("DeviceLoader"), epochs=3, checkpoint=tmp_path, checkpoint_minutes=0, **OPTIONS)
    assert (saved(tmp_path)["epoch"], saved(tmp_path)["sums"]["steps"]) == (1, 1)


# ---- values that are not finite ----------------------------------------------------------------------------------


class Breaks(nn.Module):
    """Multiplies by infinity in one of its training forwards."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, x):
        if not self.training or x.device.type == "meta":
            return x
        self.calls += 1
        return x * (torch.inf if self.calls == self.at else 1.0)


def breaking(at):
    net = model()
    net.layer2[0].bn2 = nn.Sequential(net.layer2[0].bn2, Breaks(at))
    return net


def test_a_loss_that_is_not_finite_names_module_step_and_what_was_before(tmp_path):
    losses = []
    told = {"on_step": lambda epoch, step, result: losses.append(result.module_losses.tolist())}
    given = {"epochs": 3, "modules": 2, "checkpoint": tmp_path, "checkpoint_minutes": 0}
    with pytest.raises(TrainingDiverged) as error:
        train(breaking(5), loader("DeviceLoader"), **OPTIONS | given | told)
    assert len(losses) == 4
    first, second = (f"{loss:.4g}" for loss in losses[-1])
    told = "the loss of local module 1 of 2 (layer2.0 .. layer3.0) is not finite"
    told += f"; its last finite one was {second} (of all modules: "
    assert str(error.value).startswith(f"epoch 2/3, step 2: {told}")
    assert f", {second}): training diverged; lower the learning rate" in str(error.value) and first != second
    assert (saved(tmp_path)["epoch"], saved(tmp_path)["sums"]["steps"]) == (1, 1)  # none of what was spoilt
    assert [entry["epoch"] for entry in error.value.result.history] == [1]


def test_a_step_that_is_not_finite_can_be_left_out():
    net = breaking(5)
    before = {}

    def look(epoch, step, result):
        if (epoch, step) == (2, 1):
            before.update({name: value.clone() for name, value in net.state_dict().items()})
        if (epoch, step) == (2, 2):
            now = net.state_dict()
            first = [name for name in now if name.startswith(("conv1", "bn1", "layer1"))]
            assert not torch.equal(now["conv1.weight"], before["conv1.weight"])  # this module took its step
            assert all(torch.equal(now[name], before[name]) for name in now if name not in first)
            assert int(now["fc.weight"].isfinite().all())

    given = {"epochs": 2, "modules": 2, "nonfinite": "skip", "on_step": look, "val_loader": loader("DeviceLoader")}
    history = train(net, loader("DeviceLoader"), **OPTIONS | given).history
    assert [entry["skipped_steps"] for entry in history] == [0, 1]
    assert all(value.isfinite().all() for value in net.state_dict().values())
    assert all(0 < loss < 10 for loss in history[1]["module_losses"])


def test_a_skipped_step_is_counted_once_where_the_training_goes_on(tmp_path):
    given = {"epochs": 2, "modules": 2, "nonfinite": "skip", "checkpoint": tmp_path}
    train(breaking(1), loader("DeviceLoader"), max_seconds=0, **OPTIONS | given)
    assert saved(tmp_path)["sums"]["skipped"] == 1
    history = train(breaking(-1), loader("DeviceLoader"), **OPTIONS | given).history
    assert [entry["skipped_steps"] for entry in history] == [1, 0]


def test_nothing_but_skipped_steps_is_a_divergence():
    net = model()
    net.layer2[0].bn2 = nn.Sequential(net.layer2[0].bn2, Always())
    message = r"epoch 1/2: the loss of local module 1 was finite in no step: training diverged"
    with pytest.raises(TrainingDiverged, match=message):
        train(net, loader("DeviceLoader"), epochs=2, modules=2, nonfinite="skip", **OPTIONS)


class Always(nn.Module):
    def forward(self, x):
        return x * torch.inf if x.device.type == "cpu" else x


def test_gradients_that_are_not_finite_are_left_out_too(batch):
    class Overflows(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.inf

    class Layer(nn.Module):
        def forward(self, x):
            return Overflows.apply(x)

    torch.manual_seed(0)
    net = models.CifarResNet(1)
    net.layer1[0].bn2 = nn.Sequential(net.layer1[0].bn2, Layer())
    trainer = LocalTrainer(net, rule="bp", optimizer=SGD)
    trainer.nonfinite = "skip"
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = trainer.step(*batch)
    assert result.loss.isfinite() and trainer.skipped_steps == [1]
    assert same(before, net.state_dict())


def test_finite_steps_are_the_same_with_either():
    states = []
    for nonfinite in ("stop", "skip"):
        net = model()
        train(net, loader("DeviceLoader"), epochs=2, modules=2, nonfinite=nonfinite, **OPTIONS)
        states.append(net.state_dict())
    assert same(*states)
