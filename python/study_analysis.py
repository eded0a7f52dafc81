"""What the study's models have learnt: how alike their units' features are to backpropagation's, and linear probes.

    python python/study_analysis.py --data imagefolder:ROOT --models FOLDER [FILE]     analyses what is not analysed yet
    python python/study_analysis.py [FILE]                                      the table, Markdown, and the pictures

FILE: the study's records, benchmarks/results/study_cifar50k.jsonl; FOLDER: what study.py was given as --models, which
runs this program by itself after every row. Beside FILE are study_analysis.jsonl, a line for each row's model;
study_models/, backpropagation's models of seeds 0 and 1; and the pictures study_cka.png, study_cka_maps.png and
study_probes.png.

CKA is of every unit with every unit of a model of backpropagation, on all test images in batches of 125, see
`auglocal_ext.analysis.cka`: with that of seed 1 for a model of seed 0, of seed 0 for all others. Never of one seed: two
trainings of one seed begin with the same weights and see the same images in the same order. So backpropagation's own
row is the ceiling: what another beginning alone changes. (That of the same seed instead moved a row's mean over units
by at most 0.012.) Probes are trained on 10,000 training images, see `auglocal_ext.analysis.probe`. The kept models are
in half precision; that of seed 0 in place of itself in single precision moved one entry of CKA by 0.00010, and none by
more.

A line of study_analysis.jsonl:
    settings, local_modules   of the row's record
    machine     on which it was analysed, see records.py
    reference   the model that CKA is with
    units       their names
    cka         [unit][unit of the reference], rounded to four digits
    probes      test accuracy of each unit's linear probe, 0 to 1
    test_accuracy             of the model, 0 to 1
    images      how many: {"cka", "train" and "test" of the probes}
    seconds     that it took
"""

import contextlib
import statistics
import sys
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import queued
import records
import study
from paper_tables import METHODS, Run, markdown

from auglocal_ext import analysis, data, evaluate, models
from auglocal_ext.cli import errors
from auglocal_ext.cli.options import Parser, device
from auglocal_ext.cli.weights import load_weights
from auglocal_ext.common.files import check_writable, write_whole
from auglocal_ext.report import check_picture, cka_maps_picture, probe_picture, similarity_picture

FIELDS = {"settings", "machine", "local_modules", "reference", "units", "cka", "probes"}
IMAGES, BATCH = 10_000, 125
KEPT_SEEDS = (0, 1)  # of backpropagation, whose models all others are compared with
SAME = 0.005  # within which the accuracy of a model is that of its record, whatever the machine's rounding

REFERENCE = "BP of another seed"
STAGES = ("early", "middle", "late")  # a third of the units each; of ResNet-32 its three stages
# The rows that have a heat map, as far as they are there.
MAPPED = [study.BP, study.DGL, study.PREDSIM, study.PAPER[None], study.PAPER[2], study.LIGHT[4]]


def analysis_file(file):
    """Where the lines are of a file of the study's records."""
    return file.with_name("study_analysis.jsonl")


def kept_model(file, seed):
    """Where backpropagation's model of a seed is kept."""
    return file.parent / "study_models" / f"bp_seed{seed}.pt"


def reference_seed(seed):
    """That of backpropagation's model with which a model of a seed is compared."""
    return KEPT_SEEDS[1] if seed == KEPT_SEEDS[0] else KEPT_SEEDS[0]


def read(file):
    """The lines of the analysis of a file of the study's records."""
    return records.read(analysis_file(file), fields=FIELDS, what="an analysis")


# ---- analysing --------------------------------------------------------------------------------------------------


def analyse_missing(file, source, folder, device="cpu"):
    """Adds a line for each record that has a model in the folder and none yet; returns how many were refused."""
    made = {Run.of(one["settings"]).slug: one for one in records.read(file)}  # of one run the later record
    done = {Run.of(line["settings"]).slug for line in read(file)}
    there = {slug: one for slug, one in made.items() if (folder / f"{slug}.pt").exists()}
    missing = [(slug, one) for slug, one in there.items() if slug not in done]
    print(f"analysis: {len(there)} of {len(made)} rows have a model, {len(missing)} are not analysed yet", flush=True)
    if not missing:
        return 0
    check_writable(analysis_file(file), "FILE")
    images, refused = data.load(source, BATCH, device=device), 0
    keep_references([(one, folder / f"{slug}.pt") for slug, one in missing], images, file, device)
    for index, (slug, one) in enumerate(missing, 1):
        print(f"[{index}/{len(missing)}] {Run.of(one['settings'])}: ", end="", flush=True)
        seed = reference_seed(one["settings"]["seed"])
        if not kept_model(file, seed).exists():
            print(f"waits for backpropagation of seed {seed}, with whose model it is compared", flush=True)
            continue
        try:
            line = analyse(one, folder / f"{slug}.pt", images, file, device)
        except ValueError as error:
            print(f"LEFT OUT: {error}", flush=True)
            refused += 1
            continue
        records.append(analysis_file(file), line)
        print(f"best linear probe {max(line['probes']):.2%}, {line['seconds']:.0f} s", flush=True)
    return refused


