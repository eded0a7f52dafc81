"""What screening.py and study.py share: a queue of trainings, those that are missing run, a table and a picture of what
came out."""

import statistics
import subprocess
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import records
from paper_tables import METHODS, Runner, markdown

from auglocal_ext.cli import errors
from auglocal_ext.cli.options import Parser, device, number
from auglocal_ext.common.files import check_writable
from auglocal_ext.common.memory import format_bytes
from auglocal_ext.report import accuracy_picture, check_picture

__all__ = ["Row", "accuracies", "columns", "draw", "main", "rows_of"]


class Row:
    """The records of trainings that differ in the seed alone.

    network, what: the model, and the rule with its nets, in words; modules: K; records: one a seed.
    """

    def __init__(self, network, what, modules):
        self.network, self.what, self.modules, self._by_seed = network, what, modules, {}

    def add(self, made):
        self._by_seed[made["settings"]["seed"]] = made

    @property
    def records(self):
        return list(self._by_seed.values())

    @property
    def percent(self):
        """Of each seed, on the test images after the last epoch."""
        return [100 * accuracy for accuracy in accuracies(self.records)]


def rows_of(found):
    """The Rows of some records, in the order of their first ones."""
    rows = {}
    for made in found:
        settings = made["settings"]
        what = METHODS[settings["rule"]] + (f" d={settings['depth']}" if settings["depth"] else "")
        if settings["rule"] == "auglocal":
            what += f", {settings.get('auxiliary') or 'paper'}"
        key = settings["model"], what, made["local_modules"]
        rows.setdefault(key, Row(*key)).add(made)
    return list(rows.values())


def columns(row):
    """[K, MACs / BP, peak of a step, accuracy, seeds] of a row, as text."""
    spread = f" ± {statistics.stdev(row.percent):.1f}" if len(row.percent) > 1 else ""
    made = row.records
    size = format_bytes(max(one["peak_bytes"] for one in made))
    accuracy = f"{statistics.mean(row.percent):.1f}{spread}"
    return [str(row.modules), f"{made[-1]['macs_per_bp']:.2f}", size, accuracy, str(len(made))]


def accuracies(seeds):
    return [made["accuracy"]["last"] for made in seeds]


def draw(rows, path):
    """The picture of the network that has the most rows."""
    networks = [row.network for row in rows]
    network = max(networks, key=networks.count)
    rows = [row for row in rows if row.network == network]
    runs = [
        (
            row.what if row.what == METHODS["bp"] else f"{row.modules} local modules",
            row.what if row.what == METHODS["bp"] else f"{row.what.removeprefix('AugLocal ')}, K = {row.modules}",
            row.records[-1]["macs_per_bp"],
            row.records[-1]["peak_bytes"],
            accuracies(row.records),
        )
        for row in sorted(rows, key=lambda row: row.modules)
    ]
    made = rows[0].records[0]["settings"]
    title = f"{network}, {made['train_images']:,} images of CIFAR-10, {made['epochs']} epochs, {made['precision']}"
    accuracy_picture(path, title, runs, baseline=METHODS["bp"])


def main(program, doc, file, runs, table, arguments=None, analysis=None):
    """Runs a program of a queue; returns the exit status.

    Args:
        program, doc: its name and its help.
        file: where results are added, if not told.
        runs: source of images -> [paper_tables.Run], in the queue's order.
        table: Rows -> [cells], the first ones the header.
        analysis: a program of this folder that goes over the models of --models: before the first training, for what
            was stopped, and after each. None: there is none.
    """
    parser = Parser(program, description=doc, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", nargs="?", type=Path, default=file, metavar="FILE")
    add("--data", metavar="SOURCE", help="run what is missing on these images")
    add("--minutes", type=number(above=0), default=600, help="for all runs together (default: %(default)s)")
    add("--models", type=Path, metavar="FOLDER", help="keep the state_dict of each trained model there")
    add("--picture", type=Path, metavar="FILE", help="draw what is there")
    add("--device", type=device, default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    options = parser.parse_args(arguments)
    return errors.run(
        program, lambda: _run(options, runs, table, analysis), lost="; the same command goes on from here"
    )


def _run(options, runs, table, analysis):
    if options.picture:
        check_picture(options.picture, "--picture")
    failed = 0
    if options.data:
        check_writable(options.file, "FILE")
        then = {"then": lambda: _analyse(options, analysis)} if options.models and analysis else {}
        runner = Runner(options.device, options.file, [options.file], options.minutes, options.models, **then)
        failed = runner.run_missing(runs(options.data))
    rows = rows_of(records.read(options.file))
    if not rows and options.data:  # not even the first training has ended
        return int(failed > 0)
    if not rows:
        raise ValueError(f"no records in {options.file}: make some with --data")
    print(markdown(table(rows)))
    if options.picture:
        draw(rows, options.picture)
    return int(failed > 0)


def _analyse(options, program):
    """In a process of its own: what goes wrong there ends no queue. Returns whether something did."""
    command = [sys.executable, str(Path(__file__).parent / program), str(options.file), "--data", options.data]
    return subprocess.run([*command, "--models", str(options.models), "--device", options.device]).returncode != 0
