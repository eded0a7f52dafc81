"""Work by several new processes of torch.distributed on this machine: gloo, one CPU thread each."""

import json
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

__all__ = ["Failed", "by_ranks"]


class Failed(str):
    """What a rank raised, in one line."""


def by_ranks(work, ranks, *arguments, seconds=300):
    """Runs work(*arguments) on every rank of a process group.

    Args:
        work: a function of a module, which returns what JSON knows.
        seconds: that a rank waits for another.

    Returns:
        (found, lag): of each rank what it returned, a Failed, or None if it was killed; the seconds between the ends of
        the first and the last process.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        given = (ranks, folder, work, arguments, seconds)
        processes = [context.Process(target=_rank, args=(rank, *given)) for rank in range(ranks)]
        for process in processes:
            process.start()
        ended = {}
        while len(ended) < ranks:
            for rank, process in enumerate(processes):
                if rank not in ended and not process.is_alive():
                    ended[rank] = time.monotonic()
            time.sleep(0.05)
        return [_read(Path(folder, f"{rank}.json")) for rank in range(ranks)], max(ended.values()) - min(ended.values())


def _rank(rank, ranks, folder, work, arguments, seconds):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds))
    try:
        found = {"returned": work(*arguments)}
    except Exception as error:
        found = {"raised": f"{type(error).__name__}: {error}".splitlines()[0]}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _read(file):
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    return Failed(found["raised"]) if "raised" in found else found["returned"]
