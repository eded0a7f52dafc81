"""What each rank of a training does when: predicted, and beside it as it was traced."""

import math
import statistics

from .figure import check_picture, new_figure, save

__all__ = ["gantt_picture"]

# What a rank does -> (shade, hatch, what it is): told apart without colour too.
_KINDS = {
    "forward": ("#c6dbef", "", "forward"),
    "backward": ("#6baed6", "///", "backward"),
    "weight gradient": ("#bcbddc", "...", "weights' gradients"),
    "step": ("#525252", "", "optimizer's step"),
    "send": ("#fdd0a2", "", "message to the next rank"),
    "send back": ("#969696", "", "message to the rank before"),
    "all-reduce": ("#fdae6b", "xx", "average of gradients over the ranks"),
}
_BELOW = {"send": 0.33, "all-reduce": 0.33, "send back": 0.43}  # drawn in a narrow lane so far below the rank's own
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_NUMBERED = 6  # ranks at most; for more there is no room


def gantt_picture(panels, path, title):
    """Draws ranks downward and time across, a row of panels for each way to train.

    Args:
        panels: [(name, predicted, traced)]: lists of `stages.events.Event`, or whatever has rank, batch, what, start
            and end in seconds, already cut to what is to be seen. traced: as it was measured, drawn beside on the same
            scale; None for all: only what is predicted.
        path: the file to write.
        title: above the picture.

    Raises:
        ValueError, OSError: see `check_picture`.
    """
    check_picture(path)
    traced = any(events is not None for *_, events in panels)
    ranks = 1 + max(event.rank for _, events, _ in panels for event in events)
    height = min(0.42 * ranks, 3.4) + 0.75
    title += "; numbers: batches, or micro-batches" * (ranks <= _NUMBERED)
    figure = new_figure(title, (9.6 + 5 * traced, 1.1 + height * len(panels)))
    grid = figure.subplots(len(panels), 1 + traced, squeeze=False, sharex="row", sharey="row")
    seen = {}
    for row, (name, *both) in zip(grid, panels, strict=True):
        longest = max(event.end for events in both for event in events or ())
        scale, unit = next((pair for pair in _UNITS if longest >= pair[0]), _UNITS[-1])
        for axes, events, what in zip(row, both, ("predicted", "traced"), strict=False):
            if events is None:
                axes.set_axis_off()
                continue
            _draw(axes, events, scale, seen)
            if ranks <= _NUMBERED:
                _number(axes, events, scale, longest / 60)
            axes.set_title(f"{name}; {what}" if traced else name, loc="left", fontsize=9)
            axes.set(xlim=(0, longest / scale), xlabel=f"time, {unit}", ylim=(ranks - 0.45, -0.65))
        row[0].set_ylabel("rank")
        every = math.ceil(ranks / 16)
        row[0].set_yticks(range(0, ranks, every))
    order = [kind for kind in _KINDS if kind in seen]
    labels = [_KINDS[kind][2] for kind in order]
    figure.legend([seen[k] for k in order], labels, loc="outside lower center", ncols=len(order), fontsize=8)
    save(figure, path)


def _draw(axes, events, scale, seen):
    """Bars of one panel. seen: kind -> what stands for it in the legend."""
    end = max(event.end for event in events)
    for kind, (shade, hatch, _) in _KINDS.items():
        some = [event for event in events if event.what == kind and event.end > event.start]
        if not some:
            continue
        width = statistics.median(event.end - event.start for event in some) / end
        bars = axes.barh(
            [event.rank + _BELOW.get(kind, 0) for event in some],
            [(event.end - event.start) / scale for event in some],
            left=[event.start / scale for event in some],
            height=0.08 if kind in _BELOW else 0.56,
            color=shade,
            hatch=hatch,
            edgecolor="#333333",
            linewidth=0.4 if width > 1 / 200 else 0,
            snap=False,  # to whole pixels, which what is short has none of
        )
        seen.setdefault(kind, bars)


def _number(axes, events, scale, room):
    """Writes the batches' numbers above where a rank begins them, where there is room."""
    begins = {}
    for event in events:
        if event.what == "forward":
            place = event.rank, event.batch
            begins[place] = min(event.start, begins.get(place, math.inf))
    before = {}  # rank -> where its last number stands
    for (rank, batch), start in sorted(begins.items(), key=lambda item: item[1]):
        if start - before.get(rank, -math.inf) > room:
            before[rank] = start
            place = start / scale, rank - 0.28
            axes.annotate(f"{batch}", place, (1, 1), textcoords="offset points", fontsize=6, annotation_clip=True)
