"""What can be had for how much memory, drawn."""

from .figure import check_picture, label_where_free, new_figure, save, scale_of

__all__ = ["front_picture"]


_PLACES = (
    ((-4, 2), "right", "center"),
    ((0, -5), "center", "top"),
    ((-4, -6), "right", "top"),
    ((0, 5), "center", "bottom"),
    ((5, 0), "left", "center"),
    ((-12, 0), "right", "center"),
    ((0, -12), "center", "top"),
    ((12, 0), "left", "center"),
)


def front_picture(plan, path):
    """Draws memory against arithmetic for every number of modules; see `Plan.save_front`.

    Args:
        plan: a `Plan` that was made under a memory budget.
        path: the file to write.

    Raises:
        ValueError, OSError: see `check_picture`.
    """
    check_picture(path)
    choice = plan.choice
    figure = new_figure(f"{plan.title}\nwhat a step costs, by number of modules K ({plan.precision})", (9, 5.6))
    axes = figure.subplots()
    scale, unit = scale_of(max(plan.comparison.eager.bytes, choice.budget))
    timed = choice.prefer == "time"
    whole = 1e6 * plan.comparison.bp.milliseconds if timed else plan.bp_macs  # what costs are a share of
    counts = sorted({point.modules for point in choice.front})
    ends, lines = [], []
    for index, count in enumerate(counts):
        points = sorted((p.bytes / scale, p.cost / whole) for p in choice.front if p.modules == count)
        shade = str(0.75 * index / max(len(counts) - 1, 1))
        axes.plot(*zip(*points, strict=True), "-o", color=shade, ms=3, lw=0.8)
        ends.append((f"K={count}", points[0]))
        lines.append(points)
    marks = []
    for cost, marker, fill, label in (
        (plan.comparison.bp, "s", "0.6", "BP on this engine"),
        (plan.comparison.checkpoint, "^", "0.6", "every unit checkpointed, on this engine"),
        (plan.comparison.eager, "s", "white", "eager BP"),
        (plan.comparison.eager_checkpoint, "^", "white", "eager BP, every unit checkpointed"),
    ):
        if timed and cost.milliseconds is None:  # eager PyTorch's is not predicted
            continue
        marks.append((cost.bytes / scale, 1e6 * cost.milliseconds / whole if timed else cost.macs))
        axes.plot(*marks[-1], marker, ms=9, mfc=fill, mec="k", ls="", label=label)
    axes.axvline(choice.budget / scale, color="k", ls="--", lw=1, label="budget")
    marks.append((choice.point.bytes / scale, choice.point.cost / whole))
    axes.plot(*marks[-1], "*", ms=18, mfc="none", mec="k", ls="", label=f"chosen: K={choice.point.modules}")
    what = "predicted time / BP on this engine" if timed else "multiply-accumulates / BP"
    axes.set(xscale="log", xlabel=f"peak bytes of a step, everything in it, {unit}", ylabel=what)
    axes.margins(0.08)  # room for the labels
    low, high = axes.get_xlim()
    steps = (1, 1.5, 2, 3, 4, 6, 8) if high > 4 * low else (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
    ticks = [step * 10**e for e in range(-3, 5) for step in steps if low <= step * 10**e <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    lines.append([(choice.budget / scale, height) for height in axes.get_ylim()])
    label_where_free(axes, ends, _PLACES, lines, marks, fontsize=8)
    save(figure, path)
