"""Everything that a trainer's next step depends on, as plain values and tensors, and back."""

import random
from dataclasses import asdict

import numpy
import torch
from torch import nn

from ..rules.auxiliary import nets_of

__all__ = ["alike", "check_state", "load_state", "random_state", "set_random_state", "state_of"]

VERSION = 3


def state_of(trainer):
    """Weights, statistics, auxiliary nets, optimizers, a group of batches under way, averages, random numbers; what
    torch.load(weights_only=True) can load."""
    return {
        "version": VERSION,
        "made_of": _made_of(trainer),
        "model": trainer.model.state_dict(),
        "aux_nets": trainer.aux_nets.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "stepper": trainer.stepper.state_dict(),
        "frozen": [name for name, parameter in _both(trainer).named_parameters() if not parameter.requires_grad],
        "evaluating": [name for name, module in _both(trainer).named_modules() if not module.training],
        "random": random_state(trainer.device),
    }


def _both(trainer):
    """What may be frozen, or switched to eval mode, between steps."""
    return nn.ModuleDict({"model": trainer.model, "aux_nets": trainer.aux_nets})


def check_state(trainer, state):
    """ValueError unless the state is of this version, and of such a model, rule and cut; says what differs."""
    if not isinstance(state, dict) or "made_of" not in state:
        raise ValueError("this is no state of a LocalTrainer: expected what its state_dict() returned")
    if state["version"] != VERSION:
        raise ValueError(
            f"the state is of version {state['version']}, this auglocal_ext reads version {VERSION}: go "
            f"on with the release that wrote it, or train from the beginning"
        )
    theirs = {"ranks": 1, "sync_batch_norm": False} | state["made_of"]  # which older states do not tell
    ranks = trainer.stepping.ranks
    if state["stepper"]["count"] and theirs["ranks"] != ranks:
        raise ValueError(
            f"the state is within a group of batches that {theirs['ranks']} ranks accumulate together, this trainer is "
            f"of {ranks}: save behind the group's last batch, or go on with as many"
        )
    for name, ours in _made_of(trainer).items():
        if name != "ranks" and theirs.get(name) != ours:
            raise ValueError(
                f"the state was saved with {name} {theirs.get(name)}, this trainer has {ours}: make the model and the "
                f"trainer as they were then"
            )
    for name, module in (("model", trainer.model), ("aux_nets", trainer.aux_nets)):
        _check_fits(name, module.state_dict(), state[name])
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
        ours, theirs = _group_sizes(optimizer.param_groups), _group_sizes(saved["param_groups"])
        if ours != theirs:
            raise ValueError(
                f"the state's optimizers have groups of {theirs} parameters, this trainer's of {ours}: give the same "
                f"optimizer="
            )


def load_state(trainer, state):
    """Puts a trainer and the random number generators where `state_of` found them, of as many ranks or others.
    ValueError, with nothing changed, as `check_state`."""
    check_state(trainer, state)
    both = _both(trainer)
    for name, parameter in both.named_parameters():
        parameter.requires_grad_(name not in state["frozen"])
    for name, module in both.named_modules():
        module.training = name not in state["evaluating"]
    trainer.model.load_state_dict(state["model"])
    trainer.aux_nets.load_state_dict(state["aux_nets"])
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    trainer.stepper.load_state_dict(state["stepper"])
    set_random_state(state["random"], trainer.device)


def _made_of(trainer):
    """What has to be equal, in plain values."""
    rule = trainer._rule
    return {
        "model": type(trainer.model).__name__,
        "rule": rule.name,
        "depth": rule.depth,
        "auxiliary": nets_of(rule),
        "units": list(trainer.units),
        "borders": [span.last for span in trainer._spans[:-1]],
        "precision": trainer.precision,
        "recompute": trainer.recompute,
        "criterion": str(trainer.criterion),
        "sync_batch_norm": trainer.sync_batch_norm,
        "optimizer": type(trainer.optimizers[0]).__name__,
        **asdict(trainer.stepping),
    }


def alike(trainer):
    """What ranks that train one model must have alike: name -> plain value."""
    groups = trainer.optimizers[0].param_groups
    names = [name for name, value in groups[0].items() if isinstance(value, int | float | str | tuple)]
    found = {**_made_of(trainer), "device": trainer.device.type}
    found |= {f"the optimizer's {name}": [group.get(name) for group in groups] for name in names}
    for kind, tensors in (("parameter", _both(trainer).named_parameters()), ("buffer", _both(trainer).named_buffers())):
        found |= {f"{kind} {name}": (str(t.dtype), tuple(t.shape), t.requires_grad) for name, t in tensors}
    return found


def _check_fits(name, ours, theirs):
    for key in (*ours, *theirs):
        if key not in theirs or key not in ours or ours[key].shape != theirs[key].shape:
            have, had = (tuple(state[key].shape) if key in state else "none" for state in (ours, theirs))
            raise ValueError(
                f"the state is of another {name}: its {key} has shape {had}, expected {have}; make the model and the "
                f"trainer as they were when it was saved"
            )


def _group_sizes(groups):
    return [len(group["params"]) for group in groups]


def random_state(device):
    """Of the generators that training draws from: torch's of the CPU and of the device, Python's, NumPy's."""
    kind, keys, *rest = numpy.random.get_state()
    found = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (kind, keys.tolist(), *rest)}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_random_state(state, device):
    """Puts the generators that training draws from where `state_of` found them; state: its "random"."""
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
