"""What a training will consist of, before it runs: modules, their units, their aux nets, their sizes."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .backbone import as_backbone
from .rules import build_head, cut

__all__ = ["ModulePlan", "Plan", "plan"]


@dataclass(frozen=True)
class ModulePlan:
    """One local module."""

    index: int
    units: tuple[str, ...]  # names of its backbone units
    output_shape: tuple[int, ...]  # of its last unit, (N, C, H, W)
    aux_units: tuple[int, ...]  # indices of the units its aux net copies; empty: the classifier is its head
    aux_names: tuple[str, ...]
    aux_channels: tuple[int, ...]  # base widths (before a bottleneck's expansion)
    aux_strides: tuple[int, ...]
    aux_batch_norm: bool  # BatchNorm1d before the aux net's linear classifier
    parameters: int  # of its units, and of the classifier in the last module
    aux_parameters: int


@dataclass(frozen=True)
class Plan:
    """The cut of one network; `print(plan)` shows it as a table."""

    model: str
    rule: str
    depth: int
    input_shape: tuple[int, ...]
    modules: tuple[ModulePlan, ...]

    @property
    def parameters(self):
        """Parameters of the model itself."""
        return sum(module.parameters for module in self.modules)

    @property
    def aux_parameters(self):
        """Parameters of the aux nets, which exist during training only."""
        return sum(module.aux_parameters for module in self.modules)

    def __str__(self):
        rows = [("module", "units", "output", "aux net: unit (width, stride)", "parameters", "aux parameters")]
        for module in self.modules:
            copies = zip(module.aux_names, module.aux_channels, module.aux_strides, strict=True)
            aux = " ".join(f"{name} ({width}, /{stride})" for name, width, stride in copies)
            rows.append(
                (
                    str(module.index),
                    module.units[0] if len(module.units) == 1 else f"{module.units[0]} .. {module.units[-1]}",
                    "x".join(str(size) for size in module.output_shape[1:]),
                    aux + (" + BatchNorm1d" if module.aux_batch_norm else "") if aux else "none: the classifier",
                    f"{module.parameters:,}",
                    f"{module.aux_parameters:,}",
                )
            )
        rows.append(("total", "", "", "", f"{self.parameters:,}", f"{self.aux_parameters:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = []
        for row in rows:
            left = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
            lines.append("  ".join(left + right).rstrip())
        rule_line = "-" * max(len(line) for line in lines)
        lines = [lines[0], rule_line, *lines[1:-1], rule_line, lines[-1]]
        count = len(self.modules)
        what = f", depth {self.depth}" if self.rule != "bp" else ""
        title = (
            f"{self.model}, rule {self.rule}{what}: {count} local module{'s' * (count > 1)}, "
            f"input {'x'.join(str(size) for size in self.input_shape)}"
        )
        return "\n".join([title, *lines])


def plan(model, input_shape, depth=4, *, rule="auglocal", form=None, modules=None):
    """Plans a training without running it; the model is not changed.

    Args:
        model: see `as_backbone`.
        input_shape: of a batch of images, (N, C, H, W).
        depth, rule, form, modules: see `auglocal_ext.train`.

    Returns:
        Plan

    Raises:
        ValueError: the model cannot be cut, or an argument is out of the range that it allows.
    """
    backbone = as_backbone(model)
    expected = f"input_shape must be (N, {backbone.image_channels}, H, W) for this model"
    if isinstance(input_shape, torch.Tensor) or not isinstance(input_shape, Iterable):
        raise TypeError(f"{expected}, given {type(input_shape).__name__}")
    input_shape = tuple(input_shape)
    if len(input_shape) != 4 or input_shape[1] != backbone.image_channels or min(input_shape) < 1:
        raise ValueError(f"{expected}, given {input_shape}")
    cuts = cut(backbone, depth, rule=rule, form=form, modules=modules)
    return describe(model, backbone, cuts, input_shape, rule, depth)


def describe(model, backbone, cuts, input_shape, rule, depth):
    """The Plan of a backbone cut into `cuts`. Shapes are traced on meta tensors: nothing is computed."""
    # Two images at least: a BatchNorm of a map of one pixel cannot be traced with one.
    shapes, x = [], torch.empty((max(input_shape[0], 2), *input_shape[1:]), device="meta")
    for unit in backbone.units:
        x = unit.trace(x)
        shapes.append((input_shape[0], *x.shape[1:]))
    modules = []
    for index, part in enumerate(cuts):
        with torch.device("meta"):
            head = _count(build_head(backbone, part))
        units = backbone.units[part.first : part.last + 1]
        body, sample = sum(_count(unit.module) for unit in units), part.sample
        modules.append(
            ModulePlan(
                index=index,
                units=tuple(unit.name for unit in units),
                output_shape=shapes[part.last],
                aux_units=sample.units if sample else (),
                aux_names=tuple(backbone.units[unit].name for unit in sample.units) if sample else (),
                aux_channels=tuple(backbone.units[unit].width for unit in sample.units) if sample else (),
                aux_strides=sample.strides if sample else (),
                aux_batch_norm=sample.batch_norm_head if sample else False,
                parameters=body if sample else body + head,
                aux_parameters=head if sample else 0,
            )
        )
    return Plan(type(model).__name__, rule, depth, input_shape, tuple(modules))


def _count(module):
    return sum(parameter.numel() for parameter in module.parameters())
