"""Several ranks at work: processes that share a store in a file, on gloo, and what each of them came to."""

import pickle
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from processes import begun

SECONDS = 5  # that a rank waits for another


def together(work, folder, *arguments, size=2, seconds=SECONDS, limit=60, port=None):
    """Runs work(*arguments) on `size` ranks; returns what each returned, or the exception that it raised; None of one
    that was killed.

    limit: seconds, after which all are ended and the test fails.
    port: of a store that rank 0 holds, instead of one in a file.
    """
    folder.mkdir(exist_ok=True)
    processes = [begun(_rank, work, folder, rank, size, seconds, port, arguments) for rank in range(size)]
    deadline = time.monotonic() + limit
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0.1))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not late, f"ranks {late} were not done after {limit} s"
    files = [folder / f"{rank}.pickle" for rank in range(size)]
    return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def _rank(work, folder, rank, size, seconds, port, arguments):
    if port is None:
        store = dist.FileStore(str(folder / "store"), size)
    else:
        store = dist.TCPStore("localhost", port, size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
    torch.manual_seed(rank)
    try:
        found = work(*arguments)
    except BaseException as error:
        found = Raised(type(error).__name__, str(error))
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def free_ports(count=1):
    """Of this machine."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    found = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return found


class Raised:
    """An exception of a rank: its class's name and its message."""

    def __init__(self, kind, message):
        self.kind, self.message = kind, message

    def __repr__(self):
        return f"{self.kind}: {self.message}"
