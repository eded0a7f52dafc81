"""Files are whole at every moment: a kill in the middle of a write, a full disk, links, pipes."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import processes
import pytest
import torch

from auglocal_ext import models, plan
from auglocal_ext.common.files import append_line, check_writable, save_model, write_json, write_text, write_whole

PYTHON = Path(__file__).resolve().parents[2] / "python"

# Saves go on as they are, but the second one of a model kills the process when half of it is written.
KILLED = """
    import io, os, signal, sys
    import torch

    real, saves = torch.save, []

    def save(value, file):
        saves.append(value)
        if len(saves) < 2:
            return real(value, file)
        whole = io.BytesIO()
        real(value, whole)
        half = whole.getvalue()[: len(whole.getvalue()) // 2]
        if not hasattr(file, "write"):
            file = open(file, "wb")
        file.write(half)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save
"""


def killed(program, folder):
    """Runs a program that does not survive its second save."""
    package = str(Path(models.__file__).resolve().parents[1])
    command = [sys.executable, "-c", textwrap.dedent(KILLED) + textwrap.dedent(program)]
    done = subprocess.run(command, cwd=folder, capture_output=True, env={**os.environ, "PYTHONPATH": package})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_a_kill_in_the_second_save_leaves_the_first_ones_model(tmp_path):
    killed(
        """
    from auglocal_ext.cli import main
    main("train --data fake:40 --epochs 3 --rule bp --quiet --device cpu --name x".split())
    """,
        tmp_path,
    )
    folder = tmp_path / "runs" / "x"
    models.resnet20().load_state_dict(torch.load(folder / "model.pt"))
    assert len(json.loads((folder / "history.json").read_text())) >= 1
    assert json.loads((folder / "settings.json").read_text())["num_classes"] == 10


def test_a_kill_in_the_second_save_of_a_recipe(tmp_path):
    killed(
        f"""
    sys.path.insert(0, {str(PYTHON)!r})
    from train_cifar import main
    main("--data fake:40 --epochs 3 --model resnet20 --rule bp --device cpu --quiet --save of/m.pt".split())
    """,
        tmp_path,
    )
    models.resnet20().load_state_dict(torch.load(tmp_path / "of" / "m.pt"))
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("write", [write_text, write_json, lambda path, value: append_line(path, value, bool)])
def test_a_kill_while_text_is_written(tmp_path, write):
    path = tmp_path / "x"
    write(path, "first")
    before, child = path.read_bytes(), os.fork()
    if not child:
        os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)  # all is written, nothing is told so
        write(path, "second")
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.read_bytes().startswith(before)
    write(path, "third")
    assert b"third" in path.read_bytes()


def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def torch_saves_of_a_full_disk(path):
    """torch.save's own RuntimeError, made of the write's OSError."""

    class Full:
        def write(self, data):
            full()

    def write(file):
        file.file = Full()
        torch.save(models.resnet20().state_dict(), file)

    write_whole(path, write)


def a_picture(path):
    plan(models.CifarResNet(1), (2, 3, 8, 8), rule="bp").save_picture(path)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "new"),
        lambda path: write_json(path, {"new": 1}),
        lambda path: save_model(path, models.resnet20()),
        lambda path: append_line(path, "new", bool),
        torch_saves_of_a_full_disk,
        a_picture,
    ],
)
def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch, write):
    path = tmp_path / "x.png"
    path.write_text("old\n")
    monkeypatch.setattr(os, "fsync", full)
    message = rf"^{path} cannot be written: No space left on device; free some space there, or choose another place"
    with pytest.raises(OSError, match=message) as given:
        write(path)
    assert given.value.errno == errno.ENOSPC
    assert path.read_text() == "old\n" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "write", [lambda path: write_text(path, "new"), lambda path: save_model(path, models.resnet20())]
)
def test_a_device_that_is_full(write):
    with pytest.raises(OSError, match="/dev/full cannot be written: No space left on device"):
        write("/dev/full")
    assert Path("/dev/full").is_char_device()


def save_two_models(path, told):
    save_model(path, models.resnet20())
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    try:
        save_model(path, models.resnet32())
    except OSError as error:
        told.put(str(error))


def test_a_file_that_grows_too_large(tmp_path):
    """A real limit of the system's, met in the middle of torch.save, in a process of its own."""
    path, told = tmp_path / "model.pt", processes.FORKS.SimpleQueue()
    process = processes.begun(save_two_models, path, told)
    process.join()
    assert process.exitcode == 0 and not told.empty()
    assert told.get().startswith(f"{path} cannot be written: File too large; free some space")
    models.resnet20().load_state_dict(torch.load(path))
    assert list(tmp_path.iterdir()) == [path]


def test_errors_of_the_writers_own_stay_what_they_are_and_leave_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    for error in (KeyError("mine"), KeyboardInterrupt()):

        def write(file, error=error):
            file.write(b"half")
            raise error

        with pytest.raises(type(error)):
            write_whole(path, write)
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_links_modes_and_pipes_stay(tmp_path):
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and target.stat().st_mode & 0o777 == 0o640
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "new")
    append_line(pipe, " line", bool)
    check_writable(pipe, "--save")
    assert os.read(reader, 20) == b"new line\n" and pipe.is_fifo()
    os.close(reader)


def test_what_cannot_be_written_is_known_beforehand(tmp_path):
    check_writable(tmp_path / "of" / "x", "--save")
    assert list((tmp_path / "of").iterdir()) == []
    (tmp_path / "x").write_text("old")
    check_writable(tmp_path / "x", "--save")
    assert (tmp_path / "x").read_text() == "old"
    for path, make_folder in ((tmp_path, True), (tmp_path / "no" / "x", False), (tmp_path / "x" / "y", True)):
        with pytest.raises(OSError, match=rf"^{path} cannot be written: .*; choose another --save$"):
            check_writable(path, "--save", make_folder)
    assert not (tmp_path / "no").exists()


def test_a_torn_last_line_makes_place_and_a_whole_one_gets_its_end(tmp_path):
    path = tmp_path / "x"
    for before, after in (
        ("", "new\n"),
        ("one\n", "one\nnew\n"),
        ("one\ntorn", "one\nnew\n"),
        ("torn", "new\n"),
        ("one\nwhole!", "one\nwhole!\nnew\n"),
    ):
        path.write_text(before)
        append_line(path, "new", lambda line: line.endswith(b"!"))
        assert path.read_text() == after


def test_half_a_line_that_did_not_fit_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_text("one\n")

    class Short:
        """A file of which a write takes half, as on a disk that fills up."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *given):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            return self.file.write(data[: len(data) // 2])

    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *given, **options: Short(real(self, *given, **options)))
    with pytest.raises(OSError, match="x cannot be written: No space left on device"):
        append_line(path, "new", bool)
    monkeypatch.undo()
    assert path.read_text() == "one\n"


def test_what_a_killed_process_left_beside_goes_with_the_next_write(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, alive = (tmp_path / f".x.json.{pid}.part" for pid in (ended.pid, os.getppid()))
    other = tmp_path / f".y.json.{ended.pid}.part"
    for path in (dead, alive, other):
        path.touch()
    write_json(tmp_path / "x.json", 1)
    assert not dead.exists() and alive.exists() and other.exists()
