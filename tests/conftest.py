"""Shared fixtures: small networks, batches, and the parity fixtures where they lie beside the checkout."""

import gc
import os
import threading
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import comparisons
import emulation
import pytest
import torch
from covering import covering

from auglocal_ext import models

if "PYTEST_XDIST_WORKER" in os.environ:  # several at a time, a core each
    torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MEASURED = 2  # cases of a test
LEFT_OUT = pytest.StashKey[set]()


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run every case of the tables, and more draws")


def pytest_configure(config):
    config.stash[LEFT_OUT] = set()
    gc.disable()  # until all tests are collected, which makes objects that stay and nothing else


@pytest.fixture(scope="session")
def long(request):
    """Whether there is time for hundreds of draws."""
    return request.config.getoption("--long")


def test_of(item):
    return item.nodeid.partition("[")[0]


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        leave_out(config, items)
    choose_measured(items)


def leave_out(config, items):
    """Of the tables of cases that are marked so, runs a few (covering.py), on each device."""
    tables = defaultdict(list)
    for item in items:
        if marker := item.get_closest_marker("covering"):
            device = [item.get_closest_marker(name) is None for name in ("cuda", "emulated")]
            tables[test_of(item), *marker.args, *device].append(item)
    taken = set()
    for (_, together, *_), table in tables.items():
        # The names of a case's values, one of each parametrize.
        cases = [dict(enumerate(item.callspec._idlist)) for item in table]
        taken |= {table[number] for number in covering(cases, together)}
    left_out = set().union(*tables.values()) - taken
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    config.stash[LEFT_OUT] |= {item.nodeid for item in left_out}
    items[:] = [item for item in items if item not in left_out]


def choose_measured(items):
    """Coverage is measured in the first cases of each test. It nearly doubles what a case takes, and later cases run
    the same lines on other values; where they do not, the figure is too low, never too high."""
    cases = Counter()
    for item in items:
        cases[test_of(item)] += item.get_closest_marker("cuda") is None  # of which few machines run any
        if cases[test_of(item)] > MEASURED:
            item.add_marker("no_cover")


def pytest_collection_finish(session):
    gc.enable()
    start_to_build_the_emulation(session)


def start_to_build_the_emulation(session):
    """The emulation is built while other tests run; of several processes, one builds it and the others wait."""
    wanted = any("emulator" in item.fixturenames or item.get_closest_marker("emulated") for item in session.items)
    if wanted and not session.config.option.collectonly and "AUGLOCAL_EMULATION" not in os.environ:
        threading.Thread(target=lambda: emulation.compiler() and emulation.build(), daemon=True).start()


@pytest.fixture(scope="module", autouse=True)
def _settled():
    """What is there before a module's first test stays. Each full collection of garbage, of which a training makes
    several, would walk over thousands of tests and all that torch imports late otherwise."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist's, whose first process collects nothing
        session.config.workeroutput["left_out"] = sorted(session.config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT_OUT].update(getattr(node, "workeroutput", {}).get("left_out", ()))


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[LEFT_OUT]:
        terminalreporter.write_line(
            f"{len(config.stash[LEFT_OUT]):,} cases of tables were left out: --long runs them too"
        )


@pytest.fixture
def shared_data():
    """The folder of real images and parity fixtures beside the checkout; skips without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data folder {SHARED}, which is not part of the project")
    return SHARED


@pytest.fixture
def tiny_model():
    """A CIFAR ResNet of 4 units (the stem and one block per stage)."""
    torch.manual_seed(0)
    return models.CifarResNet(1, num_classes=10)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8) % 10


@pytest.fixture
def nothing_compared(monkeypatch):
    """Nobody finds out what a step costs otherwise, which takes longer than the plan itself or a short training; the
    tests of comparisons and of the command line do."""
    comparisons.leave_out(monkeypatch.setattr)


@pytest.fixture
def torchvision():
    return pytest.importorskip(
        "torchvision", reason="torchvision does not import beside this torch", exc_type=Exception
    )


@pytest.fixture(scope="session")
def emulator():
    """The CUDA kernels on the CPU, built where they are not yet."""
    if emulation.compiler() is None:
        pytest.skip("the emulation of CUDA needs GCC")
    return emulation.Emulation(os.environ.get("AUGLOCAL_EMULATION") or emulation.build())


@pytest.fixture(autouse=True)
def _emulated(request):
    """Tests marked so run on the emulation: each in an order of its own, on one small device or the other."""
    if request.node.get_closest_marker("emulated") is None:
        yield
        return
    seed = zlib.crc32(request.node.nodeid.encode())
    small = ("a slice of sm_80", "a slice of sm_90")[seed % 2]
    large = request.node.get_closest_marker("many_blocks")
    with request.getfixturevalue("emulator").running(seed, "a large slice of sm_90" if large else small):
        yield
