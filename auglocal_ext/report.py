"""Pictures and summaries of a training."""

import io
from pathlib import Path

from ._files import check_writable, write_whole

__all__ = ["check_picture", "front_picture", "learning_curve", "memory_picture"]


def check_picture(path, name="path"):
    """Raises ValueError or OSError unless a picture can be written to that path: to be known before the work for it.

    Args:
        path: its suffix says which kind of picture it is to be.
        name: what the user gave it by.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if Path(path).suffix[1:].lower() not in FigureCanvasAgg.filetypes:
        raise ValueError(
            f"{name} must end in .png, .pdf, .svg or another suffix that matplotlib knows, given {str(path)!r}"
        )
    check_writable(path, name, make_folder=False)


def _save(figure, path):
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=Path(path).suffix[1:].lower())
    write_whole(path, lambda file: file.write(picture.getvalue()))


def _figure(title, size):
    """A figure of its own, without pyplot's state and without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure


def learning_curve(history, path, title):
    """Draws a training's accuracy and every local module's loss over the epochs to a PNG.

    Args:
        history: `TrainResult.history`.
        path: the file to write.
        title: above the picture.
    """
    from matplotlib.ticker import MaxNLocator

    check_picture(path)
    epochs = [entry["epoch"] for entry in history]
    figure = _figure(title, (10, 4.2))
    accuracy, loss = figure.subplots(1, 2)

    accuracy.plot(epochs, [100 * entry["train_accuracy"] for entry in history], "k--o", ms=3, label="train")
    if history[-1]["val_accuracy"] is not None:
        accuracy.plot(epochs, [100 * entry["val_accuracy"] for entry in history], "k-s", ms=4, label="test")
    accuracy.set(xlabel="epoch", ylabel="accuracy, %")
    accuracy.legend()

    modules = len(history[-1]["module_losses"])
    for index in range(modules):
        values = [entry["module_losses"][index] for entry in history]
        if index == modules - 1:
            loss.plot(epochs, values, "k-", lw=2.5, label="classifier (last module)")
        else:
            # First modules light, last ones dark: readable without colour.
            shade = str(0.8 - 0.6 * index / max(modules - 2, 1))
            label = {0: "aux net of the first module", modules - 2: "aux net of the last but one"}.get(index)
            loss.plot(epochs, values, color=shade, lw=1.2, label=label)
    loss.set(xlabel="epoch", ylabel="training loss (cross-entropy)")
    loss.legend()
    for axes in (accuracy, loss):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    _save(figure, path)


# Kind -> (shade, hatch, what it is): told apart without colour too.
_KINDS = {
    "state": ("#4d4d4d", "", "state: parameters, buffers, optimizer"),
    "input": ("#9e9ac8", "", "input: the batch and the module's own"),
    "kept": ("#c6dbef", "..", "kept for the backward"),
    "gradient": ("#fdae6b", "//", "parameters' gradients"),
    "transient": ("#fdd0a2", "", "transient: activations, maps' gradients, scratch"),
}


