"""What a training step's instructions take on this machine: predicted from what `auglocal calibrate` measured here.

A measured step is a `Sample`: its time beside what it depends on. A prediction is a baseline, the regression of the
samples of the same group on `costs`, times what the samples at the nearest `place` took relative to theirs.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..common.device import name_of_processor, usable_device
from ..common.files import write_json
from ..engine.nodes import Island
from ..optim import make_optimizer

__all__ = ["Calibration", "Sample", "calibration_file", "described", "load", "machine", "optimizer_sample", "save"]

KINDS = ("convolution", "step", "optimizer")  # what a group begins with
NEIGHBOURS = 4
# Larger tensors are new to the process whenever they are made, and their pages cost time: the most that the C library
# keeps when it is freed.
KEPT = 32 * 2**20


@dataclass(frozen=True)
class Sample:
    """A step, and what its time depends on.

    group: what kind of step it is, the most important first. Where no sample has the whole group, the ones that have
        the longest beginning of it stand in.
    costs: numbers that its time grows with, of which none decreases with the batch size.
    place: logarithms of what the speed depends on besides; none depends on the batch size of a convolution.
    nanoseconds: measured; 0: not measured.
    """

    group: tuple
    costs: tuple[float, ...]
    place: tuple[float, ...]
    nanoseconds: int = 0


class Calibration:
    """A clock: what `engine.timeline.timeline` predicts a step's nanoseconds by.

    Args:
        samples: measured ones, of steps and optimizers.
    """

    def __init__(self, samples):
        self.samples, self._models, self._known, self._optimizers = samples, {}, {}, {}

    def __call__(self, step, reads, made, macs):
        """The nanoseconds of a step; for arguments see `timeline`."""
        return self.predict(described(step, reads, made, macs))

    def optimizer(self, factory, parameters, state_bytes):
        """The nanoseconds of an optimizer's step.

        Args:
            factory: see `auglocal_ext.train`.
            parameters: a local module's.
            state_bytes: of the optimizer.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if factory not in self._optimizers:
            made = make_optimizer(factory, [("weight", nn.Parameter(torch.zeros(1)))])
            self._optimizers[factory] = type(made).__name__
        return self.predict(optimizer_sample(self._optimizers[factory], trained, state_bytes)) if trained else 0

    def predict(self, sample):
        """The nanoseconds of a Sample, a whole number."""
        if sample not in self._known:
            self._known[sample] = round(self._model(sample.group)(sample))
        return self._known[sample]

    def _model(self, group):
        if group not in self._models:
            for length in range(len(group), 0, -1):
                alike = [sample for sample in self.samples if sample.group[:length] == group[:length]]
                if alike:
                    break
            self._models[group] = _Model(alike)
        return self._models[group]


class _Model:
    """Predicts by samples of a group."""

    def __init__(self, samples):
        # Here, so that planning without times does not wait for it.
        from sklearn.linear_model import LinearRegression
        from sklearn.neighbors import KNeighborsRegressor

        costs, times = np.array([s.costs for s in samples]), np.array([s.nanoseconds for s in samples])
        scale = np.maximum(costs.max(0), 1)
        # The error that is least is relative: each sample counts alike, whatever it takes.
        fit = LinearRegression(fit_intercept=False, positive=True)
        self.rates = fit.fit(costs / scale / times[:, None], np.ones(len(times))).coef_ / scale
        self.relative = KNeighborsRegressor(min(NEIGHBOURS, len(samples)), weights="distance")
        self.relative.fit([s.place for s in samples], np.log(times / (costs @ self.rates)))

    def __call__(self, sample):
        return np.dot(sample.costs, self.rates) * math.exp(self.relative.predict([sample.place])[0])


# ---- what a step's time depends on --------------------------------------------------------------------------------


