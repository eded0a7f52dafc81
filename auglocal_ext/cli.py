"""The command line: `auglocal train` and `auglocal plan`; also `python -m auglocal_ext`."""

import contextlib
import sys
import time
from functools import partial
from pathlib import Path

import torch

from . import __version__, data, models, report
from ._commands import (
    Parser,
    check_cut,
    check_image_size,
    device,
    in_words_of_options,
    number,
    run,
    seed,
    size,
    whole,
)
from ._files import save_model, write_json
from .loop import TrainingDiverged, TrainingInterrupted, train
from .memory import format_bytes
from .optim import sgd
from .plan import PRECISIONS, plan
from .rules import FORMS, RULES, for_images

__all__ = ["main"]


def main(arguments=None):
    """Runs the command line; returns the exit status: see `_commands`."""

    def command():
        options = _parser().parse_args(arguments)
        return options.run(options)

    return run("auglocal", command)


def _parser():
    parser = Parser(prog="auglocal", description="Trains CNN backbones by supervised local learning (AugLocal).")
    commands = parser.add_subparsers(required=True, metavar="train|plan")

    training = commands.add_parser("train", help="train a model", description="Trains a model; leaves runs/NAME/.")
    training.set_defaults(run=_train)
    add = training.add_argument
    add(
        "--data",
        default="digits",
        help="digits, cifar10:ROOT, svhn:ROOT, stl10:ROOT, imagefolder:ROOT or fake:N (default: %(default)s)",
    )
    add("--download", action="store_true", help="fetch CIFAR-10, SVHN or STL-10 if it is not at ROOT")
    epochs = whole(1, expected="a whole number of at least 1")
    add("--epochs", type=epochs, default=15, help="times through the training data (default: %(default)s)")
    add("--batch-size", type=whole(2), default=128, help="images in a step (default: %(default)s)")
    add("--lr", type=number(0), help="learning rate (default: 0.1 x batch size / 128)")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device, default=here, help="cpu, cuda or cuda:N (default here: %(default)s)")
    add("--seed", type=seed, default=0, help="of weights, order and augmentation (default: %(default)s)")
    add("--workers", type=whole(0, 1024), default=0, help="processes that read large images (default: %(default)s)")
    add("--name", help="of the run's folder (default: made of the settings and the time)")
    add("--runs", type=Path, default=Path("runs"), help="where runs' folders go (default: %(default)s)")
    add("--quiet", action="store_true", help="no progress bar, no line per epoch")

    planning = commands.add_parser("plan", help="show how a model is cut", description="Shows how a model is cut.")
    planning.set_defaults(run=_plan)
    add = planning.add_argument
    add("--image-size", type=whole(1, 10_000), default=32, help="pixels along a side (default: %(default)s)")
    add("--batch-size", type=whole(1), default=128, help="images in a step (default: %(default)s)")
    add("--num-classes", type=whole(1), default=10, help="outputs of the model (default: %(default)s)")
    add("--picture", type=Path, metavar="FILE", help="draw live memory over the step, as PNG, PDF or SVG")
    add("--front", type=Path, metavar="FILE", help="with --budget: draw memory against arithmetic for every K")

    for command in (training, planning):
        add = command.add_argument
        add(
            "--model",
            default="resnet20",
            help="resnet20 ... resnet110, or a ResNet or VGG of torchvision (default: %(default)s)",
        )
        add(
            "--rule",
            choices=RULES,
            default="auglocal",
            help="learning rule; bp: plain backpropagation (default: %(default)s)",
        )
        add(
            "--depth",
            type=whole(2, words=("auto",)),
            default=4,
            help="layers of an auxiliary net and its classifier; auto: what --budget allows (default: %(default)s)",
        )
        add(
            "--form",
            choices=FORMS,
            help="cifar: aux nets less deep toward the output, the last DEPTH units one module; imagenet: one module "
            "per unit, aux nets of one depth (default: cifar for resnet20 ... resnet110, else imagenet)",
        )
        add("--modules", type=whole(1), metavar="K", help="cut into K local modules instead")
        add("--precision", choices=PRECISIONS, default="fp32", help="of the features (default: %(default)s)")
        add("--recompute", action="store_true", help="run convolutions again in the backward instead of keeping theirs")
        add(
            "--budget",
            type=size,
            metavar="SIZE",
            help="bytes a step may take, such as 6GB: cut where it fits at the least work",
        )
    return parser


