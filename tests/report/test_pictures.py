"""What the pictures show: lines, marks and texts, as matplotlib was given them."""

import numpy
import pytest
import torch

from auglocal_ext import models, plan, report
from auglocal_ext.report import figure as figure_module


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, which is done too."""
    figures, real = [], figure_module.save
    for module in ("cka", "curves", "confusion", "front", "lines", "step_memory"):
        monkeypatch.setattr(f"auglocal_ext.report.{module}.save", lambda f, path: figures.append(f) or real(f, path))
    return figures


def history(epochs, modules, **more):
    """Validation is best in the epoch before the last."""
    return [
        {
            "epoch": epoch,
            "module_losses": [3.0 - index / modules - epoch / epochs for index in range(modules)],
            "train_accuracy": epoch / epochs / 2,
            "val_accuracy": 0.9 if epoch == epochs - 1 else 0.1,
            **more,
        }
        for epoch in range(1, epochs + 1)
    ]


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def test_the_curve_marks_the_best_epoch_and_has_the_loss_of_validation(drawn, tmp_path):
    report.learning_curve(history(8, 3, val_loss=1.5), tmp_path / "curve.png", "mine")
    accuracy, loss, bar = drawn[0].axes
    lines = lines_of(accuracy)
    assert list(lines["training"].get_ydata()) == [100 * epoch / 16 for epoch in range(1, 9)]
    best = lines["best: 90.00% in epoch 7"]
    assert (*best.get_xdata(), *best.get_ydata()) == (7, 90)
    assert all(line.get_marker() not in ("", "None", None) for line in (*lines.values(), *loss.get_lines()))
    lines = lines_of(loss)
    assert set(lines["validation"].get_ydata()) == {1.5} and len(loss.get_lines()) == 4
    assert lines["training, classifier (module 2)"].get_color() == "black"
    first, second = (line.get_color() for line in loss.get_lines()[:2])
    weights = (0.3, 0.6, 0.1)  # of red, green and blue in a grey
    assert numpy.dot(first[:3], weights) > numpy.dot(second[:3], weights) + 0.3
    assert bar.get_ylabel() == "training, aux net of local module"
    assert all(tick == int(tick) for tick in accuracy.get_xticks())


def test_of_equal_epochs_the_first_is_the_best(drawn, tmp_path):
    """As of best.pt and TrainResult.best."""
    report.learning_curve([entry | {"val_accuracy": 0.5} for entry in history(3, 1)], tmp_path / "curve.png", "mine")
    assert "best: 50.00% in epoch 1" in lines_of(drawn[0].axes[0])


def test_a_curve_of_one_epoch_of_one_module_without_validation(drawn, tmp_path):
    one = [history(1, 1, val_loss=None)[0] | {"val_accuracy": None}]
    report.learning_curve(one, tmp_path / "curve.png", "mine")
    accuracy, loss = drawn[0].axes
    assert set(lines_of(accuracy)) == {"training", "best: 50.00% in epoch 1"} and set(lines_of(loss)) == {"training"}
    assert accuracy.get_xlim() == (0, 2)


def test_many_epochs_have_few_markers(drawn, tmp_path):
    report.learning_curve(history(400, 2), tmp_path / "curve.png", "mine")
    assert lines_of(drawn[0].axes[0])["training"].get_markevery() == 20


def test_confusion_in_shares_of_rows_with_counts_and_names(drawn, tmp_path):
    counts = torch.tensor([[3, 1], [0, 0]])
    report.confusion_picture(counts, ["cat", "a dog of a very long name"], tmp_path / "x.png", "mine")
    axes = drawn[0].axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    assert [text.get_text() for text in axes.texts] == ["3", "1", "0", "0"]
    assert [text.get_color() for text in axes.texts] == ["white", "black", "black", "black"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "a dog of a very l…"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


def test_confusion_of_many_classes_has_names_but_no_counts(drawn, tmp_path):
    names = [f"class {index}" for index in range(100)]
    report.confusion_picture(numpy.eye(100, dtype=int), names, tmp_path / "x.png", "mine")
    axes = drawn[0].axes[0]
    assert not axes.texts and [label.get_text() for label in axes.get_xticklabels()] == names
    drawn[0].draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert not any(one.overlaps(other) for one, other in zip(boxes[:-1], boxes[1:], strict=True))


@pytest.mark.usefixtures("nothing_compared")
def test_numbers_of_many_modules_do_not_overlap(drawn, tmp_path):
    with torch.device("meta"):
        planned = plan(models.resnet44(), (2, 3, 16, 16), rule="predsim")
    planned.save_picture(tmp_path / "x.png")
    numbers = [text for text in drawn[0].axes[0].texts if text.get_text().isdigit()]
    assert 10 < len(numbers) <= len(planned.modules) == 22 and numbers[0].get_text() == "0"
    boxes = [text.get_window_extent() for text in numbers]
    assert all(one.x1 < other.x0 for one, other in zip(boxes[:-1], boxes[1:], strict=True))
    assert drawn[0].get_suptitle().startswith("resnet44, rule predsim: 22 local modules")


def test_the_front_shows_both_engines_and_labels_that_cover_nothing(drawn, tmp_path):
    with torch.device("meta"):
        planned = plan(models.CifarResNet(2), (64, 3, 16, 16), 2, memory_budget="11.3MB")
    planned.save_front(tmp_path / "x.png")
    axes, comparison = drawn[0].axes[0], planned.comparison
    lines = lines_of(axes)
    for label, cost in {
        "BP on this engine": comparison.bp,
        "every unit checkpointed, on this engine": comparison.checkpoint,
        "eager BP": comparison.eager,
        "eager BP, every unit checkpointed": comparison.eager_checkpoint,
    }.items():
        assert (*lines[label].get_xdata(), *lines[label].get_ydata()) == (cost.bytes / 1e6, cost.macs)
    assert f"chosen: K={len(planned.modules)}" in lines
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) > 3
    assert not any(a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[:index])
    points = numpy.concatenate([axes.transData.transform(line.get_xydata()) for line in axes.get_lines()])
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_cka_has_names_numbers_and_one_scale(drawn, tmp_path):
    report.cka_picture(
        [[1, -0.04, 0.6], [0.2, 0.5, 1]], ["a", "b"], ["stem", "x", "y"], tmp_path / "x.png", "t", "A", "B"
    )
    axes, bar = drawn[0].axes
    image = axes.images[0]
    assert image.get_clim() == (0, 1) and image.origin == "lower" and image.get_cmap().name == "cividis"
    assert [text.get_text() for text in axes.texts] == ["1.00", "-0.04", "0.60", "0.20", "0.50", "1.00"]
    assert [text.get_color() for text in axes.texts] == ["black", "white", "black", "white", "white", "black"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["stem", "x", "y"]
    assert (axes.get_ylabel(), axes.get_xlabel(), bar.get_ylabel()) == ("A", "B", "linear CKA")


@pytest.mark.parametrize("units", [3, 16, 55])
def test_names_and_numbers_of_units_do_not_overlap(drawn, tmp_path, units):
    names = [f"layer{index // 18}.{index % 18}" for index in range(units)]
    report.cka_picture(-0.01 * numpy.ones((units, units)), names, names, tmp_path / "x.png", "mine")
    report.probe_picture([(None, [("run", [(name, 0.5) for name in names])])], tmp_path / "y.png", "mine")
    for figure in drawn:
        figure.draw_without_rendering()
        axes = figure.axes[0]
        for labels in (axes.get_xticklabels(), axes.get_yticklabels(), axes.texts):
            boxes = [label.get_window_extent().padded(-1) for label in labels]
            assert not any(one.overlaps(other) for one, other in zip(boxes[:-1], boxes[1:], strict=True))
    assert len(drawn[0].axes[0].texts) == (units**2 if units < 50 else 0)


def test_accuracy_along_the_depth_in_lines_that_differ_in_grey(drawn, tmp_path):
    runs = [(f"run {index}", [("stem", 0.5), ("layer", 0.1 * index)]) for index in range(6)]
    report.probe_picture([(None, runs)], tmp_path / "x.png", "mine")
    lines = lines_of(drawn[0].axes[0])
    assert list(lines["run 3"].get_ydata()) == pytest.approx([50, 30])
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines.values()}) == 6
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == ["stem", "layer"]
    report.probe_picture([(None, [*runs, ("other", [("else", 0.2)])])], tmp_path / "x.png", "mine")
    assert "stem" not in [label.get_text() for label in drawn[1].axes[0].get_xticklabels()]
    report.local_accuracy_picture([("a", [0.5, None, 0.25]), ("b", [1.0])], tmp_path / "x.png", "mine")
    lines = lines_of(drawn[2].axes[0])
    assert numpy.isnan(lines["a"].get_ydata().astype(float)).tolist() == [False, True, False]
    assert list(lines["b"].get_ydata()) == [100]


def test_panels_beside_each_other_have_one_scale_and_one_height(drawn, tmp_path):
    units = ["stem", "layer"]
    one = ("few", [("BP", list(zip(units, [1.0, 0.9], strict=True)))])
    runs = [(f"run {index}", list(zip(units, [0.8, 0.1 * index], strict=True))) for index in range(4)]
    report.similarity_picture([one, ("many", runs)], tmp_path / "x.png", "mine", "BP, seed 0")
    figure = drawn[0]
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("few", "many") and left.get_ylim() == right.get_ylim()
    assert right.get_ylabel() == "linear CKA with BP, seed 0"
    assert list(lines_of(right)["run 3"].get_ydata()) == pytest.approx([0.8, 0.3])
    figure.draw_without_rendering()
    assert left.get_window_extent().height == pytest.approx(right.get_window_extent().height, abs=1)
    legends = [part.legends[0].get_window_extent() for part in figure.subfigs]
    assert not any(legend.overlaps(axes.get_tightbbox()) for legend in legends for axes in figure.axes)
    assert not legends[0].overlaps(legends[1])


def test_small_heat_maps_of_one_scale_whose_names_do_not_meet(drawn, tmp_path):
    units = [f"layer1.{index}" for index in range(16)]
    maps = [(f"run {index}", index / 4 * numpy.eye(16)) for index in range(4)]
    report.cka_maps_picture(maps, units, tmp_path / "x.png", "mine", "A", "B")
    figure = drawn[0]
    shown = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in shown] == [f"run {index}" for index in range(4)]
    assert shown[3].images[0].get_array()[2, 2] == 0.75
    assert {(axes.images[0].get_clim(), axes.images[0].origin) for axes in shown} == {((0, 1), "lower")}
    assert [label.get_text() for label in shown[0].get_xticklabels()] == units
    assert [(axes.get_ylabel(), axes.get_xlabel()) for axes in shown] == [("A", ""), ("", "B"), ("", "B"), ("A", "B")]
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in shown]
    assert not any(one.overlaps(other) for index, one in enumerate(boxes) for other in boxes[:index])
