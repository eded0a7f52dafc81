"""What can be had for how much memory, drawn."""

from .figure import check_picture, new_figure, save, scale_of

__all__ = ["front_picture"]


def front_picture(plan, path):
    """Draws memory against arithmetic for every number of modules; see `Plan.save_front`."""
    check_picture(path)
    choice = plan.choice
    figure = new_figure(f"{plan.title}\nwhat a step costs, by number of modules K ({plan.precision})", (9, 5.6))
    axes = figure.subplots()
    scale, unit = scale_of(max(plan.comparison.eager.bytes, choice.budget))
    counts = sorted({point.modules for point in choice.front})
    for index, count in enumerate(counts):
        points = sorted((p.bytes / scale, p.macs / plan.bp_macs) for p in choice.front if p.modules == count)
        shade = str(0.75 * index / max(len(counts) - 1, 1))
        axes.plot(*zip(*points, strict=True), "-o", color=shade, ms=3, lw=0.8)
        if index % max(1, len(counts) // 10) == 0:
            axes.annotate(f"K={count}", points[0], xytext=(-4, 3), textcoords="offset points", ha="right", fontsize=8)
    eager = {
        "s": (plan.comparison.eager, "eager BP"),
        "^": (plan.comparison.eager_checkpoint, "every unit checkpointed"),
    }
    for marker, (cost, label) in eager.items():
        axes.plot(cost.bytes / scale, cost.macs, marker, ms=9, mfc="white", mec="k", label=label)
    axes.axvline(choice.budget / scale, color="k", ls="--", lw=1, label="budget")
    chosen = choice.point
    axes.plot(
        chosen.bytes / scale,
        chosen.macs / plan.bp_macs,
        "*",
        ms=15,
        mfc="white",
        mec="k",
        label=f"chosen: K={chosen.modules}",
    )
    axes.set(xscale="log", xlabel=f"peak bytes of a step, everything in it, {unit}", ylabel="multiply-accumulates / BP")
    ticks = [t * 10**e for e in range(-3, 5) for t in (1, 1.5, 2, 3, 4, 6, 8)]
    low, high = axes.get_xlim()
    axes.set_xticks([t for t in ticks if low <= t <= high], [f"{t:g}" for t in ticks if low <= t <= high])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    save(figure, path)
