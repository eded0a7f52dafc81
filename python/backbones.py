"""What each of torchvision's families costs when it is cut: units, arithmetic, memory, and what backpropagation keeps.

    python python/backbones.py [NAME ...] [--json FILE] [--markdown FILE]

Counted on meta tensors, fp32, batches of 64 images of 224 x 224 (Inception: 299): any machine, some minutes for all.
L: units. K: local modules where nobody says how many, with light nets. MACs/BP: of two local modules with the paper's
nets (d = 4) and with light ones. peak/BP: of the whole step, two modules with light nets against backpropagation on
this engine. kept/eager: what the forward of backpropagation leaves for its backward on this engine, against what
autograd saves of the same model. weights/eager: the outputs of layers with weights alone, which no schedule without
running layers again can do without, but where a ReLU and a pooling by maximum follow. islands: the share of what is
kept that autograd holds, for what no instruction describes.
"""

import sys
import time
import warnings
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import auglocal_ext
from auglocal_ext.backbone import as_backbone
from auglocal_ext.cli import errors
from auglocal_ext.cli.checks import on_meta
from auglocal_ext.cli.options import Parser, whole
from auglocal_ext.common.files import check_writable, write_json, write_text
from auglocal_ext.engine.as_real import RealLayouts
from auglocal_ext.engine.meta_attention import MetaAttention

sys.path.insert(0, str(Path(__file__).parent))
from paper_tables import markdown
from records import machine

SMALLEST = [
    *("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg11_bn", "alexnet", "squeezenet1_1"),
    *("googlenet", "inception_v3", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"),
    *("mnasnet0_5", "shufflenet_v2_x0_5", "regnet_x_400mf", "regnet_y_400mf", "efficientnet_b0", "efficientnet_v2_s"),
    *("convnext_tiny", "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t"),
]
SIDES = {"inception_v3": 299}


def build(name):
    """A builder's model without data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of initial weights
        return on_meta(name, 1000)


def eager_saves(model, images):
    """Bytes that autograd keeps between forward and backward of a model, besides the images and the weights."""
    known = {id(t.untyped_storage()) for t in (*model.parameters(), *model.buffers(), images)}
    storages = {}

    def pack(tensor):
        storages[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    labels = torch.zeros(len(images), dtype=torch.int64, device="meta")
    with RealLayouts(), MetaAttention(), torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(images)
        loss = F.cross_entropy(getattr(out, "logits", out), labels)
    del loss
    return sum(storage.nbytes() for key, storage in storages.items() if key not in known)


def figures(name, batch):
    """A row of the table."""
    model, side = build(name).train(), SIDES.get(name, 224)
    started = time.process_time()
    backbone = as_backbone(model)
    shape = batch, 3, side, side
    given = {"memory_format": torch.contiguous_format}
    bp, paper, light = (
        auglocal_ext.plan(model, shape, **options, **given)
        for options in ({"rule": "bp"}, {"modules": 2}, {"modules": 2, "auxiliary": "light"})
    )
    seconds = time.process_time() - started
    usual = auglocal_ext.plan(model, shape, auxiliary="light", **given)
    own = _without_own_heads(model, backbone)
    saved = eager_saves(own, torch.empty(shape, device="meta"))
    weights = sum(unit.kept for unit in backbone.units) * side**2 * batch * 4
    (whole_network,) = bp.modules
    return {
        "model": name,
        "batch": batch,
        "side": side,
        "units": len(backbone.units),
        "default_modules": len(usual.modules),
        "macs_paper": paper.macs / bp.bp_macs,
        "macs_light": light.macs / bp.bp_macs,
        "peak_light": light.peak_bytes / bp.peak_bytes,
        "bp_peak_bytes": bp.peak_bytes,
        "kept": whole_network.kept_bytes / saved,
        "weights": weights / saved,
        "islands": whole_network.timeline.kept_by_autograd / whole_network.kept_bytes,
        "planning_seconds": seconds,
    }


def _without_own_heads(model, backbone):
    """For a fair count: without the auxiliary heads of the model's own, which are not trained here."""
    if backbone.left_out:
        for name in ("aux1", "aux2", "AuxLogits"):
            if hasattr(model, name):
                setattr(model, name, None)
        model.aux_logits = False
    return model


def table(rows):
    header = ["model", "L", "K", "MACs/BP, paper", "light", "peak/BP, light", "kept/eager", "weights/eager", "islands"]
    header += ["planning, CPU s"]
    lines = [header]
    for row in rows:
        numbers = [f"{row[key]:.2f}" for key in ("macs_paper", "macs_light", "peak_light", "kept", "weights")]
        counts = str(row["units"]), str(row["default_modules"])
        lines.append([row["model"], *counts, *numbers, f"{row['islands']:.1%}", f"{row['planning_seconds']:.1f}"])
    return lines


def parse(arguments=None):
    parser = Parser("backbones", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "names",
        nargs="*",
        default=SMALLEST,
        metavar="NAME",
        help="torchvision's builders; default: one or two a family",
    )
    add("--batch-size", type=whole(2), default=64)
    add("--json", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def run(options):
    for path in (options.json, options.markdown):
        if path:
            check_writable(path, path)
    rows = []
    for name in options.names:
        rows.append(figures(name, options.batch_size))
        print(*table(rows)[-1], sep="  ", flush=True)
        if options.json:
            write_json(options.json, {"machine": machine("cpu"), "rows": rows})
    print(text := markdown(table(rows)))
    if options.markdown:
        write_text(options.markdown, text + "\n")
    return 0


def main(arguments=None):
    """Runs the program; returns the exit status."""
    options = parse(arguments)
    return errors.run("backbones", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
