"""`auglocal export`"""

import contextlib
import io
import warnings
from importlib import import_module

import torch

from ..common.files import check_writable, write_whole
from ..common.messages import first_line
from .evaluate import trained
from .runs import read_settings

__all__ = ["export_command"]


def export_command(options):
    """Writes a run's model as ONNX, with a batch of any size."""
    settings, out = read_settings(options.run_folder), options.out or options.run_folder / "model.onnx"
    check_writable(out, "--out")
    for package in ("onnx", "onnxscript"):
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(
                f"auglocal export needs the packages onnx and onnxscript, {package} does not import here "
                f"({first_line(error)}): install them with pip install onnx onnxscript"
            ) from None
    model, (height, width) = trained(options.run_folder, settings), settings["image_size"]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # torch tells its stages there
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, height, width),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    write_whole(out, lambda file: file.write(program.model_proto.SerializeToString()))
    print(
        f"saved {out}: images (batch, 3, {height}, {width}), normalised by mean {_rounded(settings['mean'])} and std "
        f"{_rounded(settings['std'])}, to logits (batch, {settings['num_classes']})"
    )
    return 0


def _rounded(values):
    return [round(value, 4) for value in values]
