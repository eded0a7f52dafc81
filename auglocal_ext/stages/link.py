"""What goes from one stage to the next: a batch's features and labels, in one message, sent while both compute.

Every batch is one message of the same size, in fixed buffers: of a smaller batch only the beginning counts. Receives
are posted ahead, into a ring of buffers. The receiver acknowledges a batch when it needs its features no longer; a
sender is at most as many batches ahead as there are buffers. With that it can ask for no more, which ends the epoch.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..distributed.collectives import own_group
from ..distributed.faults import answering
from ..distributed.group import among
from .grid import BORDER

__all__ = ["Batch", "Receiver", "Sender"]

HEADER = 2  # float64 numbers: images in the batch, 0 at an epoch's end; the factor of the learning rates
ALIGNED = 64  # bytes: as torch's own memory is, which kernels are fastest on


@dataclass
class Batch:
    """What a stage works on.

    Attributes:
        features: its first module's input, (N, ...).
        labels: (N,), or (N, classes).
        images: the step's, where a loss further on looks at them, else None.
        rate: the factor of the learning rates in this step.
    """

    features: torch.Tensor | None  # None in a message that ends an epoch
    labels: torch.Tensor | None = None
    images: torch.Tensor | None = None
    rate: float = 1.0

    @property
    def tensors(self):
        return [tensor for tensor in (self.labels, self.features, self.images) if tensor is not None]


class _Slot:
    """The memory of one message: a header, and the tensors of a batch behind one another, each from a multiple of
    ALIGNED bytes on.

    number: of the slot, alike on both sides. specs: of each tensor its shape, strides and dtype.
    """

    def __init__(self, number, specs, device):
        sizes = [math.prod(shape) * dtype.itemsize for shape, _, dtype in specs]
        begins, end = [], HEADER * torch.float64.itemsize
        for size in sizes:
            begins.append(-(-end // ALIGNED) * ALIGNED)
            end = begins[-1] + size
        self.bytes = torch.zeros(end, dtype=torch.uint8, device=device)
        self.header = self.bytes[: HEADER * torch.float64.itemsize].view(torch.float64)
        self.tensors = []
        for (shape, strides, dtype), begin, size in zip(specs, begins, sizes, strict=True):
            self.tensors.append(self.bytes[begin : begin + size].view(dtype).as_strided(shape, strides))
        self.number, self.work = number, None

    def put(self, batch):
        count = 0 if batch.features is None else len(batch.features)
        for place, value in zip(self.header, (count, batch.rate), strict=True):
            place.fill_(value)  # a copy from the host would wait for the device
        for ours, given in zip(self.tensors, batch.tensors, strict=False):
            ours[:count].copy_(given)

    def batch(self, has_images):
        count, rate = self.header.tolist()
        if not count:
            return None
        labels, features, *images = (tensor[: int(count)] for tensor in self.tensors)
        # All modules of the stage look at these; the features are the first one's alone.
        return Batch(features, labels.clone(), images[0].clone() if has_images else None, rate)


def _specs(batch):
    return [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in batch.tensors]


class _End:
    """Of a border, on this rank.

    Args:
        border: the ranks of the two stages, see `Grid.border`; their group has been made.
        peer: which of them is at the other end, 0 or 1.
        buffers: how many batches may be under way.
    """

    def __init__(self, border, peer, buffers, device):
        self._border, self._peer, self._count, self._device = border, border[peer], buffers, device
        self._slots: list[_Slot] = []

    @property
    def bytes(self):
        """Of the buffers."""
        return sum(slot.bytes.nbytes for slot in self._slots)

    @contextlib.contextmanager
    def _within(self, what):
        """Around what is sent and received."""
        with among(self._border), answering(what):
            yield


class Sender(_End):
    """The end of a border that sends; for the arguments see `_End`.

    Attributes:
        stopped: whether the next stage has asked for no more batches; those that come all the same it takes.
    """

    def __init__(self, border, buffers, device):
        super().__init__(border, 1, buffers, device)
        self._sent, self._acknowledged, self._specs = 0, 0, None
        self.stopped = False

    def send(self, batch):
        """Sends a copy; waits where too many are under way. The first batch tells how large the buffers are."""
        if not self._slots:
            self._open(batch)
        elif batch.features is not None:
            self._check(batch)
        self._wait(self._count - 1)
        slot = self._slots[self._sent % self._count]
        with self._answering():
            if slot.work is not None:
                slot.work.wait()
            slot.put(batch)
            slot.work = dist.isend(slot.bytes, self._peer, group=own_group(BORDER), tag=slot.number)
        self._sent += 1

    def end(self):
        """Ends an epoch: a message without images for every buffer of the receiver's, which so waits for nothing more;
        returns when it needs none of what was sent."""
        for _ in range(self._count):
            self.send(Batch(None))
        self.drain()

    def drain(self):
        """Waits until the next stage needs none of what was sent."""
        self._wait(0)

    def _wait(self, under_way):
        stopped = torch.zeros(1, dtype=torch.int64)  # on the CPU, which no kernel has to wait for
        while self._sent - self._acknowledged > under_way:
            with self._answering():
                dist.recv(stopped, self._peer, group=own_group(BORDER))
            self.stopped |= bool(stopped)
            self._acknowledged += 1

    def _open(self, batch):
        self._specs = _specs(batch)
        with self._answering():
            dist.send_object_list(
                [self._specs, batch.images is not None], self._peer, group=own_group(BORDER), device="cpu"
            )
        self._slots = [_Slot(number, self._specs, self._device) for number in range(self._count)]

    def _check(self, batch):
        for tensor, (shape, _, dtype) in zip(batch.tensors, self._specs, strict=False):
            if tensor.shape[1:] != shape[1:] or tensor.dtype != dtype or len(tensor) > shape[0]:
                raise ValueError(
                    f"a batch has a tensor of shape {tuple(tensor.shape)} and {tensor.dtype}, the first batch's was "
                    f"{shape} and {dtype}: with several stages the first batch must be the largest, and all of one kind"
                )

    def _answering(self):
        return self._within(f"what rank {self._peer} takes of local modules before it")


class Receiver(_End):
    """The end of a border that receives; for the arguments see `_End`.

    Attributes:
        stop: whether to ask for no more batches, with what is acknowledged from now on.
    """

    def __init__(self, border, buffers, device):
        super().__init__(border, 0, buffers, device)
        self._taken, self._has_images, self._posted = 0, False, False
        self._told: list = []  # acknowledgements under way, with their memory
        self.stop = False

    def receive(self):
        """The next Batch, its features in a buffer that is the caller's until `release`; None at an epoch's end."""
        if not self._slots:
            self._open()
        if not self._posted:
            for slot in self._in_order():
                self._post(slot)
            self._posted = True
        batch = self._arrived(self._in_order()[0]).batch(self._has_images)
        if batch is not None:
            return batch
        for slot in self._in_order():
            self._arrived(slot)
            self._acknowledge()
        for _, work in self._told:
            with self._answering():
                work.wait()
        self._told, self._posted = [], False
        return None

    def release(self):
        """Gives the buffer back in which the batch was."""
        self._post(self._in_order()[0])
        self._acknowledge()

    def _in_order(self):
        """The buffers from the next one on."""
        at = self._taken % self._count
        return self._slots[at:] + self._slots[:at]

    def _arrived(self, slot):
        if slot.work is not None:  # which may be waited for once
            with self._answering():
                slot.work.wait()
            slot.work = None
        return slot

    def _acknowledge(self):
        """Under way until the rank before asks for it, which this one does not wait for."""
        self._taken += 1
        told = torch.tensor([int(self.stop)])
        self._told = [one for one in self._told if not one[1].is_completed()]
        with self._answering():
            self._told.append((told, dist.isend(told, self._peer, group=own_group(BORDER))))

    def _open(self):
        told = [None, None]
        with self._answering():
            dist.recv_object_list(told, self._peer, group=own_group(BORDER), device="cpu")
        specs, self._has_images = told
        self._slots = [_Slot(number, specs, self._device) for number in range(self._count)]

    def _post(self, slot):
        with self._answering():
            # By its tag a message finds its buffer: gloo does not fill receives in the order in which they were posted.
            slot.work = dist.irecv(slot.bytes, self._peer, group=own_group(BORDER), tag=slot.number)

    def _answering(self):
        return self._within(f"what rank {self._peer} sends of its local modules")