def described(step, reads, made, macs):
    """A step as a Sample without a time, by shapes and sizes of tensors alone; for arguments see `timeline`."""
    given = getattr(step.run, "args", ())
    made = made if isinstance(made, tuple | list) else (made,)
    before = {value.untyped_storage()._cdata for value in reads if isinstance(value, torch.Tensor)}
    made = [value for value in made if isinstance(value, torch.Tensor)]
    new = [value for value in made if value.untyped_storage()._cdata not in before]
    fresh = sum(value.nbytes for value in new if value.nbytes > KEPT)
    conv = next((value for value in given if isinstance(value, nn.Conv2d)), None)
    if conv is not None:
        forward = step.kind in ("conv", "recompute")
        x, y = (reads[0], made[0]) if forward else (reads[1], reads[0])
        return _convolution("conv" if forward else step.kind, conv, x, y, macs, fresh)
    island = next((value for value in given if isinstance(value, Island)), None)
    touched = [*(value for value in reads if isinstance(value, torch.Tensor)), *made]
    traffic = sum(value.nbytes for value in (*touched, *(() if island is None else island.parameters)))
    channels = max((value.shape[1] for value in touched if value.dim() == 4), default=1)
    maps = [sum(value.dim() == 4 for value in values) for values in (touched, new)]
    group = "step", step.kind, macs > 0, *maps
    return Sample(group, (1, traffic, fresh, macs), (math.log(max(traffic, 1)), math.log(channels)))


def _convolution(kind, conv, x, y, macs, fresh):
    """kind: of its three passes; x: what the convolution reads; y: what it makes."""
    weight = conv.weight[0]
    inputs, outputs, area = weight.shape[0], conv.out_channels // conv.groups, weight[0].numel()
    stride, size = math.prod(conv.stride), math.prod(x.shape[2:])
    group = "convolution", kind, conv.groups > 1, area > 1, stride > 1
    costs = 1, macs, fresh, conv.weight.numel(), x.numel(), y.numel()
    place = inputs, outputs, conv.groups, size, area, stride
    return Sample(group, costs, tuple(math.log(value) for value in place))


def optimizer_sample(name, parameters, state_bytes):
    """An optimizer's step as a Sample without a time; name: of its class."""
    sizes = [parameter.nbytes for parameter in parameters]
    touched, fresh = 3 * sum(sizes) + 2 * state_bytes, sum(size for size in sizes if size > KEPT)
    return Sample(("optimizer", name), (len(sizes), touched, fresh), (math.log(touched / len(sizes)),))


# ---- the file -----------------------------------------------------------------------------------------------------


def machine(device, precision):
    """What measured times hold for.

    Args:
        device: a torch.device, or its name.
        precision: "fp32", "bf16" or "fp16".
    """
    device = usable_device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name_of_processor()
    threads = torch.get_num_threads() if device.type == "cpu" else None
    return {"device": name, "threads": threads, "precision": precision, "torch": torch.__version__}


def calibration_file(about):
    """The path of the file for a `machine`, in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    # By the specification of XDG a path that is not absolute is to be ignored.
    folder = Path(folder) if os.path.isabs(folder) else Path.home() / ".cache"
    words = "-".join(str(value) for value in about.values() if value is not None)
    name = "".join(letter if letter.isalnum() or letter in ".-+" else "_" for letter in words)
    return folder / "auglocal_ext" / f"calibration-{name}.json"


def save(about, samples):
    """Writes what was measured on a `machine`; returns the path."""
    path = calibration_file(about)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**about, "samples": [asdict(sample) for sample in samples]})
    return path


def load(device, precision):
    """The Calibration of a device and a precision, as `auglocal calibrate` has measured them here.

    Raises:
        ValueError: nobody has, or the file cannot be read.
    """
    about = machine(device, precision)
    path, kind = calibration_file(about), torch.device(device).type
    remedy = f"run `auglocal calibrate --device {kind} --precision {precision}`"
    if not path.is_file():
        what = f"{about['device']} with {about['threads']} threads" if about["threads"] else about["device"]
        raise ValueError(f"times in {precision} are not known for {what} and torch {about['torch']}: {remedy}")
    try:
        written = json.loads(path.read_text())
        samples = [_sample(**sample) for sample in written["samples"]]
        if {sample.group[0] for sample in samples} != set(KINDS) or min(s.nanoseconds for s in samples) < 1:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} cannot be read as a calibration: {remedy} again") from None
    return Calibration(samples)


def _sample(group, costs, place, nanoseconds):
    return Sample(tuple(group), tuple(costs), tuple(place), nanoseconds)
