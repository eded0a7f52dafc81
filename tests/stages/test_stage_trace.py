"""What two ranks did when."""

from collections import Counter

import pytest
import torch
from ranks import together

from auglocal_ext import models
from auglocal_ext.stages.trace import traced, tracing
from auglocal_ext.stages.trainer import StageTrainer

BATCHES = 3


def two():
    """One rank's part: (the trace of both, events once it had ended, modules of each rank, losses with and without)."""
    batch = torch.rand(8, 3, 16, 16), torch.arange(8) % 10
    losses = []
    for notes in (True, False):
        torch.manual_seed(0)
        trainer = StageTrainer(models.CifarResNet(1), *batch, modules=3, depth=2, balance="arithmetic")
        if notes:
            with tracing(trainer) as events:
                losses.append(trainer.epoch([(torch.ones(8, 3, 16, 16), batch[1])] * BATCHES).module_losses)
            count = len(events)
            trainer.epoch([batch])
        else:
            losses.append(trainer.epoch([(torch.ones(8, 3, 16, 16), batch[1])] * BATCHES).module_losses)
    return traced(events), len(events) - count, trainer.spans, losses


def test_a_trace_has_what_each_rank_did_in_order(tmp_path):
    first, second = together(two, tmp_path / "ranks")
    assert first[:3] == second[:3]
    events, later, spans, (noted, plain) = first
    assert later == 0 and noted == plain
    assert min(event.start for event in events) == 0
    for rank, span in enumerate(spans):
        ours = [event for event in events if event.rank == rank]
        assert all(event.start <= event.end for event in ours)
        assert all(before.end <= after.start for before, after in zip(ours, ours[1:], strict=False))
        of_kind = Counter((event.what, event.batch) for event in ours)
        modules = {(what, batch): len(span) for what in ("forward", "backward", "step") for batch in range(BATCHES)}
        assert of_kind == modules | ({("send", batch): 1 for batch in range(BATCHES)} if rank == 0 else {})
        assert [event.what for event in ours[:3]] == ["forward", "backward", "step"]
    # Features that were not sent yet cannot be worked on.
    sent = {event.batch: event.start for event in events if event.what == "send"}
    begun = {event.batch: event.start for event in reversed(events) if event.rank == 1 and event.what == "forward"}
    assert all(sent[batch] <= begun[batch] for batch in range(BATCHES))
    assert max(event.end for event in events) == pytest.approx(events[-1].end)
