"""What a training prints: its first lines, one for each epoch, and its memory."""

import datetime

import torch

from ..common.memory import format_bytes

__all__ = ["cost_lines", "duration", "epoch_line", "first_lines", "memory_line"]


def first_lines(trainer):
    """What is trained, how it is cut, and what a step costs beside the alternatives."""
    plan = trainer.plan
    layout = "channels_last" if plan.origin.memory_format == torch.channels_last else "contiguous"
    aux = f", and {plan.aux_parameters:,} of aux nets during training" if plan.aux_parameters else ""
    frozen = f", {plan.frozen_parameters:,} of them frozen" if plan.frozen_parameters else ""
    recompute = ", recompute" if trainer.recompute else ""
    lines = [
        plan.title,
        f"{plan.parameters:,} parameters{frozen}{aux}; on {trainer.device} in {trainer.precision}, {layout}{recompute}",
    ]
    if plan.comparison is not None:
        lines.append(str(plan.comparison))
    return "\n".join(lines)


def epoch_line(entry, epochs, seconds_left):
    """entry: of the history; seconds_left: of the training, None: not known."""
    val = ""
    if entry["val_accuracy"] is not None:
        val = f"  val {entry['val_accuracy']:.2%} (loss {entry['val_loss']:.3f})"
    if entry.get("ema_val_accuracy") is not None:
        val += f"  averaged {entry['ema_val_accuracy']:.2%}"
    left = f"  {duration(seconds_left)} left" if entry["epoch"] < epochs and seconds_left is not None else ""
    return (
        f"epoch {entry['epoch']}/{epochs}  loss {entry['loss']:.4f}  train {entry['train_accuracy']:.2%}{val}  "
        f"lr {entry['lr']:.3g}  {entry['images_per_second']:.0f} images/s{left}"
    )


def memory_line(plan, peak_bytes, process_bytes):
    """A step's memory as it was planned and as it was measured."""
    return (
        f"a step's peak memory: {format_bytes(plan.peak_bytes)} planned, {format_bytes(peak_bytes)} measured; the "
        f"process held {format_bytes(process_bytes)}"
    )


def cost_lines(result):
    """What a step of a finished training took, beside what it costs otherwise."""
    lines = [memory_line(result.plan, result.peak_bytes, result.process_bytes)]
    if result.plan.comparison is not None:
        lines.append(str(result.plan.comparison))
    return "\n".join(lines)


def duration(seconds):
    """3725 -> '1:02:05'"""
    return "?" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))
