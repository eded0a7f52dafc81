"""The memory of one training step, drawn over its instructions."""

import itertools

from .figure import check_picture, label_where_free, new_figure, save, scale_of

__all__ = ["memory_picture"]


# Kind -> (shade, hatch, what it is): told apart without colour too.
_KINDS = {
    "state": ("#4d4d4d", "", "state: parameters, buffers, optimizer"),
    "input": ("#9e9ac8", "", "input: the batch and the module's own"),
    "kept": ("#c6dbef", "..", "kept for the backward"),
    "gradient": ("#fdae6b", "//", "parameters' gradients"),
    "transient": ("#fdd0a2", "", "transient: activations, maps' gradients, scratch"),
}


def memory_picture(plan, path):
    """Draws the live bytes of one training step over its instructions, stacked by kind; see `Plan.save_picture`.

    Args:
        plan: a `Plan`.
        path: the file to write.

    Raises:
        ValueError, OSError: see `check_picture`.
    """
    check_picture(path)
    figure = new_figure(f"{plan.title}\nlive memory over one training step, {plan.precision}", (11, 5.4))
    axes = figure.subplots()
    stacked, highs, steps = _stacks(plan)
    scale, unit = scale_of(plan.peak_bytes)
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
    borders = [0]
    for module in plan.modules:
        borders.append(borders[-1] + len(module.timeline.moments))
    for begin in borders[1:-1]:
        axes.axvline(begin - 0.5, color="k", lw=0.6, ls=":")
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
    middles = [((begin + end - 1) / 2, 0.99 * ceiling) for begin, end in itertools.pairwise(borders)]
    numbers = [(str(module.index), middle) for module, middle in zip(plan.modules, middles, strict=True)]
    label_where_free(axes, numbers, [((0, 0), "center", "top")], fontsize=8)
    save(figure, path)


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
