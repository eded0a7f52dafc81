"""Options from a file: a JSON object of them, or the settings.json of a run."""

import json
from pathlib import Path

from .options import Parser
from .presets import DEFAULTS

__all__ = ["checked", "read_config"]

# What is no setting of a training: where a run lies, and how a file is named.
_OWN = ("name", "runs")
_SEVERAL = ("freeze", "recompute", "units")  # what takes a list of texts
_NO_OPTIONS = ("config", "help", "resume")


def read_config(path, add_options):
    """name -> value, each of the kind that its option has; what a file says null of is as without it.

    Args:
        path: of the file. Of a run's settings.json all but the run's own name and place.
        add_options: parser -> None, which adds the options of the program.

    Raises:
        ValueError: it cannot be read, or has what is no option. A value that its option does not take ends the program
            as one on the command line does.
    """
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}; expected a JSON object of options") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must be a JSON object of options, given a {type(values).__name__}")
    if isinstance(values.get("options"), dict):  # a run's; another program need not have all of its options
        values = {name: value for name, value in values["options"].items() if name not in _OWN}
        return checked(values, add_options, f"{path}: ", leave_out_others=True)
    return checked(values, add_options, f"{path}: ")


def checked(values, add_options, where, leave_out_others=False):
    """name -> value as the options of these names take them; where: begins the errors; leave_out_others: no error of a
    name that is no option."""
    parser, found = Parser("auglocal", where=where, add_help=False, allow_abbrev=False), {}
    add_options(parser)
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        known = DEFAULTS.get(name.replace("-", "_"))
        if value is None or value is False and known is False:
            flags, value = [], {name.replace("-", "_"): known}
        elif value is True:
            flags = [option]
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            flags = [f"{option}={value}"]
        elif name in _SEVERAL and isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            flags = [option, *value]
        else:
            raise ValueError(f"{where}{name} must be a number or a text, given {json.dumps(value)}")
        options, unknown = parser.parse_known_args(flags)
        if unknown or name in _NO_OPTIONS or (not flags and name.replace("-", "_") not in DEFAULTS):
            if leave_out_others:
                continue
            raise ValueError(f"{where}{name} is no option of a training: see `auglocal train --help`")
        found |= vars(options) if flags else value
    return found
