"""Checkpoints of a model that is spread over ranks, by torch.distributed.checkpoint: each rank writes its part, and
any number of ranks can go on from it.

A checkpoint is a folder in the given one, `step-<number>`. The newest whole one counts; the one before is deleted
behind it, so that a kill at any moment leaves one.
"""

import contextlib
import io
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from ..distributed.collectives import gathered
from ..distributed.faults import answering
from ..distributed.group import world

__all__ = ["load", "more_of", "newest", "save"]

WHOLE = ".metadata"  # torch writes it when all parts are there


def newest(folder):
    """The newest whole checkpoint in the folder, or None."""
    whole = [path.parent for path in Path(folder).glob(f"step-*/{WHOLE}")]
    return max(whole, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def save(trainer, folder, more):
    """Writes weights, statistics, auxiliary nets, and each local module's optimizer; `more` is rank 0's."""
    folder, last = Path(folder), newest(folder)
    place = gathered(1 if last is None else int(last.name.removeprefix("step-")) + 1, "the checkpoint's name")[0]
    parts = {}
    if trainer.grid.replica == 0:  # the others have the same
        parts = trainer.parts.saved | {f"optimizers.{i}": _as_bytes(state) for i, state in _optimizers(trainer).items()}
    if world().first:
        parts["more"] = _as_bytes(more)
        folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{place}"
    with answering("the checkpoint"), _quietly_alone():
        dcp.save(parts, checkpoint_id=str(target), no_dist=world().alone)
    if world().first and last is not None:
        shutil.rmtree(last, ignore_errors=True)


def load(trainer, folder):
    """Puts the trainer where `save` found one of the same model, cut and optimizers; returns `more`.

    Raises:
        ValueError: there is none, or it is of another model or cut; nothing was changed.
    """
    found = newest(folder)
    if found is None:
        raise ValueError(f"{folder} has no checkpoint: expected a folder that StageTrainer.save has written to")
    kept = FileSystemReader(str(found)).read_metadata().state_dict_metadata
    wanted = {**trainer.parts.held, **{f"optimizers.{i}": None for i in trainer.stage.span}, "more": None}
    for name, ours in wanted.items():
        if name not in kept or (ours is not None and kept[name].size != ours.shape):
            had = tuple(kept[name].size) if name in kept else "none"
            raise ValueError(
                f"{found} is of another model or cut: its {name} has shape {had}, expected "
                f"{'one' if ours is None else tuple(ours.shape)}; make the trainer as it was when it was saved"
            )
    read = {
        name: torch.empty(
            kept[name].size, dtype=kept[name].properties.dtype, device="cpu" if ours is None else ours.device
        )
        for name, ours in wanted.items()
    }
    with answering("the checkpoint"), _quietly_alone():
        dcp.load(read, checkpoint_id=str(found), no_dist=world().alone)
    with torch.no_grad():
        for name, ours in trainer.parts.held.items():
            ours.copy_(read[name])
    stage = trainer.stage
    for index, place in enumerate(stage.span):
        state = _from_bytes(read[f"optimizers.{place}"])
        stage.optimizers[index].load_state_dict(state["optimizer"])
        if stage.stepper.scalers:
            stage.stepper.scalers[index].load_state_dict(state["scale"])
    return _from_bytes(read["more"])


def more_of(checkpoint):
    """What `save` was given more, of a checkpoint that `newest` found; by one process, without a trainer."""
    kept = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata["more"]
    read = {"more": torch.empty(kept.size, dtype=kept.properties.dtype)}
    with _quietly_alone():
        dcp.load(read, checkpoint_id=str(checkpoint), no_dist=True)
    return _from_bytes(read["more"])


@contextlib.contextmanager
def _quietly_alone():
    """Within, torch does not warn that one process is taken for one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _optimizers(trainer):
    stage, scalers = trainer.stage, trainer.stage.stepper.scalers
    return {
        place: {
            "optimizer": stage.optimizers[index].state_dict(),
            "scale": scalers[index].state_dict() if scalers else None,
        }
        for index, place in enumerate(stage.span)
    }


def _as_bytes(value):
    """What a local module has and no other rank reads, in one tensor: the next process does not know its shape."""
    held = io.BytesIO()
    torch.save(value, held)
    return torch.frombuffer(bytearray(held.getvalue()), dtype=torch.uint8)


def _from_bytes(tensor):
    return torch.load(io.BytesIO(tensor.numpy().tobytes()), weights_only=True, map_location="cpu")
