"""What a trainer refuses to begin with, and what it says of a step that stopped."""

import torch

from ..common.memory import format_bytes
from ..distributed.group import world
from ..planning.origin import fingerprint
from ..planning.result import Plan

__all__ = ["check_parameters", "check_plan", "check_optimizers", "say_where_it_stopped"]


def check_plan(plan, model, alone):
    """ValueError unless the plan was made of this model as it is, and nothing that it tells is given `alone` too."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be what auglocal_ext.plan returns, given {type(plan).__name__}")
    if not alone:
        raise ValueError(
            "plan= tells depth, rule, form, auxiliary, modules, borders, units, optimizer, criterion, precision, "
            "recompute, sync_batch_norm, accumulate, clip_norm, clip_value, clip and ema: leave them out, or give them "
            "to auglocal_ext.plan"
        )
    if plan.origin.stepping.ranks != world().size:
        raise ValueError(
            f"the plan is for {plan.origin.stepping.ranks} ranks, given to one of {world().size}: call "
            f"auglocal_ext.plan in the processes that train"
        )
    if plan.origin.model != fingerprint(model):
        raise ValueError(
            f"the plan was made of another {plan.model}, or of this one before its layers, modes, parameters or device "
            f"changed: call auglocal_ext.plan with the model as it is now"
        )


def check_parameters(model):
    """ValueError or TypeError where a parameter cannot be trained; names it. Some may be frozen, not all."""
    first = next(model.parameters())
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "every parameter of the model is frozen, and nothing would be trained: call requires_grad_(True) on what "
            "is to learn, model.fc for instance"
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"parameter {name} is {parameter.dtype}: parameters must be float32, or float64; call "
                f"model.float(), and pass precision='bf16' or 'fp16' for features of half the size"
            )
        if parameter.dtype != first.dtype or parameter.device != first.device:
            raise ValueError(
                f"parameter {name} is {parameter.dtype} on {parameter.device}, expected {first.dtype} on "
                f"{first.device} like the first one: move the whole model with model.to()"
            )
        if parameter.is_inference():
            raise ValueError(
                f"parameter {name} was made under torch.inference_mode(), where nothing can be trained: make the "
                f"model outside of it"
            )


def check_optimizers(optimizers, made):
    """ValueError unless the optimizers are those that the trainer made."""
    if optimizers != made:
        raise ValueError(
            "trainer.optimizers is not what the trainer made, one for each local module: change the settings in "
            "their param_groups, or pass optimizer= to a new trainer"
        )


def say_where_it_stopped(error, index, count, stepped, plan, device):
    """Adds to the error's message how far the step came, in module `index` of so many, of which the first have stepped;
    its type stays, so that callers can still tell it."""
    if stepped == 0:
        ahead = "No finished module was changed"
    elif stepped == 1:
        ahead = "Module 0 has taken this step already and is one step ahead of the rest"
    else:
        ahead = f"Modules 0 to {stepped - 1} have taken this step already and are one step ahead of the rest"
    note = f"The step stopped in local module {index} of {count}. {ahead}. The model is whole and can be used or saved."
    note += _out_of_memory(error, plan, device)
    if not error.args:
        error.args = (note,)
    elif isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])


def _out_of_memory(error, plan, device):
    """For an out-of-memory error: what was planned, what there is, what would work."""
    if not isinstance(error, torch.OutOfMemoryError):
        return ""
    planned = plan.peak_bytes
    note = f" The plan predicts {format_bytes(planned)} for this step ({planned:,} bytes)"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        ours = torch.cuda.memory_reserved(device)
        note += (
            f"; {device} has {format_bytes(free)} free of {format_bytes(total)}, this process holds "
            f"{format_bytes(ours)}: memory_budget='{int(0.9 * (free + ours) / 1e6)}MB' chooses a cut that fits"
        )
    return note + "."
