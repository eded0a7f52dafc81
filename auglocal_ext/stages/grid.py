"""Which rank is which: pipelines of stages, side by side."""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..distributed.collectives import STATISTICS, TRAINING, make_groups, own_group
from ..distributed.group import among, everybody

__all__ = ["BORDER", "Grid", "grid_of"]

BORDER = "border"  # the name of the groups of two neighbours


@dataclass(frozen=True)
class Grid:
    """Ranks are numbered pipeline after pipeline, so that a message goes to the next one, mostly on the same machine.

    Attributes:
        replicas: how many pipelines; each has the whole model, and its own batches.
        stages: how many ranks each pipeline has.
        rank: this process's number.
    """

    replicas: int
    stages: int
    rank: int

    @property
    def replica(self) -> int:
        """Which pipeline this rank is of."""
        return self.rank // self.stages

    @property
    def stage(self) -> int:
        """Which part of the model this rank has, from 0."""
        return self.rank % self.stages

    @property
    def pipeline(self) -> range:
        """The ranks of this rank's pipeline."""
        return self.rows[self.replica]

    @property
    def copies(self) -> range:
        """The ranks that have the same local modules."""
        return self.columns[self.stage]

    @property
    def rows(self) -> list[range]:
        """All pipelines."""
        return [range(begin, begin + self.stages) for begin in range(0, self.replicas * self.stages, self.stages)]

    @property
    def columns(self) -> list[range]:
        """The ranks of every stage."""
        return [range(stage, self.replicas * self.stages, self.stages) for stage in range(self.stages)]

    def border(self, stage: int) -> range:
        """The two ranks of this pipeline between which that stage ends."""
        return self.pipeline[stage : stage + 2]

    def make_groups(self) -> None:
        """Of neighbours, and of the ranks that have the same local modules. Every rank must call it."""
        if self.stages > 1:
            make_groups(BORDER, [row[stage : stage + 2] for row in self.rows for stage in range(self.stages - 1)])
        if self.replicas > 1:
            make_groups(TRAINING, self.columns)
            make_groups(STATISTICS, self.columns)

    def mesh(self, device: torch.device) -> DeviceMesh:
        """This layout as torch has it, of dimensions "replica" and "stage", for tensors on a device of this type; its
        groups end with this package's. Every rank must call it. It holds its groups: who keeps it keeps a rank that
        fails from ending their connections."""
        parts = {"replica": self.copies, "stage": self.pipeline}
        make_groups("mesh", [*self.columns, *self.rows])
        groups = []
        for ranks in parts.values():
            with among(ranks):
                groups.append(own_group("mesh"))
        layout = torch.arange(self.replicas * self.stages).view(self.replicas, self.stages)
        return DeviceMesh.from_group(groups, device.type, layout, mesh_dim_names=tuple(parts))


def grid_of(stages: int | None) -> Grid:
    """The grid of all ranks; stages: of each pipeline, None: as many as there are ranks.

    Raises:
        ValueError: it does not divide the number of ranks.
    """
    place = everybody()
    each = place.size if stages is None else stages
    if isinstance(each, bool) or not isinstance(each, int) or each < 1 or place.size % each:
        raise ValueError(
            f"stages must be a whole number that divides the number of ranks, {place.size}, given {stages!r}: start "
            f"pipelines x stages processes"
        )
    return Grid(place.size // each, each, place.rank)