def _plan(options):
    if options.front and options.budget is None:
        raise ValueError("--front draws the search under a budget: give --budget too, for instance --budget 6GB")
    for path, option in ((options.picture, "--picture"), (options.front, "--front")):
        if path:
            report.check_picture(path, option)
    model, side = check_cut(options), options.image_size
    check_image_size(model, side, side, "--image-size")
    shape = (options.batch_size, 3, side, side)
    cutting = {"rule": options.rule, "form": options.form, "modules": options.modules, "recompute": options.recompute}
    # Weights without values, as none is looked at; on the CPU, whose optimizer is planned.
    model = model.train().to_empty(device="cpu")
    planned = plan(model, shape, options.depth, precision=options.precision, memory_budget=options.budget, **cutting)
    print(planned)
    for path, save in ((options.picture, planned.save_picture), (options.front, planned.save_front)):
        if path:
            save(path)
            print(f"saved {path}")
    return 0


def _train(options):
    if options.name and Path(options.name).name != options.name:
        raise ValueError(f"--name must be a plain folder name, given {options.name!r}: choose the place with --runs")
    cuttable = check_cut(options)
    with _new_folder(options) as folder:
        torch.manual_seed(options.seed)
        reading = {
            "workers": options.workers,
            "download": options.download,
            "device": options.device,
            "progress": not options.quiet,
        }
        source = data.load(options.data, options.batch_size, **reading)
        check_image_size(cuttable, *source.description["image_size"], "--model, or larger images")
        return _train_in(folder, options, source)


def _train_in(folder, options, source):
    """Trains on a Data; leaves the files in the folder."""
    model, history = models.create(options.model, source.num_classes), []
    write_json(folder / "settings.json", _settings(options, source))

    def save(entry):
        # After every epoch, so that no interruption costs more than one.
        history.append(entry)
        write_json(folder / "history.json", history)
        save_model(folder / "model.pt", model)

    optimizer = partial(sgd(options.batch_size), lr=options.lr) if options.lr is not None else None
    started, status = time.perf_counter(), 0
    try:
        result = train(
            model,
            source.train,
            options.depth,
            val_loader=source.test,
            epochs=options.epochs,
            rule=for_images(options.rule, source.description["mean"], source.description["std"]),
            form=options.form,
            modules=options.modules,
            memory_budget=options.budget,
            recompute=options.recompute,
            optimizer=optimizer,
            precision=options.precision,
            device=options.device,
            seed=options.seed,
            progress=not options.quiet,
            on_epoch=save,
        )
    except (TrainingInterrupted, TrainingDiverged) as stop:
        if not history:
            raise
        result, status = stop.result, 130 if isinstance(stop, TrainingInterrupted) else 3
        print(f"\nauglocal: {in_words_of_options(stop)}", file=sys.stderr)
    title = f"{options.model} on {options.data.split(':')[0]}, rule {options.rule}"
    if result.plan.depth:
        title += f", depth {result.plan.depth}"
    if len(result.plan.modules) > 1:
        title += f", {len(result.plan.modules)} local modules"
    report.learning_curve(history, folder / "learning_curve.png", title)
    if status == 3:
        print(f"auglocal: the files of the {len(history)} epochs until then are in {folder}", file=sys.stderr)
        return status
    print(
        f"{title}: test accuracy {history[-1]['val_accuracy']:.2%} after {len(history)} epochs in "
        f"{time.perf_counter() - started:.1f} s, peak memory {format_bytes(result.peak_bytes)}\n"
        f"saved to {folder}: model.pt (a plain state_dict), settings.json, history.json, learning_curve.png"
    )
    return status


def _settings(options, source):
    """What is needed to use model.pt: the options, the versions, the classes and the images' normalisation."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    given.pop("run")
    versions = {"torch": torch.__version__, "auglocal_ext": __version__}
    return {"options": given, "versions": versions, **source.description, "num_classes": source.num_classes}


@contextlib.contextmanager
def _new_folder(options):
    """Makes the run's folder, before anything is read; a run that did not get to a first result leaves nothing."""
    name = options.name
    if not name:
        cut = f"d{options.depth}" if options.rule == "auglocal" else options.rule
        cut += f"-K{options.modules}" if options.modules else ""
        name = f"{options.model}-{options.data.split(':')[0]}-{cut}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = options.runs / name
    try:
        created = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True)
    except FileExistsError as error:
        if folder.exists():
            raise ValueError(f"{folder} exists already: choose another --name") from None
        raise _no_folder(folder, error) from None
    except OSError as error:
        raise _no_folder(folder, error) from None
    try:
        yield folder
    finally:
        if not (folder / "history.json").exists():
            (folder / "settings.json").unlink(missing_ok=True)
            for path in created:
                with contextlib.suppress(OSError):  # another run's folder lies in it by now
                    path.rmdir()


def _no_folder(folder, error):
    return OSError(f"{folder} cannot be made: {error.strerror}: {error.filename}; choose another --runs")