def memory_picture(plan, path):
    """Draws the live bytes of one training step over its instructions, stacked by kind; see `Plan.save_picture`."""
    check_picture(path)
    figure = _figure(f"{plan.title}\nlive memory over one training step, {plan.precision}", (11, 5.4))
    axes = figure.subplots()
    stacked, highs, steps = _stacks(plan)
    scale, unit = _scale(plan.peak_bytes)
    at = range(len(highs))
    axes.stackplot(
        at,
        [[value / scale for value in stacked[kind]] for kind in _KINDS],
        step="mid",
        colors=[shade for shade, _, _ in _KINDS.values()],
        labels=[text for _, _, text in _KINDS.values()],
        edgecolor="none",
    )
    for layer, (_, hatch, _) in zip(axes.collections, _KINDS.values(), strict=True):
        layer.set(hatch=hatch, edgecolor="#777777", linewidth=0)

    top = max(at, key=highs.__getitem__)
    ceiling = 1.3 * highs[top] / scale
    borders, count = [0], len(plan.modules)
    for module in plan.modules:
        borders.append(borders[-1] + len(module.timeline.moments))
    every = -(-count // 18)  # as many labels as there is room for
    for module, begin, end in zip(plan.modules, borders[:-1], borders[1:], strict=True):
        if begin:
            axes.axvline(begin - 0.5, color="k", lw=0.6, ls=":")
        if module.index % every == 0:
            axes.text((begin + end) / 2, 0.99 * ceiling, str(module.index), ha="center", va="top", fontsize=8)
    what, module = steps[top]
    parts = ", ".join(f"{kind} {stacked[kind][top] / scale:.3g}" for kind in _KINDS)
    axes.annotate(
        f"peak {highs[top] / scale:.4g} {unit}: {what}, module {module}\n({parts})",
        (top, highs[top] / scale),
        xytext=(0.5, 0.87),
        textcoords="axes fraction",
        ha="center",
        fontsize=9,
        bbox={"boxstyle": "round", "fc": "white", "ec": "#777777"},
        arrowprops={"arrowstyle": "->"},
    )
    axes.set(xlim=(0, max(len(highs) - 1, 1)), ylim=(0, ceiling), ylabel=f"live bytes, {unit}")
    axes.set_xlabel("instruction of the step; dotted: module borders, numbers on top: modules")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    _save(figure, path)


def _stacks(plan):
    """(kind -> bytes at each instruction, highest bytes at each, (instruction, module) of each), modules in turn."""
    stacked, highs, steps = {kind: [] for kind in _KINDS}, [], []
    for module in plan.modules:
        line = module.timeline
        changes = {kind: [0] * (len(line.moments) + 1) for kind in _KINDS}
        for buffer in line.buffers:
            changes[buffer.kind][buffer.born] += buffer.bytes
            changes[buffer.kind][buffer.dies] -= buffer.bytes
        now = dict.fromkeys(_KINDS, 0)
        for index, moment in enumerate(line.moments):
            for kind in _KINDS:
                now[kind] += changes[kind][index]
            high = plan.state_bytes + plan.batch_bytes + moment.high
            shown = now | {"state": plan.state_bytes, "input": plan.batch_bytes + now["input"]}
            shown["transient"] += high - sum(shown.values())  # scratch
            for kind in _KINDS:
                stacked[kind].append(shown[kind])
            highs.append(high)
            steps.append((f"{moment.kind} of {_part(moment.part)}", module.index))
    return stacked, highs, steps


def _part(name):
    return "the aux net or classifier" if name == "head" else name


def front_picture(plan, path):
    """Draws memory against arithmetic for every number of modules; see `Plan.save_front`."""
    check_picture(path)
    choice = plan.choice
    figure = _figure(f"{plan.title}\nwhat a step costs, by number of modules K ({plan.precision})", (9, 5.6))
    axes = figure.subplots()
    scale, unit = _scale(max(choice.eager["bp"], choice.budget))
    counts = sorted({point.modules for point in choice.front})
    for index, count in enumerate(counts):
        points = sorted((p.bytes / scale, p.macs / plan.bp_macs) for p in choice.front if p.modules == count)
        shade = str(0.75 * index / max(len(counts) - 1, 1))
        axes.plot(*zip(*points, strict=True), "-o", color=shade, ms=3, lw=0.8)
        if index % max(1, len(counts) // 10) == 0:
            axes.annotate(f"K={count}", points[0], xytext=(-4, 3), textcoords="offset points", ha="right", fontsize=8)
    for name, macs, marker, label in (("bp", 1, "s", "eager BP"), ("gc", 4 / 3, "^", "BP, every unit checkpointed")):
        axes.plot(choice.eager[name] / scale, macs, marker, ms=9, mfc="white", mec="k", label=label)
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
    _save(figure, path)


def _scale(size):
    return (1e9, "GB") if size >= 1e9 else (1e6, "MB")
