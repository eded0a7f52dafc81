"""Predicts trainings on ranks that are not there: throughput, waiting and memory of each way to share the work out."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from . import pipelines
from .balance import balanced, sums_of
from .events import Event, run
from .pieces import Costs, Link, total

__all__ = ["FORMS", "Prediction", "predicted"]

WAITS = ("send", "send back", "all-reduce")  # what a rank does beside its computing
MICRO_BATCHES = 4  # for each stage, where nobody says how many
PIPELINES = {"gpipe": pipelines.gpipe, "1f1b": pipelines.one_f_one_b, "zero-bubble": pipelines.zero_bubble}
# Local learning's, then backpropagation's.
FORMS = ("decoupled", "synchronous", "local data parallel", *PIPELINES, "bp data parallel")


@dataclass(frozen=True)
class Prediction:
    """A training by several ranks.

    Attributes:
        form: one of FORMS.
        spans: of each rank the range of its pieces, local modules or units; with data parallel every rank has all.
        images_per_second: in the steady state.
        bubble: the share of that time in which the ranks compute nothing.
        memory: bytes of each rank at the highest moment of a step.
        lag: the most batches that the first rank has begun and the last one has not, at a moment when that begins one.
        micro_batches: that a batch is cut into; 1 but for pipelines.
        events: from the beginning on; with data parallel of one rank, as all do the same at the same time.
    """

    form: str
    spans: tuple[range, ...]
    images_per_second: float
    bubble: float
    memory: tuple[int, ...]
    lag: int
    micro_batches: int
    events: list[Event] = field(repr=False)

    def beginning(self, batches: int) -> list[Event]:
        """Of the events those that begin until the last rank has finished so many batches."""
        end = max(event.end for event in self.events if event.batch < batches * self.micro_batches)
        return [event for event in self.events if event.start < end]


def predicted(
    costs: Costs,
    stages: int,
    form: str = "decoupled",
    *,
    link: Link = Link(),  # noqa: B008 - it cannot change
    max_lag: int = 2,
    micro_batches: int | None = None,
    spans: Sequence[range] | None = None,
) -> Prediction:
    """A training by so many ranks, in one of FORMS. Every form does the same steps, by batches of `costs.images`: data
    parallel gives each rank its share of a batch, pipelines cut it into micro-batches. Shares of a batch are taken to
    cost shares of its time, and messages of one direction to go one after another.

    Args:
        costs: of the network. On ranks that slow each other down, those of one of them; see `Costs.scaled`.
        stages: how many ranks.
        link: between any two of them.
        max_lag: see `StageTrainer`, of "decoupled".
        micro_batches: of pipelines; None: four for each stage, or as many as there are images.
        spans: of each rank the range of its pieces; None: those that are balanced by time.

    Raises:
        ValueError: no such form; fewer local modules, units or images than ranks.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, given {form!r}")
    if "data parallel" in form:
        return _data_parallel(costs, stages, form, link)
    pieces = costs.units if form in PIPELINES else costs.modules
    spans = balanced(len(pieces), stages, sums_of([p.seconds for p in pieces])) if spans is None else spans
    groups = [[pieces[index] for index in span] for span in spans]
    if form in PIPELINES:
        micro = min(MICRO_BATCHES * stages, costs.images) if micro_batches is None else micro_batches
        if not 1 <= micro <= costs.images:
            raise ValueError(f"{costs.images} images cannot be cut into {micro} micro-batches: give from 1 to as many")
        rounds = 2
        events = run(PIPELINES[form](groups, link, rounds, micro))
        memory, lag = _pipeline_memory(groups, events, micro, costs.batch), 0
    else:
        micro, rounds = 1, stages + 2 * max_lag + 4
        events = run(pipelines.layer_parallel(groups, link, rounds, max_lag, form == "synchronous"))
        buffers = 1 if form == "synchronous" else max_lag
        memory, lag = _layer_parallel_memory(groups, buffers), _lag(events, stages - 1)
    return _prediction(form, spans, costs.images, memory, lag, micro, events, rounds)


