"""Every kind of node, by its own samples: autograd's gradients, a real run's bytes, rebuilds to the bit, any gap kept,
nothing left alive behind an error. A kind gets all of it by being listed in `engine.nodes.KINDS`."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext.common.memory import LiveBytes, tensors_of
from auglocal_ext.common.meta import meta_copy
from auglocal_ext.engine.emit import Phase
from auglocal_ext.engine.nodes import KINDS, Head, Loss, PatchMerging, WindowAttention
from auglocal_ext.engine.program import build
from auglocal_ext.engine.timeline import timeline
from auglocal_ext.engine.trace import join, trace
from auglocal_ext.engine.walked_steps import WalkedSteps

LAYOUTS = [torch.contiguous_format, torch.channels_last]
CASES = [(kind, index) for kind in KINDS for index in range(len(kind.samples()))]


class Block(nn.Module):
    """A sample between two convolutions, so that it has a gradient to take and one to give, and a head behind it."""

    def __init__(self, sample, alone):
        super().__init__()
        before = nn.Identity() if alone else nn.Conv2d(4, 4, 3, padding=1)
        self.body = nn.Sequential(before, copy.deepcopy(sample))
        features = self.body(torch.zeros(2, 4, 7, 6))
        pool = nn.AdaptiveAvgPool2d(1) if features.dim() == 4 else nn.Flatten(1)  # of tokens (N, L, C)
        self.head = nn.Sequential(pool, nn.Flatten(1), nn.LazyLinear(5))
        self.head(features)

    def forward(self, x):
        features = self.body(x)
        return features, self.head(features)


def looked_into(block):
    """The types of the samples' own blocks."""
    return {type(part) for part in block.modules() if type(part).__module__.startswith("auglocal_ext.engine")}


def program_of(block, features=True, **options):
    nodes, out = trace(block.body, looked_into(block), "body", "images")
    head, _ = trace(block.head, set(), "head", out)
    handed_on = out if features else None
    return build(join(nodes, head, handed_on), "images", handed_on, **options), nodes


def batch(layout=torch.contiguous_format, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 4, 7, 6, generator=generator, dtype=torch.float64).to(dtype)
    return images.contiguous(memory_format=layout), torch.tensor([0, 4, 2])


def run(program, block, images, labels):
    """Loss, logits, features, gradients and statistics of a run, by name."""
    block.zero_grad()
    torch.manual_seed(1)
    features, logits, loss = program.run([images], labels, images)
    found = {"loss": loss, "logits": logits} | ({} if features is None else {"features": features})
    found |= {name: p.grad for name, p in block.named_parameters()}
    return found | {name: b.clone() for name, b in block.named_buffers()}


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def case(request):
    kind, index = request.param
    torch.manual_seed(0)
    return kind, kind.samples()[index]


@pytest.mark.covering(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("options", [{}, {"recomputed": {"body", "head"}}, {"recomputed": {"body"}}])
def test_values_and_gradients_are_autograds(case, layout, alone, options):
    kind, sample = case
    block = Block(sample, alone).double()
    own = copy.deepcopy(block)
    images, labels = batch(layout)
    program, nodes = program_of(block, **options)
    assert any(type(node) is kind for node in nodes)
    torch.manual_seed(1)
    features, logits = own(images.clone())
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    expected = {"loss": loss, "logits": logits, "features": features} | {n: p.grad for n, p in own.named_parameters()}
    expected |= dict(own.named_buffers())
    given = images.clone()
    found = run(program, block, images, labels)
    assert torch.equal(images, given) and found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-9, atol=1e-11, msg=name)


