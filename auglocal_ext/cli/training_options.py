"""The options of a training, one set for all programs: what they are, what goes together, and what stands above what.

Default < preset < --config < what is typed.
"""

import argparse
from pathlib import Path

from ..common.messages import plural
from .config import read_config
from .names import CLIPS, FORMS, NONFINITE, OPTIMIZERS, PRECISIONS, PREFER, RULES, SCHEDULES, WITH_MOMENTUM
from .options import default_device, device, number, seed, size, whole
from .presets import DEFAULTS, LEARNING_RATES, PRESETS, defaults_of

__all__ = ["add_cut", "add_run", "add_training", "default_learning_rate", "settled", "stepping_of", "told"]

_DEPTH, _LR = whole(2, words=("auto",)), number(0)
_DATA = (
    "digits, cifar10:ROOT, cifar100:ROOT, svhn:ROOT, stl10:ROOT, mnist:ROOT, fashionmnist:ROOT, imagefolder:ROOT or "
    "fake:N (default: {default})"
)
_CUT = (
    "model", "rule", "depth", "form", "auxiliary", "modules", "units", "freeze", "freeze_norms", "precision",
    "recompute", "sync_bn", "budget", "prefer",
)  # fmt: skip
_STEPPING = ("accumulate", "clip_grad_norm", "clip_grad_value", "clip", "model_ema", "model_ema_decay")


