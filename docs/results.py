"""The section "The study" of docs/results.md, from the study's records and their analysis.

python docs/results.py       rewrites what is between its two markers, and draws the pictures that it shows
"""

import os
import re
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
import queued
import records
import study
import study_analysis
from paper_tables import METHODS, ROOT, markdown

from auglocal_ext.cli import errors
from auglocal_ext.common.files import write_text

PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- the study: written by python docs/results.py -->\n", "<!-- the study ends -->\n"

# ---- what the paper lets expect ---------------------------------------------------------------------------------


def early_probes(row):
    """Mean accuracy of the first third's linear probes, %, of each of a row's models."""
    return [100 * study_analysis.by_stage(line["probes"])[0] for line in row.lines]


def early_similarity(row):
    """Mean CKA of the first third of the units with backpropagation's, of each of a row's models."""
    return [study_analysis.by_stage(study_analysis.diagonal(line))[0] for line in row.compared]


def similarity(row):
    """Mean CKA of all units with backpropagation's, of each of a row's models."""
    return [statistics.mean(study_analysis.diagonal(line)) for line in row.compared]


LOCAL = study.PAPER[None]  # AugLocal as the paper cuts it
# Sentence; figure; the cut that should have more of it, the one that should have less; the figure's digits and unit.
EXPECTED = [
    ("DGL's early units tell classes apart better than AugLocal's", early_probes, study.DGL, LOCAL, "+.1f", " points"),
    ("PredSim's too", early_probes, study.PREDSIM, LOCAL, "+.1f", " points"),
    ("DGL's early units are less like BP's than AugLocal's", early_similarity, LOCAL, study.DGL, "+.3f", ""),
    ("PredSim's too", early_similarity, LOCAL, study.PREDSIM, "+.3f", ""),
    ("two modules are more like BP than one per unit", similarity, study.PAPER[2], LOCAL, "+.3f", ""),
    ("four modules too", similarity, study.PAPER[4], LOCAL, "+.3f", ""),
]


def expectations(lines):
    """Rows of cells, the first one the header: whether lines of the analysis bear out what is expected."""
    rows = study_analysis.learnt(lines)
    cells = [["expected", "difference, 95 %", "verdict"]]
    for sentence, figure, more, less, digits, unit in EXPECTED:
        values = {row.cut: figure(row) for row in rows}
        if more not in values or less not in values:
            cells.append([sentence, "", "not yet trained"])
            continue
        difference = statistics.mean(values[more]) - statistics.mean(values[less])
        spread = study.pooled_deviation(list(values.values()))
        if spread is None:
            cells.append([sentence, f"{difference:{digits}}{unit}", "one seed each: not decided"])
            continue
        half = study.interval(len(values[more]), len(values[less]), *spread)
        shown = f"{difference:{digits}} ± {half:{digits[1:]}}{unit}"
        cells.append([sentence, shown, _verdict(difference, half)])
    return cells


def _verdict(difference, half):
    if abs(difference) <= half:
        return "not decided"
    return "holds" if difference > 0 else "does not hold"


# ---- the section ------------------------------------------------------------------------------------------------


def section(file, page):
    """The text between the markers.

    Args:
        file: the study's records; what study_analysis.py made of them is beside it.
        page: on which it is to stand.
    """
    made, lines = _read(file), study_analysis.read(file)
    parts = [_about(made, lines)]
    if made:
        rows = _ordered(made)
        cells = study.table(rows)
        parts += [markdown(cells), _columns(rows), _decided(cells), *_pictures([_drawn(file)], page)]
    parts += ["#### What its models have learnt", *_learnt(lines, file, page), _commands(file)]
    return "\n\n".join(parts) + "\n"


def _read(file):
    """The study's records, of each training the last one."""
    return list({_key(made["settings"]): made for made in records.read(file)}.values())


def _columns(rows):
    """What the columns of the study's table are."""
    spread = study.pooled_deviation([row.percent for row in rows])
    pooled = "none has yet"
    if spread:
        few = ": few, so more seeds may change all verdicts together" if spread[1] < 5 else ""
        pooled = f"here {spread[0]:.2f} points, degrees of freedom {spread[1]}{few}"
    return (
        "*accuracy*: of several seeds mean ± standard deviation; bars in the picture: the lowest and the highest.\n"
        "*core minutes*: of one training at the pace of its fastest epoch, as other work shared the cores; times\n"
        "threads. *to BP*: points, with the 95 % interval over other seeds: Student's t, one standard deviation for\n"
        f"all rows, pooled over those that have several seeds ({pooled}).\n"
        "*paper*: its accuracy after 400 epochs; *paper's gap*: that minus the paper's own backpropagation."
    )


def _about(made, lines):
    queue, done = study.runs(""), {_key(one["settings"]) for one in made}
    trained = sum(_key(asdict(run)) in done for run in queue)
    rows = {_key(asdict(run))[:-1] for run in queue}
    about = (
        f"ResNet-32 on all of CIFAR-10, 50,000 images, {study.EPOCHS} epochs, bf16, batches of {study.BATCH}: every\n"
        f"cut and rule beside backpropagation. Trainings done: {trained} of {len(queue)}; rows with a seed or more: "
        f"{len(rows & {key[:-1] for key in done})} of {len(rows)}."
    )
    return "\n".join([about, *_machines(made + lines)])