def keep_references(missing, images, file, device="cpu"):
    """Keeps backpropagation's models that others are compared with, before the first of these is.

    Args:
        missing: [(record, its model's state_dict)]; a model that is not its record's is left out, and told of later.
    """
    for made, path in missing:
        settings = made["settings"]
        if settings["rule"] == "bp" and settings["seed"] in KEPT_SEEDS:
            with contextlib.suppress(ValueError):
                keep_half(_of_record(made, path, images, device)[0], kept_model(file, settings["seed"]))


def analyse(made, path, images, file, device="cpu"):
    """The line of one record's model.

    Args:
        made: the record.
        path: its model's state_dict.
        images: `auglocal_ext.data.Data`.
        file: beside which the model is that it is compared with.

    Raises:
        ValueError: the model is not that of the record.
    """
    began, settings = time.perf_counter(), made["settings"]
    model, accuracy = _of_record(made, path, images, device)
    reference = kept_model(file, reference_seed(settings["seed"]))
    train, test = images.train.sample(IMAGES), images.test.sample(IMAGES)
    alike = analysis.cka(model, _loaded(reference, settings["model"], images, device), test, progress=True)
    probes = analysis.probe(model, train, test, progress=True)
    return {
        "settings": settings,
        "machine": records.machine(device),
        "local_modules": made["local_modules"],
        "reference": reference.name,
        "units": alike.rows,
        "cka": [[round(value, 4) for value in row] for row in alike.matrix.tolist()],
        "probes": [accuracy for _, accuracy in probes],
        "test_accuracy": accuracy,
        "images": {"cka": alike.images, "train": len(train.images), "test": len(test.images)},
        "seconds": round(time.perf_counter() - began, 1),
    }


def _of_record(made, path, images, device):
    """(the model of a record, its accuracy); ValueError where it is another one's."""
    settings = made["settings"]
    model = _loaded(path, settings["model"], images, device)
    accuracy = evaluate(model, images.test, precision=settings["precision"], progress=True)
    if abs(accuracy - made["accuracy"]["last"]) > SAME:
        raise ValueError(
            f"{path} has an accuracy of {accuracy:.2%}, its record {made['accuracy']['last']:.2%}: it is of another "
            f"training, or of one that has not ended"
        )
    return model, accuracy


def keep_half(model, path):
    """Writes a model's state_dict in half precision."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    write_whole(path, lambda file: torch.save(half, file))


def _loaded(path, name, images, device):
    model = models.create(name, images.num_classes)
    load_weights(model, path, name, "the model")
    return model.to(device).eval()


# ---- what came out ----------------------------------------------------------------------------------------------


class Learnt:
    """What one row's models have learnt; of several seeds their means.

    name: in words that no other row has; cut: see study.py; lines: one a seed, the lowest first; units: their names.
    """

    def __init__(self, row):
        self.name = row.what if row.what == METHODS["bp"] else f"{row.what}, K = {row.modules}"
        self.lines = sorted(row.records, key=lambda line: line["settings"]["seed"])
        settings = self.lines[0]["settings"]
        self.cut = tuple(settings.get(name) for name in ("rule", "depth", "modules", "auxiliary"))
        self.units = self.lines[0]["units"]

    @property
    def compared(self):
        """The lines whose CKA counts: one of the two that compare backpropagation's kept models with each other."""
        seeds = {line["settings"]["seed"]: line for line in self.lines}
        if self.cut[0] == "bp" and set(KEPT_SEEDS) <= seeds.keys():
            del seeds[KEPT_SEEDS[1]]
        return list(seeds.values())

    @property
    def similarity(self):
        """CKA of each unit with the reference's same unit."""
        return _means(diagonal(line) for line in self.compared)

    @property
    def probes(self):
        return _means(line["probes"] for line in self.lines)

    @property
    def matrix(self):
        """CKA of each unit with each of the reference's, of the lowest seed."""
        return self.lines[0]["cka"]


