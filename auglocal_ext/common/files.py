"""Files that are there whole or not at all: whatever ends a write, the old content or the new one is what is left."""

import errno
import fcntl
import glob
import json
import os
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["append_line", "check_writable", "save_model", "write_json", "write_text", "write_whole"]


def write_whole(path, write):
    """Writes a file beside, then renames it: at every moment the old file or the new one is there, whole.

    Args:
        path: the file. A link stays one; what is no plain file, a pipe for instance, is written as it is.
        write: called with the file, opened for bytes; it uses nothing but its `write`.

    Raises:
        OSError: it cannot be written, and the old file is as it was; names the path and what to do.
    """
    path = Path(os.path.realpath(path))
    in_place = path.exists() and not path.is_file()
    beside, file = path if in_place else _beside(path), None
    try:
        if not in_place:
            _remove_leftovers(path)
        with beside.open("wb") as raw:
            file = _Watched(raw)
            write(file)
            raw.flush()
            if not in_place:
                os.fsync(raw.fileno())
        if not in_place:
            if path.exists():
                beside.chmod(path.stat().st_mode & 0o777)
            beside.replace(path)
    except BaseException as error:
        if not in_place:
            with suppress(OSError):
                beside.unlink()
        # torch.save makes a RuntimeError of a full disk.
        failure = error if isinstance(error, OSError) else file and file.failure
        if failure is None:
            raise
        raise _named(path, failure) from error


def write_text(path, text):
    """`write_whole` of a text."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path, value):
    """`write_whole` of plain values as JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def save_model(path, model):
    """`write_whole` of a model's state_dict."""
    write_whole(path, lambda file: torch.save(model.state_dict(), file))


def append_line(path, line, is_whole):
    """Adds a line to a text file, which is made where there is none.

    What a kill left of an earlier line, without its end, goes first: else it would swallow this one.

    Args:
        line: str, without its end.
        is_whole: bytes -> whether a last line that has no end is a whole one all the same.

    Raises:
        OSError: it cannot be written, and the file is as it was; names the path and what to do.
    """
    path, data = Path(path), line.encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                file.write(data)
            return
        with path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # a line that another program is just writing is no torn one
            file.seek(0)
            before = file.read()
            size = before.rfind(b"\n") + 1
            if before[size:] and is_whole(before[size:]):
                data = b"\n" + data
                size = len(before)
            file.truncate(size)
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(size)
                raise
    except OSError as error:
        raise _named(path, error) from error


def check_writable(path, option, make_folder=True):
    """Raises OSError where a file cannot be written: to be known before the work, not after it. Leaves no file.

    Args:
        option: what the user gave the path by.
        make_folder: makes the folder that it lies in; else one that is not there is an error.
    """
    path = Path(path)
    real = Path(os.path.realpath(path))
    if real.is_dir():
        raise OSError(f"{path} cannot be written: Is a directory: {real}; choose another {option}")
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        if real.exists():
            with real.open("ab"):
                pass
        if real.is_file() or not real.exists():
            with _beside(real).open("wb"):
                pass
            _beside(real).unlink()
    except OSError as error:
        at = real.parent if error.filename == str(_beside(real)) else error.filename
        message = f"{path} cannot be written: {error.strerror}: {at}; choose another {option}"
        raise OSError(message) from None


def _beside(path):
    """Hidden, and of this process: two that write one file do not meet."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _remove_leftovers(path):
    """What processes that were killed in the middle of writing it have left beside a file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        process = left.name.split(".")[-2]
        with suppress(OSError):
            if process.isdecimal() and not _is_alive(int(process)):
                left.unlink()


def _is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


class _Watched:
    """A file that remembers why a write to it failed."""

    def __init__(self, file):
        self.file, self.failure = file, None

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self):
        self.file.flush()


def _named(path, error):
    remedy = "choose another place for it"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "free some space there, or choose another place for it"
    made = OSError(f"{path} cannot be written: {error.strerror or error}; {remedy}; an older file there is untouched")
    made.errno = error.errno
    return made
