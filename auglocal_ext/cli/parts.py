"""Which part of the data a process reads."""

from ..distributed.group import world

__all__ = ["part_of"]


def part_of(options):
    """(which, of how many): each rank's own, or with --stages each pipeline's. ValueError where as many stages do not
    divide the ranks."""
    if options.stages is None:
        return world().rank, world().size
    from ..stages.grid import grid_of

    grid = grid_of(options.stages)
    return grid.replica, grid.replicas