def learnt(lines):
    """The rows that lines of the analysis are of, in the order of the study's queue: the ceiling is the first."""
    found = map(Learnt, queued.rows_of(lines))
    return sorted(found, key=lambda row: study.FIRST.index(row.cut) if row.cut in study.FIRST else len(study.FIRST))


def diagonal(line):
    return [row[index] for index, row in enumerate(line["cka"])]


def by_stage(values):
    """Means of the first, the second and the last third of the units."""
    parts = [[], [], []]
    for index, value in enumerate(values):
        parts[3 * index // len(values)].append(value)
    return [statistics.mean(part) for part in parts]


def _means(of_seeds):
    return [statistics.mean(values) for values in zip(*of_seeds, strict=True)]


def table(lines):
    """Rows of cells, the first one the header; backpropagation with itself, the ceiling, comes first."""
    header = ["rule, nets, modules", *(f"CKA {stage}" for stage in STAGES)]
    cells = [[*header, "probe first, %", "probe middle, %", "probe last, %", "seeds"]]
    for found in learnt(lines):
        similar = [f"{value:.2f}" for value in by_stage(found.similarity)]
        cells.append([found.name, *similar, *_probes(found.probes), str(len(found.lines))])
    return cells


def _probes(values):
    return [f"{100 * value:.1f}" for value in (values[0], values[len(values) // 2], values[-1])]


def pictures(file):
    """Where the pictures are: of CKA by unit, of whole matrices, of probes."""
    return [file.with_name(f"study_{name}.png") for name in ("cka", "cka_maps", "probes")]


def draw(lines, file):
    """Draws what lines tell, at least one; returns the pictures."""
    cka, maps, probes = pictures(file)
    found, drawn, made = learnt(lines), [cka, probes], lines[0]["settings"]
    title = f"{made['model']}, {made['train_images']:,} images of CIFAR-10, {made['epochs']} epochs"
    similar = _panels([(row, _named(row.name, row.units, row.similarity)) for row in found])
    similarity_picture(similar, cka, title, REFERENCE)
    mapped = [(row.name, row.matrix) for cut in MAPPED for row in found if row.cut == cut]
    if mapped:
        cka_maps_picture(mapped, found[0].units, maps, title, "its unit", f"unit of {REFERENCE}")
        drawn.insert(1, maps)
    probe_picture(_panels([(row, _named(row.name, row.units, row.probes)) for row in found]), probes, title)
    return drawn


def _panels(rows):
    """[(title, lines)]: cuts as their authors have them apart from those into few modules; BP's are in both.

    rows: [(Learnt, line)].
    """
    groups = {
        "as the rules' authors cut": [line for row, line in rows if row.cut[0] == "bp" or not row.cut[2]],
        "cut into K modules": [line for row, line in rows if row.cut[0] == "bp" or row.cut[2]],
    }
    return [(title, lines) for title, lines in groups.items() if lines]


def _named(name, units, values):
    return name, list(zip(units, values, strict=True))


# ---- the program ------------------------------------------------------------------------------------------------


def main(arguments=None):
    """Runs the program; returns the exit status."""
    parser = Parser("study_analysis", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", nargs="?", type=Path, default=study.FILE, metavar="FILE")
    add("--data", metavar="SOURCE", help="analyse what is missing on these images")
    add("--models", type=Path, metavar="FOLDER", help="where the models are")
    add("--device", type=device, default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    options = parser.parse_args(arguments)
    if (options.data is None) != (options.models is None):
        parser.error("--data and --models go together: give both or none")
    return errors.run("study_analysis", lambda: _run(options), lost="; the same command goes on from here")


def _run(options):
    if options.data:
        return int(analyse_missing(options.file, options.data, options.models, options.device) > 0)
    lines = read(options.file)
    if not lines:
        raise ValueError(f"no lines in {analysis_file(options.file)}: make some with --data and --models")
    for path in pictures(options.file):
        check_picture(path, "FILE")
    print(markdown(table(lines)))
    print(f"\ndrawn: {', '.join(map(str, draw(lines, options.file)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
