"""What an analysis of runs has found, as pictures and one page."""

from pathlib import Path

from .cka import cka_picture
from .page import heading, paragraph, picture, table, write_page
from .probes import local_accuracy_picture, probe_picture

__all__ = ["analysis_report"]


def analysis_report(found, folder):
    """Draws the pictures and writes the page.

    Args:
        found: what `auglocal analyze` keeps in analysis.json.
        folder: where the files go.

    Returns:
        The names of the files, the page first.
    """
    folder, runs = Path(folder), found["runs"]
    data = found["data"].split(":")[0]
    parts, files = [heading("Runs"), _runs_table(found)], []
    probed = [(run["name"], list(zip(run["units"], run["probes"], strict=True))) for run in runs if run["probes"]]
    if probed:
        files.append("probes.png")
        probe_picture([(None, probed)], folder / files[-1], f"linear probes of units, {data}")
        text = (
            f"Test accuracy of a linear classifier on each unit's pooled features, in per cent: what a unit has made "
            f"easy to tell apart. It was trained on {found['train_images']:,} images."
        )
        parts += [heading("Linear probes"), paragraph(text), picture(folder / files[-1], "accuracy by unit")]
        parts += [_table_by_place("unit", probed)]
    local = [(run["name"], run["module_accuracies"]) for run in runs if run["module_accuracies"]]
    if any(len(values) > 1 for _, values in local):
        files.append("local_accuracy.png")
        local_accuracy_picture(local, folder / files[-1], f"local modules' own heads, {data}")
        text = "Training accuracy of each local module's own head in the last epoch, in per cent, as the run saw it."
        parts += [heading("Local modules"), paragraph(text), picture(folder / files[-1], "accuracy by module")]
        parts += [_table_by_place("module", [(name, list(enumerate(values))) for name, values in local])]
    parts += [heading("Similarity of features"), paragraph(_ABOUT_CKA)]
    for pair in found["cka"]:
        names = [runs[pair[side]]["name"] for side in ("rows", "columns")]
        units = [runs[pair[side]]["units"] for side in ("rows", "columns")]
        own = pair["rows"] == pair["columns"]
        files.append(f"cka_{pair['rows'] + 1}.png" if own else f"cka_{pair['rows'] + 1}_{pair['columns'] + 1}.png")
        title = f"linear CKA, {found['cka_images']:,} test images, {data}"
        cka_picture(pair["matrix"], *units, folder / files[-1], title, *names)
        text = f"{names[0]} with itself" if own else f"{names[0]} with {names[1]}"
        parts += [paragraph(text), picture(folder / files[-1], f"linear CKA of {text}")]
    parts += [heading("Settings"), table(("setting", "value"), _settings(found))]
    write_page(folder / "report.html", f"Analysis of {', '.join(run['name'] for run in runs)}", parts)
    return ["report.html", *files]


_ABOUT_CKA = (
    "Linear CKA between the units of two runs on the same test images: 1 for features that are equal but for rotation "
    "and scale, about 0 for unrelated ones; unbiased, so it may be a little below 0. A few outliers can change it "
    "where what can be told from the features does not change: read it together with linear probes. Runs of one seed "
    "began with the same weights and saw the same images in the same order; two seeds of one rule show how alike two "
    "trainings can be."
)


def _runs_table(found):
    header = ("", "run", "model", "rule", "depth", "local modules", "epochs", "test accuracy, %")
    rows = []
    for index, run in enumerate(found["runs"]):
        modules = run["module_accuracies"]
        depth = run["depth"] if run["rule"] == "auglocal" else "-"
        epochs = "-" if run["epochs"] is None else run["epochs"]
        cells = [run["name"], run["model"], run["rule"], depth, len(modules) if modules else "-", epochs]
        rows.append([str(index + 1), *map(str, cells), _per_cent(run["test_accuracy"])])
    return table(header, rows)


def _table_by_place(title, runs):
    """A row for each place along the depth, a column for each run; runs: [(run, [(place, accuracy)])]."""
    places = list(dict.fromkeys(place for _, values in runs for place, _ in values))
    found = [dict(values) for _, values in runs]
    rows = [[str(place), *(_per_cent(values.get(place)) for values in found)] for place in places]
    return table((title, *(name for name, _ in runs)), rows)


def _per_cent(value):
    return "-" if value is None else f"{100 * value:.2f}"


def _settings(found):
    names = ("data", "test_images", "train_images", "cka_images", "batch_size", "device")
    rows = [(name.replace("_", " "), "-" if found[name] is None else str(found[name])) for name in names]
    rows += [(f"folder of {run['name']}", run["folder"]) for run in found["runs"]]
    return rows + list(found["versions"].items())
