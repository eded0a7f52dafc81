"""Runs a schedule without a machine: every lane does its tasks in order, each as soon as what it waits for is done."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

__all__ = ["Event", "Task", "run"]


# Names a task: what is done, by which rank, for which batch, and a number that tells apart what is alike in the rest. A
# plain tuple, as there may be millions.
Key = tuple[str, int, int, int]


class Task(NamedTuple):
    """What is to be done.

    Attributes:
        key: its name, see `Key`.
        seconds: how long it takes.
        after: the tasks that it waits for, besides the one before it in its lane.
    """

    key: Key
    seconds: float
    after: Sequence[Key] = ()


class Event(NamedTuple):
    """What a rank did for a batch; a real trace is a list of them too.

    Attributes:
        rank, batch: from 0; of a pipeline batch is a micro-batch.
        what: "forward", "backward", "step", "send" and the like.
        start, end: in seconds from the beginning.
    """

    rank: int
    batch: int
    what: str
    start: float
    end: float


def run(lanes: Mapping[object, Iterable[Task]]) -> list[Event]:
    """Runs the tasks of all lanes.

    Args:
        lanes: of each the tasks in the order in which it does them. A rank's processor is a lane, and each direction
            in which it sends.

    Returns:
        An Event a task, those of a lane in order.

    Raises:
        ValueError: tasks wait for each other, or for one that there is not.
    """
    queues = {lane: iter(tasks) for lane, tasks in lanes.items()}
    heads = {lane: next(queue, None) for lane, queue in queues.items()}
    free: dict[object, float] = dict.fromkeys(queues, 0.0)
    done: dict[Key, float] = {}
    waiting = defaultdict(list)  # task -> the lanes that wait for it
    events: dict[object, list[Event]] = {lane: [] for lane in queues}
    ready = list(queues)
    while ready:
        lane = ready.pop()
        while (task := heads[lane]) is not None:
            key, seconds, after = task
            start = free[lane]
            for other in after:
                if other not in done:
                    waiting[other].append(lane)
                    break
                start = max(start, done[other])
            else:
                free[lane] = done[key] = end = start + seconds
                what, rank, batch, _ = key
                events[lane].append(Event(rank, batch, what, start, end))
                ready += waiting.pop(key, ())
                heads[lane] = next(queues[lane], None)
                continue
            break
    if waiting:
        stuck = next(iter(waiting))
        raise ValueError(f"the schedule never comes to {stuck}, which other tasks wait for")
    return [event for of_lane in events.values() for event in of_lane]
