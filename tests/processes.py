"""Processes of their own, for what ends or limits a whole process.

Each is forked from one that has imported the package, and what torch imports late, and done nothing else: to import
torch takes seconds, and the process of the tests has threads, of which a fork would have none.
"""

import multiprocessing

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["auglocal_ext.stages.train", "auglocal_ext.data", "auglocal_ext.models", "torch._dynamo", "pytest"]
)


def begun(work, *arguments):
    """A process, already begun, in which a function at the top of its file runs; see `multiprocessing.Process`."""
    process = FORKS.Process(target=_alone, args=(work, *arguments))
    process.start()
    return process


def _alone(work, *arguments):
    torch.set_num_threads(1)
    work(*arguments)