def add_training(parser, *, depth=_DEPTH, lr=_LR, data=_DATA, preset=None):
    """Adds what every training has; only what is typed is in the parsed Namespace, see `settled`.

    Args:
        depth, lr: kinds of --depth and --lr, where a program takes less.
        data: the help of --data.
        preset: whose values the help tells as defaults.
    """
    add_cut(parser, depth=depth, preset=preset)
    add = _adder(parser, defaults_of(preset))
    add("--data", metavar="SOURCE", help=data)
    add("--download", action="store_true", help="fetch the images if they are not at ROOT")
    add("--workers", "-j", type=whole(0, 1024), help="processes that read large images (default: {default})")
    add("--image-size", type=whole(1, 10_000), help="pixels along a side (default: as the data has them)")
    add(
        "--val-split",
        type=number(0, below=1),
        help="share of the training images to validate on (default: none, but on the test images)",
    )
    add(
        "--weights",
        metavar="WEIGHTS",
        help="begin with these: a file with a state_dict, or the name of torchvision's for the model, DEFAULT or "
        "IMAGENET1K_V1 for instance, which are fetched (default: random ones)",
    )
    epochs = whole(1, expected="a whole number of at least 1")
    add("--epochs", type=epochs, help="times through the training data (default: {default})")
    add(
        "--batch-size",
        "-b",
        type=whole(2),
        help="images in a step, of each process under torchrun (default: {default})",
    )
    add("--optimizer", "--opt", choices=OPTIMIZERS, help="sgd: with Nesterov momentum (default: {default})")
    rate = f"{LEARNING_RATES[preset]:g}"
    add("--lr", type=lr, help=f"learning rate (default: {rate} x batch size x --accumulate x processes / 128; of "
        "another optimizer, torch's)")  # fmt: skip
    add("--momentum", type=number(0, below=1), help="of sgd and rmsprop (default: 0.9 of sgd)")
    add("--weight-decay", "--wd", type=number(0), help="(default: 1e-4; of another optimizer than sgd, torch's)")
    add("--norm-weight-decay", type=number(0), help="of normalisations (default: as --weight-decay)")
    add("--bias-weight-decay", type=number(0), help="of biases (default: as --weight-decay)")
    add(
        "--schedule",
        "--lr-scheduler",
        choices=SCHEDULES,
        help="of the learning rate; step: to a tenth after each third; exponential: to a hundredth at the end; paper: "
        "the cosine of its code, from 100 epochs on (default: {default})",
    )
    add(
        "--warmup",
        "--lr-warmup-epochs",
        type=number(0),
        metavar="EPOCHS",
        help="with a learning rate that rises (default: with cosine a tenth of them, at most 10; else 0)",
    )
    add("--label-smoothing", type=number(0, below=1), help="of the cross-entropy (default: {default})")
    shares = {"type": number(0), "metavar": "ALPHA"}
    add("--mixup", "--mixup-alpha", **shares, help="mix images of a batch, by shares of Beta(ALPHA, ALPHA); 0: do not")
    add("--cutmix", "--cutmix-alpha", **shares, help="paste cuts of other images; with --mixup one of both a batch")
    add("--device", type=device, help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    add("--seed", type=seed, help="of weights, order and augmentation (default: {default})")
    add("--max-seconds", type=number(above=0), help="of training, then it stops; with --stages, at an epoch's end")
    add(
        "--patience",
        type=whole(1),
        metavar="EPOCHS",
        help="stop after so many without a better validation accuracy, see --val-split",
    )
    add("--nonfinite", choices=NONFINITE, help="what a loss that is not finite does (default: {default})")
    add("--config", type=Path, metavar="FILE", help="options as a JSON object, or a run's settings.json")
    add("--quiet", action="store_true", help="no progress bar, no line per epoch")


def add_run(parser):
    """Adds what a training that leaves a run's folder has."""
    add_training(parser)
    add = _adder(parser, DEFAULTS)
    add("--preset", choices=PRESETS, help="the paper's settings for these data; what else is given stands above them")
    add("--name", help="of the run's folder (default: made of the settings and the time)")
    add("--runs", type=Path, help="where runs' folders go (default: {default})")
    add("--checkpoint-minutes", type=number(0), help="between checkpoints within an epoch (default: {default:g})")
    stages = "layer parallel: so many of torchrun's processes have a model together, and a part of its modules each "
    stages += "(default: each has all of it, data parallel)"
    add("--stages", type=whole(1), metavar="N", help=stages)
    add("--tensorboard", action="store_true", help="also write events for TensorBoard, in the run's folder")


def add_cut(parser, *, depth=_DEPTH, preset=None):
    """Adds what is trained, how it is cut, and what a step does with gradients, which its memory depends on; returns
    what these options are where they are not typed."""
    defaults = defaults_of(preset)
    add = _adder(parser, defaults)
    add(
        "--model",
        help="resnet20 ... resnet110, a classifier of torchvision, or timm:NAME; see `auglocal models` (default: "
        "{default})",
    )
    add("--rule", choices=RULES, help="learning rule; bp: plain backpropagation (default: {default})")
    add(
        "--depth",
        type=depth,
        help="layers of an auxiliary net and its classifier; auto: what --budget allows (default: {default})",
    )
    add(
        "--form",
        choices=FORMS,
        help="cifar: aux nets less deep toward the output, the last DEPTH units one module; imagenet: one module "
        "per unit, aux nets of one depth (default: cifar for resnet20 ... resnet110, else imagenet)",
    )
    add(
        "--auxiliary",
        metavar="NETS",
        help="what aux nets are like: paper, light (each at most a tenth of backpropagation's arithmetic), a "
        "description such as 'pooled width=0.5 separable', or auto: paper or light as --budget allows "
        "(default: {default})",
    )
    add("--modules", type=whole(1), metavar="K", help="cut into K local modules (default: as the rule says)")
    add(
        "--units",
        nargs="+",
        metavar="NAME",
        help="modules that units begin with, by their paths in the model (default: its own blocks and layers)",
    )
    add(
        "--freeze",
        nargs="+",
        metavar="NAME",
        help="do not train these parts of the model, layer1 or layer1.0.conv1 for instance; of those in front of all "
        "others nothing is kept",
    )
    add("--freeze-norms", action="store_true", help="with --freeze: their BatchNorms keep their statistics too")
    add("--precision", choices=PRECISIONS, help="of the features (default: {default})")
    again = "run convolutions again in the backward instead of keeping theirs, of all units or of these; auto: of what "
    again += "units --budget asks for"
    add("--recompute", nargs="*", action=_Recompute, metavar="auto|NAME", help=again)
    add("--sync-bn", action="store_true", help="BatchNorms go by the images of all processes together")
    add("--budget", type=size, metavar="SIZE", help="bytes a step may take, such as 6GB: cut where it fits at the "
        "least work")  # fmt: skip
    add(
        "--prefer",
        choices=PREFER,
        help="what is least under --budget; time: see `auglocal calibrate` (default: {default})",
    )
    add(
        "--accumulate",
        "--grad-accum-steps",
        type=whole(1),
        metavar="N",
        help="batches whose gradients are averaged before a step of the optimizers (default: {default})",
    )
    add("--clip-grad-norm", type=number(above=0), metavar="NORM", help="bound the norm of gradients, see --clip")
    add("--clip-grad-value", type=number(above=0), metavar="VALUE", help="bound each of their values, before the norm")
    add(
        "--clip",
        choices=CLIPS,
        help="whose norm: each local module's, or global, of all together, with --accumulate above 1 (default: "
        "{default})",
    )
    add("--model-ema", action="store_true", help="also keep an exponential moving average of the weights")
    add("--model-ema-decay", type=number(0, below=1), help="of that average, in every step (default: {default})")
    return {name: defaults[name] for name in (*_CUT, *_STEPPING)}


def stepping_of(options):
    """What a step does with gradients, as arguments of `auglocal_ext.train` and `auglocal_ext.plan`."""
    return {
        "accumulate": options.accumulate,
        "clip_norm": options.clip_grad_norm,
        "clip_value": options.clip_grad_value,
        "clip": options.clip,
        "ema": options.model_ema_decay if options.model_ema else None,
    }


class _Recompute(argparse.Action):
    """True without a value, "auto", or names."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0] if values == ["auto"] else values or True)


def _adder(parser, defaults):
    def add(*flags, help, **kind):
        default = defaults.get(flags[0].removeprefix("--").replace("-", "_"))
        parser.add_argument(*flags, default=argparse.SUPPRESS, help=help.format(default=default), **kind)

    return add


def settled(given, add_options, preset=None):
    """Every option's value.

    Args:
        given: name -> value of those that were typed.
        add_options: parser -> None, which adds those of the program.
        preset: of a program that has no --preset.

    Returns:
        A Namespace of every option of `auglocal train`, and of what else is in given.

    Raises:
        ValueError: options that do not go together, or a --config that is none.
    """
    config = read_config(given["config"], add_options) if "config" in given else {}
    preset = given.get("preset") or config.get("preset") or preset
    options = defaults_of(preset) | config | given | {"preset": preset}
    options.pop("config", None)
    options = argparse.Namespace(**options)
    if options.data is None:
        raise ValueError(f"--data must be given with --preset {preset}, for instance --data imagefolder:ROOT")
    _check_together(options)
    options.device = options.device or default_device()
    if options.lr is None:
        options.lr = default_learning_rate(options)
    return options


def default_learning_rate(options):
    """In proportion to the images of a step with SGD, torch's default of another optimizer."""
    if options.optimizer == "sgd":
        from .parts import part_of

        images = options.batch_size * options.accumulate * part_of(options)[1]
        return LEARNING_RATES[options.preset] * images / 128
    from inspect import signature

    from ..optim import OPTIMIZERS

    return float(signature(OPTIMIZERS[options.optimizer]).parameters["lr"].default)


def _check_together(options):
    if options.momentum is not None and options.optimizer not in WITH_MOMENTUM:
        raise ValueError(
            f"--momentum goes with --optimizer {' or '.join(WITH_MOMENTUM)}, given --optimizer {options.optimizer}: "
            f"leave it out"
        )
    if options.schedule == "paper" and options.warmup is not None:
        raise ValueError(
            f"--warmup does not go with --schedule paper, which has its own, given {options.warmup:g}: leave it out, "
            f"or choose another --schedule"
        )
    if options.model_ema_decay != DEFAULTS["model_ema_decay"] and not options.model_ema:
        raise ValueError(
            f"--model-ema-decay goes with --model-ema, given {options.model_ema_decay:g} alone: give both, or neither"
        )
    if options.schedule == "paper" and options.lr == 0:
        raise ValueError("--lr must be above 0 with --schedule paper, given 0: choose another --schedule")
    if options.stages is not None and options.budget is not None:
        raise ValueError("--budget does not go with --stages yet: leave one of them out")
    if options.warmup is not None and options.warmup > options.epochs:
        raise ValueError(f"--warmup must be at most --epochs, {options.epochs}, given {options.warmup:g}")


def told(options):
    """The settings in a few lines: the main ones, and what else is not as without options."""
    local = options.rule == "auglocal"
    cut = f", depth {options.depth}" if local else ""
    searched = local and options.budget is not None and options.modules is None
    rule = "auglocal, bp or checkpoint, as the search finds" if searched else options.rule
    cut += f", {options.modules} local modules" if options.modules else ""
    from .parts import part_of

    _, parts = part_of(options)
    images, who = parts * options.batch_size * options.accumulate, "ranks" if options.stages is None else "pipelines"
    together = "" if parts == 1 else f" by each of {parts} {who}, {images} images in a step of the optimizer"
    lines = [
        f"{options.model} on {options.data}, rule {rule}{cut}, {options.precision} on {options.device}, seed "
        f"{options.seed}",
        f"{plural(options.epochs, 'epoch')} in batches of {options.batch_size}{together}, {options.optimizer} with lr "
        f"{options.lr:g}, schedule {options.schedule}",
    ]
    main = {"model", "data", "rule", "depth", "modules", "precision", "device", "seed", "epochs", "batch_size"}
    main |= {"optimizer", "lr", "schedule", "quiet", "name", "runs"}
    values = vars(options)
    other = [name for name in DEFAULTS if name not in main and values[name] != DEFAULTS[name]]
    if other:
        lines.append(", ".join(f"{name.replace('_', ' ')} {_shown(values[name])}" for name in other))
    return "\n".join(lines)


def _shown(value):
    if isinstance(value, list):
        return " ".join(value)
    return "on" if value is True else f"{value:g}" if isinstance(value, float) else value