def test_what_it_computes_plainly_is_what_its_module_computes(case):
    _, sample = case
    block = Block(sample, False).double()
    own, (images, _) = copy.deepcopy(block), batch()
    nodes, out = trace(block.body, looked_into(block), "body", "x")
    values = {"x": images}
    torch.manual_seed(1)
    expected = own.body(images.clone())
    torch.manual_seed(1)
    for node in nodes:
        values[node.out] = node.plain(*(values[name] for name in node.sources))
    torch.testing.assert_close(values[out], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.covering(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("alone", [False, True])
def test_bytes_without_data_are_those_of_a_run(case, layout, autocast, alone):
    _, sample = case
    block = Block(sample, alone)
    images, labels = batch(layout, torch.float32)
    without = meta_copy(block)
    walked, _ = program_of(without, autocast=autocast)
    x = torch.empty_like(images, device="meta")
    line, _ = timeline(walked, x, labels.to("meta"), tensors_of(without), count_input=False, images=x)
    program, _ = program_of(block, autocast=autocast)
    assert [step.kind for step in program.steps] == [step.kind for step in walked.steps]
    with torch.no_grad(), LiveBytes([images, labels, *tensors_of(block)]) as live:
        base = live.now
        kept = program.run([images], labels, images)
        assert live.peak - base == line.peak
    del kept


def test_a_walk_that_knows_the_steps_is_one_that_runs_them(case):
    _, sample = case
    block, images, labels = meta_copy(Block(sample, False)), *(x.to("meta") for x in batch(dtype=torch.float32))

    def walked(steps, **options):
        program, _ = program_of(block, **options)
        return timeline(program, images, labels, tensors_of(block), images=images, steps=steps)[0], program

    steps = WalkedSteps()
    line, program = walked(steps)
    assert walked(steps)[0] == line == walked(WalkedSteps())[0]
    kept = frozenset(gap.key for gap in program.gaps)
    for options in {"kept_gaps": kept}, {"recomputed": ("body",)}:
        assert walked(steps, **options)[0] == walked(WalkedSteps(), **options)[0]


@pytest.mark.covering(2)
@pytest.mark.parametrize("what", [(1,), (0,), (0, 1)], ids=["behind what trains", "in front", "the sample too"])
@pytest.mark.parametrize("recomputed", [set(), {"body"}], ids=["", "recomputed"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_what_is_frozen(case, what, recomputed, autocast):
    """The other gradients are autograd's, frozen parameters have none, a real run's bytes are those without data; and
    of what is frozen in front nothing runs again."""
    _, sample = case
    block = Block(sample, False)
    for index in what:
        block.body[index].requires_grad_(False)
    images, labels = batch(dtype=torch.float32)
    options = {"autocast": autocast, "recomputed": recomputed}
    without = meta_copy(block)
    walked, _ = program_of(without, features=False, **options)
    x = torch.empty_like(images, device="meta")
    line, _ = timeline(walked, x, labels.to("meta"), tensors_of(without), count_input=False, images=x)
    if what == (0, 1):
        assert all(moment.phase is Phase.FORWARD for moment in line.moments if moment.part == "body")
    program, _ = program_of(block, features=False, **options)
    with torch.no_grad(), LiveBytes([images, labels, *tensors_of(block)]) as live:
        base = live.now
        kept = program.run([images], labels, images)
        assert live.peak - base == line.peak
    del kept
    if autocast is not None:
        return
    block = block.double()
    own, images = copy.deepcopy(block), images.double()
    program, _ = program_of(block, features=False, **options)
    torch.manual_seed(1)
    F.cross_entropy(own(images.clone())[1], labels).backward()
    found = run(program, block, images, labels)
    for name, parameter in own.named_parameters():
        assert (found[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-11, msg=name)
    for name, buffer in own.named_buffers():
        torch.testing.assert_close(found[name], buffer, msg=name)


def test_rebuilds_are_equal_to_the_bit_and_any_gap_may_be_kept(case):
    _, sample = case
    block = Block(sample, False)
    images, labels = batch(dtype=torch.float32)
    state = copy.deepcopy(block.state_dict())
    program, _ = program_of(block, pinned=set())
    expected = run(program, block, images, labels)
    values = {"images": images, "labels": labels}
    made = {}
    block.load_state_dict(state)
    with torch.no_grad():
        for step in program.steps:
            program.execute(step, values)
            for name in step.writes:
                value = values.get(name)
                if step.rebuilds and name in made:
                    assert torch.equal(value, made[name]), name
                elif isinstance(value, torch.Tensor):
                    made[name] = value.clone()
    keys = [gap.key for gap in program.gaps]
    for count in range(1, len(keys) + 1):
        for keep in itertools.combinations(keys, count):
            block.load_state_dict(state)
            kept, _ = program_of(block, pinned=set(), kept_gaps=frozenset(keep))
            assert not {gap.key for gap in kept.gaps} & set(keep)
            found = run(kept, block, images, labels)
            assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_error_at_any_step_leaves_nothing_alive(case):
    _, sample = case
    block = Block(sample, False)
    images, labels = batch(dtype=torch.float32)
    program, _ = program_of(block)
    for step in program.steps:
        whole = step.run

        def broken(*reads, whole=whole):
            whole(*reads)
            raise RuntimeError("here")

        step.run = broken
        block.zero_grad()
        with LiveBytes([images, labels, *tensors_of(block)]) as live:
            before = live.now
            with pytest.raises(RuntimeError, match="here"):
                program.run([images], labels, images)
            assert live.now == before, step.kind
        step.run = whole


def test_every_kind_that_is_traced_has_samples():
    of_torchvision = {PatchMerging, WindowAttention}  # which may not import
    assert all(kind.samples() for kind in KINDS if kind not in of_torchvision)
    assert not Head.samples() and not Loss.samples()  # what `join` makes: in the tests of heads
