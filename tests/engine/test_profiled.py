"""What torch.profiler shows of a step: a range for each local module, and for each instruction in it."""

from collections import Counter

import torch

from auglocal_ext import LocalTrainer, models


def test_ranges_are_named_by_module_part_and_instruction():
    torch.manual_seed(0)
    trainer = LocalTrainer(models.CifarResNet(1, num_classes=4), 2, modules=2)
    batch = torch.randn(4, 3, 8, 8), torch.arange(4)
    trainer.step(*batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        trainer.step(*batch)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["local module 0"] == counts["local module 1"] == 1
    steps = [step for program in trainer._current_programs() for step in program.steps]
    expected = Counter(f"{step.part}: {step.kind}" for step in steps)
    assert {name: counts.get(name) for name in expected} == expected and "stem: conv" in expected