def _data_parallel(costs, ranks, form, link):
    if ranks > costs.images:
        raise ValueError(f"{costs.images} images cannot be shared out to {ranks} ranks: give a larger batch")
    of_bp = form == "bp data parallel"
    pieces = costs.units if of_bp else costs.modules
    make = pipelines.backprop_data_parallel if of_bp else pipelines.local_data_parallel
    events = run(make(pieces, link, 3, ranks))
    state = total(pieces, "state")
    if ranks == 1 and not of_bp:
        high = max(piece.peak for piece in pieces)
    elif of_bp:  # all gradients are there at the end; before that, what is kept
        high = total(pieces, "gradients") + (_backprop_activations(pieces) + costs.batch) / ranks
    else:  # the gradients of the module before are still on their way
        before = [0, *(piece.gradients for piece in pieces)]
        high = max(p.activations / ranks + p.gradients + b for p, b in zip(pieces, before, strict=False))
        high += costs.batch / ranks
    spans = (range(len(pieces)),) * ranks
    return _prediction(form, spans, costs.images, (round(state + high),) * ranks, 0, 1, events, 3)


def _prediction(form, spans, images, memory, lag, micro, events, rounds):
    """rounds: how many batches were simulated, of which the second half is the steady state."""
    ends, busy = defaultdict(float), 0.0
    for event in events:
        batch = event.batch // micro
        ends[batch] = max(ends[batch], event.end)
        busy += (event.end - event.start) * (event.what not in WAITS)
    begin = (rounds - 1) // 2
    period = (ends[rounds - 1] - ends[begin]) / (rounds - 1 - begin)
    ranks = len({event.rank for event in events})
    bubble = max(0.0, 1 - busy / rounds / ranks / period)
    return Prediction(form, tuple(spans), images / period, bubble, memory, lag, micro, events)


# ---- bytes --------------------------------------------------------------------------------------------------------


def _layer_parallel_memory(groups, buffers):
    """Of each rank: its modules' state, the step of the one that needs most, the buffers at its ends."""
    handed_on = [group[-1].output for group in groups]
    handed_on[-1] = 0
    ends = zip([0, *handed_on], handed_on, groups, strict=False)
    return tuple(total(g, "state") + max(p.peak for p in g) + buffers * (i + o) for i, o, g in ends)


def _pipeline_memory(groups, events, micro, batch):
    """Of each rank: its units' state and gradients, what they keep of the micro-batches that are under way, with their
    input, and what they need for a moment. The first one holds the whole batch."""
    memory, inputs = [], [0, *(group[-1].output for group in groups)]
    for group, given, count in zip(groups, inputs, _under_way(events, len(groups)), strict=False):
        micro_batches = _backprop_activations(group) + (count - 1) * total(group, "kept") + count * given
        memory.append(total(group, "state") + total(group, "gradients") + micro_batches / micro)
    memory[0] += batch
    return tuple(map(round, memory))


def _backprop_activations(units):
    """The bytes of one batch at the highest moment of backpropagation through units."""
    kept = highest = 0
    for unit in units:
        highest, kept = max(highest, kept + unit.activations), kept + unit.kept
    return highest


def _under_way(events, ranks):
    """Of each rank the most micro-batches at once that have begun and are not done."""
    last, begun = [{} for _ in range(ranks)], [[] for _ in range(ranks)]
    for event in events:
        if event.what == "forward":
            begun[event.rank].append(event.start)
        elif event.what in ("backward", "weight gradient"):
            ends = last[event.rank]
            ends[event.batch] = max(ends.get(event.batch, 0.0), event.end)
    return [_most(starts, ends.values()) for starts, ends in zip(begun, last, strict=True)]


def _most(starts, ends):
    changes = sorted([(end, -1) for end in ends] + [(start, 1) for start in starts])
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _lag(events, last):
    """See `Prediction`."""
    first_begins, last_begins = (_begins(events, rank) for rank in (0, last))
    moments = sorted([(start, 0) for start in first_begins] + [(start, 1) for start in last_begins])
    ahead = most = 0
    for _, of_last in moments:
        if of_last:
            ahead -= 1
            most = max(most, ahead)
        ahead += not of_last
    return most


def _begins(events, rank):
    starts = {}
    for event in events:
        if event.rank == rank and event.what == "forward":
            starts[event.batch] = min(starts.get(event.batch, event.start), event.start)
    return starts.values()
