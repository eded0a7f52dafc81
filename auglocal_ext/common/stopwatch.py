"""The time that code takes, lap by lap."""

import statistics
import time

import torch

__all__ = ["Stopwatch", "keep_gpu_busy", "median_seconds"]

FASTEST_CLOCK = 2e9  # cycles a second, that no GPU of today exceeds by much
WARM = 0.1  # seconds of work, for the clock of a GPU that was idle


class Stopwatch:
    """Nanoseconds between laps, the first from when it is made.

    On a GPU of its own time, so that launching ahead of it costs nothing. On the CPU with one thread of the processor
    time of this process, which is what an idle machine takes; with several of the time that passes.

    lead: seconds for which a GPU is kept busy before the first lap begins: as long as the host takes to queue all laps,
    or a GPU that is faster would wait for it.
    """

    def __init__(self, device, lead=0.0):
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._now = time.process_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
        self._marks = []
        if self._stream is not None:
            keep_gpu_busy(lead, device)
        self.lap()

    def lap(self):
        if self._stream is not None:
            self._marks.append(self._stream.record_event(torch.cuda.Event(enable_timing=True)))
        else:
            self._marks.append(self._now())

    def laps(self):
        """The nanoseconds of each lap so far. Waits for the device."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._stream is not None:
            self._marks[-1].synchronize()
            return [round(1e6 * start.elapsed_time(end)) for start, end in pairs]
        return [end - start for start, end in pairs]


def keep_gpu_busy(seconds, device=None):
    """Queues a kernel that does nothing for so long; device: None for the current one."""
    with torch.cuda.device(device):
        torch.cuda._sleep(int(seconds * FASTEST_CLOCK))


def median_seconds(device, run, repeats):
    """Of `run`, which is called before to warm up, then `repeats` times."""
    run()
    started = time.perf_counter()
    while device.type == "cuda" and time.perf_counter() - started < WARM:
        run()
        torch.cuda.synchronize(device)
    clock = Stopwatch(device)
    for _ in range(repeats):
        run()
        clock.lap()
    return statistics.median(clock.laps()) / 1e9