def _key(settings):
    return tuple(settings.get(name) for name in ("rule", "depth", "modules", "auxiliary", "seed"))


def _machines(made):
    """Where and by which versions records and analyses were made, a line each."""
    commits = {}
    for machine in (one["machine"] for one in made):
        device = re.sub("(?<= 1 thread)s", "", machine["device"])
        where = f"{device}, torch {machine['torch']}, Python {machine['python']}"
        commits.setdefault(where, {})[machine["commit"]] = None
    return [f"{where}, commit{'s' * (len(ones) > 1)} {', '.join(ones)}." for where, ones in commits.items()]


def _ordered(made):
    """The study's rows in the order of its queue."""
    order = {_key(asdict(run)): index for index, run in enumerate(study.runs(""))}
    return queued.rows_of(sorted(made, key=lambda one: order.get(_key(one["settings"]), len(order))))


def _decided(cells):
    """What the verdicts of the study's table say, in a sentence each."""
    header, *rows = cells
    verdicts = {}
    for row in rows:
        if row[0] != METHODS["bp"] and row[header.index("verdict")]:
            verdicts.setdefault(row[header.index("verdict")], []).append(f"{row[0]}, *K* = {row[1]}")
    if not verdicts:
        return "There is nothing to compare yet."
    words = {
        "equal": f"Equal to backpropagation within {study.EQUAL:g} point",
        "worse": "Worse than backpropagation",
        "better": "Better than backpropagation",
        "not decided": "Not decided",
        "one seed": "Not decided, as no row has two seeds",
    }
    return "\n".join(f"- {words[name]}: {'; '.join(verdicts[name])}." for name in words if name in verdicts)


def _learnt(lines, file, page):
    if not lines:
        return ["None of them is analysed yet."]
    return [
        f"{_FIGURES} Models analysed: {len(lines)}.",
        markdown(study_analysis.table(lines)),
        *_pictures(study_analysis.pictures(file), page),
        "What the paper leads one to expect, by means over the early units or over all of them:",
        markdown(expectations(lines)),
        _spread(lines),
    ]


_FIGURES = (
    "Linear centered kernel alignment, CKA (how alike features are, 0 to 1), of each unit with the same unit of a\n"
    "model of backpropagation on 10,000 test images, and test accuracy of linear probes (linear classifiers on a\n"
    "unit's features) trained on 10,000 training images. Early, middle and late units are those at ResNet-32's three\n"
    "resolutions. CKA is always with a model of another seed: two trainings of one seed begin with the same weights\n"
    "and see the same images in the same order. So the row BP, two trainings of backpropagation, is the ceiling. Maps\n"
    "are of each row's first seed. *probe* columns: of the first, the middle and the last unit."
)


def _spread(lines):
    """Of which rows the intervals of `expectations` are."""
    several = [row.name for row in study_analysis.learnt(lines) if len(row.lines) > 1]
    if not several:
        return "No row has two seeds yet, so there are no intervals."
    return (
        f"Intervals as above, from the spread over seeds of: {'; '.join(several)}.\n"
        "The other rows' own spread is not known. CKA between backpropagation's seeds 0 and 1 is one pair: one figure."
    )


def _drawn(file):
    return file.with_name("study_accuracy.png")


def _pictures(paths, page):
    """Those that there is something to draw of, and that are there therefore."""
    titles = {
        "study_accuracy": "Accuracy against arithmetic",
        "study_cka": "CKA with backpropagation by unit",
        "study_cka_maps": "CKA of all pairs of units",
        "study_probes": "Accuracy of linear probes by unit",
    }
    return [f"![{titles[path.stem]}]({os.path.relpath(path, page.parent)})" for path in paths if path.exists()]


def _commands(file):
    files = [path for path in (file, study_analysis.analysis_file(file)) if path.exists()]
    raw = f"; raw: {', '.join(f'`{os.path.relpath(path, ROOT)}`' for path in files)}" if files else ""
    return (
        "`python python/study.py --data imagefolder:ROOT --models FOLDER` trains and analyses what is missing,\n"
        f"`python docs/results.py` renews this section{raw}."
    )


def renew(file=study.FILE, page=PAGE):
    """Rewrites the section of a page, and draws what it shows."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} must have the lines {BEGIN.strip()} and {END.strip()}: put them around the section")
    made, lines = _read(file), study_analysis.read(file)
    if len(rows := _ordered(made)) > 1:
        queued.draw(rows, _drawn(file))
    if lines:
        study_analysis.draw(lines, file)
    write_text(page, f"{before}{begin}\n{section(file, page)}\n{end}{after}")
    print(f"{page}: {len(made)} records, {len(lines)} of them analysed")
    return 0


if __name__ == "__main__":
    sys.exit(errors.run("results", renew))
