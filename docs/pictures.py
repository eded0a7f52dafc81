"""The pictures that README and documentation show: a network in local modules, a plan and a search of ResNet-34.

python docs/pictures.py       writes docs/pictures/local_modules.png, plan_resnet34.png and front_resnet34.png
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FOLDER = Path(__file__).parent / "pictures"
DARK, GREY, PALE = "#1f1f1f", "#8a8a8a", "#e8e8e8"
UNIT, NET, LOSS = "#cfe2f3", "#fde9c9", "#ffffff"


def box(axes, x, y, width, height, text, color):
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=color, ec=DARK, lw=1.1)
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10, color=DARK)


def arrow(axes, start, end, style="-|>", color=DARK, dashed=False, bend=0.0):
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle=style,
            mutation_scale=13,
            color=color,
            lw=1.5,
            linestyle=(0, (4, 2)) if dashed else "-",
            connectionstyle=f"arc3,rad={bend}",
            shrinkA=0,
            shrinkB=0,
        )
    )


def local_modules(path):
    figure, axes = plt.subplots(figsize=(9.6, 4.0), dpi=160)
    starts = [1.2, 4.6, 8.0]
    names = [("unit 0", "unit 1"), ("unit 2", "unit 3"), ("unit 4", "unit 5")]
    axes.text(0.0, 0.45, "images", ha="left", va="center", fontsize=10)
    arrow(axes, (0.8, 0.45), (starts[0], 0.45))
    for index, (x, units) in enumerate(zip(starts, names, strict=True)):
        last = index == len(starts) - 1
        axes.add_patch(
            FancyBboxPatch(
                (x - 0.16, -0.28), 2.72, 3.42, boxstyle="round,pad=0,rounding_size=0.15", fc=PALE, ec="none", zorder=-1
            )
        )
        axes.text(x + 1.2, -0.62, f"local module {index}", ha="center", va="center", fontsize=10)
        box(axes, x, 0.1, 1.1, 0.7, units[0], UNIT)
        box(axes, x + 1.3, 0.1, 1.1, 0.7, units[1], UNIT)
        arrow(axes, (x + 1.1, 0.45), (x + 1.3, 0.45))
        box(axes, x + 1.2, 1.3, 1.2, 0.7, "classifier" if last else "auxiliary\nnet", UNIT if last else NET)
        arrow(axes, (x + 1.95, 0.8), (x + 1.95, 1.3))
        arrow(axes, (x + 1.65, 1.3), (x + 1.65, 0.8), color=GREY, dashed=True)
        box(axes, x + 1.2, 2.4, 1.2, 0.5, "loss", LOSS)
        arrow(axes, (x + 1.95, 2.0), (x + 1.95, 2.4))
        arrow(axes, (x + 1.65, 2.4), (x + 1.65, 2.0), color=GREY, dashed=True)
        arrow(axes, (x + 1.55, 0.1), (x + 0.55, 0.1), color=GREY, dashed=True, bend=-0.35)
        if not last:
            arrow(axes, (x + 2.4, 0.45), (x + 3.4, 0.45))
            axes.plot([x + 2.9] * 2, [0.05, 0.85], color=DARK, lw=2.4)
            axes.text(x + 2.9, 1.05, "border", ha="center", va="center", fontsize=9)
    axes.text(starts[-1] + 2.4, -1.12, "gradients", ha="right", va="center", fontsize=9.5)
    arrow(axes, (starts[-1] + 1.05, -1.12), (starts[-1] + 0.35, -1.12), color=GREY, dashed=True)
    axes.text(starts[-2] + 2.4, -1.12, "features", ha="right", va="center", fontsize=9.5)
    arrow(axes, (starts[-2] + 0.4, -1.12), (starts[-2] + 1.1, -1.12))
    axes.set_xlim(-0.05, 10.75)
    axes.set_ylim(-1.4, 3.25)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def resnet34(path_of_plan, path_of_front):
    """A ResNet-34 in two local modules over a step, and the search under a budget; counted without data."""
    import torchvision

    import auglocal_ext

    model, shape = torchvision.models.resnet34(), (256, 3, 224, 224)
    auglocal_ext.plan(model, shape, depth=5, modules=2).save_picture(path_of_plan)
    light = {"auxiliary": "light", "recompute": "auto"}
    auglocal_ext.plan(model, shape, memory_budget="2.05GB", **light).save_front(path_of_front)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    local_modules(FOLDER / "local_modules.png")
    resnet34(FOLDER / "plan_resnet34.png", FOLDER / "front_resnet34.png")
