"""What several stages cannot train by."""

from torch import nn

from ..common import checks
from ..distributed.group import everybody
from ..training.planned import current_programs
from .costs import COSTS

__all__ = ["SCHEDULES", "check_arguments", "check_trainer"]

SCHEDULES, NONFINITE = ("decoupled", "synchronous"), ("stop", "skip")


def check_arguments(images, schedule, max_lag, balance, nonfinite, options):
    """Of a StageTrainer; ValueError where one is out of its range, or needs all modules in one process."""
    for name, value, known in (("schedule", schedule, SCHEDULES), ("balance", balance, COSTS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, given {value!r}")
    checks.whole_number(max_lag, "max_lag must be a whole number of batches, at least 1", 1)
    if nonfinite not in NONFINITE:
        raise ValueError(f"nonfinite must be 'stop' or 'skip', given {nonfinite!r}")
    for name, needs_all in (("clip", options.get("clip") == "global"), ("ema", options.get("ema") is not None)):
        if needs_all:
            raise ValueError(
                f"{name}={options[name]!r} needs all modules in one process, given several stages: leave it out"
            )
    if len(images) < 2:
        raise ValueError(f"the first batch must be the largest, and have at least 2 images: given {len(images)}")


def check_trainer(trainer):
    """Of a LocalTrainer of the whole model, whose plan is made; ValueError where a rank would need what another has."""
    if any(module.head.shares_readout for module in trainer.local_modules):
        raise ValueError(
            f"the nets of rule {trainer._rule.name!r} end in the classifier's weights, copied in every step, which "
            "several stages do not have in one process: leave readout=shared out, in a rule of your own shares_readout"
        )
    if everybody().alone:
        return
    islands = [island.call for program in current_programs(trainer) for island in program.islands]
    by_autograd = {part for call in islands if isinstance(call, nn.Module) for part in call.modules()}
    for name, part in trainer.model.named_modules():
        if isinstance(part, nn.SyncBatchNorm) and (part.process_group is not None or part in by_autograd):
            raise ValueError(
                f"{name} is an nn.SyncBatchNorm that sends its statistics to ranks of its own choice, which may be "
                f"other stages: give it process_group=None, affine=True and track_running_stats=True, or make it a "
                f"BatchNorm and give sync_batch_norm=True"
            )
