"""What a training returns, and how it prints."""

from dataclasses import dataclass

from torch import nn

from ..common.messages import plural
from ..planning.result import Plan
from .lines import cost_lines

__all__ = ["TrainResult", "TrainingInterrupted"]


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns; `print(result)` shows it as a short table.

    Attributes:
        history: one dict per epoch, of plain numbers: epoch, loss (of the classifier), module_losses (None of a local
            module whose units are all frozen), train_accuracy (of the training batches, as they were seen),
            module_accuracies (likewise, of each local module's own head; None as module_losses), val_loss (mean cross-
            entropy), val_accuracy and val_top5_accuracy (None without val_loader; top-5 None for fewer than 6 classes),
            images_per_second, seconds, lr (of the last step), skipped_steps (of a local module, with nonfinite="skip"),
            peak_bytes.
        plan: the cut that was trained; plan.comparison has what backpropagation and checkpointing would need.
        peak_bytes: the highest memory of a step, parameters and optimizer state included: on CUDA as torch's allocator
            saw it over all of them, less what was there besides, as images that a loader holds; on other devices live
            tensor bytes in the first two steps of the optimizers.
        process_bytes: the most bytes that the process held: on CUDA what torch's allocator had reserved there, on other
            devices the resident memory, with all libraries and data.
        aux_nets: with keep_aux_nets, an nn.ModuleList; else None.
        ema_model: with ema, the averaged model: a plain one of the trained model's class, on its device. Its statistics
            of BatchNorm are averaged too. The history then has ema_val_loss, ema_val_accuracy and ema_val_top5_accuracy
            of it; val_accuracy, `best` and patience are of the trained model.
        stopped: why there are fewer epochs than asked for: "patience", "max_seconds", or None.
    """

    history: list
    plan: Plan
    peak_bytes: int
    aux_nets: nn.ModuleList | None
    process_bytes: int
    stopped: str | None = None
    ema_model: nn.Module | None = None

    @property
    def val_accuracy(self) -> float | None:
        """The last epoch's accuracy on val_loader, from 0 to 1; None without val_loader or epochs."""
        return self.history[-1]["val_accuracy"] if self.history else None

    @property
    def best(self) -> dict | None:
        """The history's entry of the highest accuracy, of training where there is no validation; the first of equals.
        None without epochs."""
        return max(self.history, key=accuracy_of) if self.history else None

    def __str__(self):
        lines = [self.plan.title if self.plan else "no step was planned", self._time_line()]
        if self.history:
            lines += self._table()
        return "\n".join([*lines, *([cost_lines(self)] if self.plan else [])])

    def _time_line(self):
        count, seconds = len(self.history), sum(entry["seconds"] for entry in self.history)
        line = f"{plural(count, 'epoch')}, {seconds:.1f} s of training"
        if self.history:
            line += f", {self.history[-1]['images_per_second']:.0f} images/s"
        return line + (f"; stopped by {self.stopped}" if self.stopped else "")

    def _table(self):
        last, best = self.history[-1], self.best
        columns = [(f"epoch {last['epoch']}", last)]
        if best is not last:
            columns.append((f"epoch {best['epoch']}, the best", best))
        rows = [("", *(title for title, _ in columns))]
        for name, key, form in _ROWS:
            if last.get(key) is not None:
                rows.append((name, *(format(entry[key], form) for _, entry in columns)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


_ROWS = [
    ("training loss", "loss", ".4f"),
    ("training accuracy", "train_accuracy", ".2%"),
    ("validation loss", "val_loss", ".4f"),
    ("validation accuracy", "val_accuracy", ".2%"),
    ("top-5", "val_top5_accuracy", ".2%"),
    ("averaged model: loss", "ema_val_loss", ".4f"),
    ("averaged model: accuracy", "ema_val_accuracy", ".2%"),
]


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during `train`, raised between two steps. (A second Ctrl-C is a KeyboardInterrupt at once.)

    Args:
        result: the TrainResult of the finished epochs; an attribute too.
        note: ends the message.
    """

    def __init__(self, result, note=""):
        super().__init__(
            f"training interrupted after {plural(len(result.history), 'whole epoch')}. {note}".rstrip(" .")
        )
        self.result = result


def accuracy_of(entry):
    """An epoch's validation accuracy, or that of training where there is no validation."""
    return entry["train_accuracy"] if entry["val_accuracy"] is None else entry["val_accuracy"]
