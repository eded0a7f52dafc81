"""Training by two ranks, data parallel: against one process, in bytes, and what it refuses."""

from functools import partial

import pytest
import torch
from ranks import together

from auglocal_ext import LocalTrainer, models, plan, train
from auglocal_ext.common.memory import LiveBytes
from auglocal_ext.distributed.faults import RankFailed
from auglocal_ext.distributed.group import world
from auglocal_ext.planning.stepping import Stepping

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
RULES = {
    "auglocal": {"depth": 2, "modules": 3},
    "dgl": {"rule": "dgl", "modules": 2, "image_size": 16},
    "bp": {"rule": "bp"},
}
SETTINGS = {
    "plainly": {},
    "clipped": {"clip_norm": 0.3, "clip_value": 0.05},
    "accumulated": {"accumulate": 2, "clip_norm": 0.3},
    "together": {"accumulate": 2, "clip_norm": 0.3, "clip": "global"},
    "averaged": {"ema": 0.7},
}


def model(seed=0):
    torch.manual_seed(seed)
    return models.CifarResNet(1, num_classes=10).double()


def batches(count, rank, size=4):
    """Of a rank; another one's are others."""
    generator = torch.Generator().manual_seed(10 + rank)
    made = [torch.randn(size, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(images, (torch.arange(size) + rank) % 10) for images in made]


def trainer_of(given, **options):
    torch.manual_seed(1)
    return LocalTrainer(given, optimizer=SGD, **options)


def weights(trainer):
    """Parameters, no buffers."""
    both = (trainer.model, "model"), (trainer.aux_nets, "aux_nets")
    return {f"{name}.{n}": p.detach().clone() for module, name in both for n, p in module.named_parameters()}


# ---- what is computed ------------------------------------------------------------------------------------------------


def computed():
    """Three steps of every rule and setting; in one start of the processes."""
    rank, found = world().rank, {}
    for name, rule in RULES.items():
        trainer = trainer_of(model(rank), **rule)  # whose weights are rank 0's from here
        start = weights(trainer)
        for batch in batches(3, rank):
            result = trainer.step(*batch)
        found[name] = start, weights(trainer), trainer.stepper.reduction.count, len(trainer.local_modules)
        assert result.module_losses.isfinite().all()
    for name, settings in SETTINGS.items():
        trainer = trainer_of(model(), **RULES["auglocal"], **settings)
        for batch in batches(3, rank):
            trainer.step(*batch)
        trainer.flush()
        averages = {} if trainer.ema_model is None else dict(trainer.ema_model.named_parameters())
        found[name] = weights(trainer), {n: p.detach() for n, p in averages.items()}, trainer.stepper.reduction.count
    fixed = model()
    for module in fixed.modules():
        module.eval() if isinstance(module, torch.nn.BatchNorm2d) else None
    trainer = trainer_of(fixed, rule="bp")
    for batch in batches(3, rank):
        trainer.step(*batch)
    found["fixed"] = weights(trainer)
    frozen = model()
    frozen.conv1.requires_grad_(False), frozen.bn1.requires_grad_(False), frozen.layer1.requires_grad_(False)
    trainer = trainer_of(frozen, borders=[1], depth=2)
    for batch in batches(2, rank):
        trainer.step(*batch)
    found["frozen"] = trainer.stepper.reduction.count
    found["half"] = halves(rank)
    found["skipped"] = {name: skipping(rank, **SETTINGS[name]) for name in ("plainly", "together")}
    found["bytes"] = [*map(measured, BYTES)]
    found["sentences"] = sentences(rank)
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return together(computed, tmp_path_factory.mktemp("ranks"), seconds=30, limit=300)


def skipping(rank, **settings):
    """(weights, skipped steps, whether statistics were taken back) of three steps, in the second of which module 1 has
    a gradient on rank 1 that is infinite."""
    trainer, spoils = trainer_of(model(), **RULES["auglocal"], **settings), False
    trainer.nonfinite, module = "skip", trainer.local_modules[1]
    next(module.parameters()).register_hook(lambda gradient: gradient * torch.inf if spoils else gradient)
    for index, batch in enumerate(batches(3, rank)):
        before, spoils = [buffer.clone() for buffer in module.buffers()], index == rank == 1
        trainer.step(*batch)
        if index == 1:
            taken_back = all(map(torch.equal, before, module.buffers()))
    trainer.flush()
    return weights(trainer), trainer.skipped_steps, taken_back


def expected(start, rule, groups, clip_norm=None, clip_value=None, clip="module", without=None, **_):
    """What one process comes to: each rank's gradients by a trainer of its own, averaged, and clipped and stepped by in
    plain torch. groups: of batches that are accumulated, each a list for each rank; without: (group, module) that is
    left out."""
    ranks = [trainer_of(model(), **rule) for _ in range(2)]
    for trainer in ranks:
        for module, prefix in ((trainer.model, "model."), (trainer.aux_nets, "aux_nets.")):
            module.load_state_dict(
                {n[len(prefix) :]: v for n, v in start.items() if n.startswith(prefix)}, strict=False
            )
    for number, group in enumerate(groups):
        gradients = [gradients_of(trainer, given) for trainer, given in zip(ranks, group, strict=True)]
        means = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(*gradients, strict=True)]
        for trainer in ranks:
            modules = [list(module.parameters()) for module in trainer.local_modules]
            for index, (parameters, mean) in enumerate(zip(modules, means, strict=True)):
                for p, gradient in zip(parameters, mean, strict=True):
                    p.grad = None if (number, index) == without else gradient.clone()
            for parameters in [sum(modules, [])] if clip == "global" else modules:
                if clip_value is not None:
                    torch.nn.utils.clip_grad_value_(parameters, clip_value)
                if clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
            for optimizer in trainer.optimizers:
                optimizer.step()
    return weights(ranks[0])


def gradients_of(trainer, given):
    """Of each module, the mean of its gradients for several batches."""
    sums = [[0] * len(list(module.parameters())) for module in trainer.local_modules]
    for images, labels in given:
        trainer.plan_for(images, labels)
        x = images
        for index, module in enumerate(trainer.local_modules):
            x, *_ = trainer.backward(index, x, labels, images)
            sums[index] = [before + p.grad for before, p in zip(sums[index], module.parameters(), strict=True)]
    return [[total / len(given) for total in module] for module in sums]


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", RULES)
def test_steps_are_those_of_averaged_gradients(both, name):
    (start, first, count, modules), (other_start, second, *_) = (found[name] for found in both)
    assert all(torch.equal(start[n], other_start[n]) and torch.equal(first[n], second[n]) for n in start)
    assert count == 3 * modules  # one reduction a module and step
    groups = [[[one], [other]] for one, other in zip(batches(3, 0), batches(3, 1), strict=True)]
    assert_close(first, expected(start, RULES[name], groups))
    assert any(not torch.equal(start[n], first[n]) for n in start)


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_averaged_before_they_are_clipped_and_once_a_group(both, name):
    (first, average, count), (second, other, _) = (found[name] for found in both)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert average.keys() == other.keys() and all(torch.equal(average[n], other[n]) for n in average)
    assert bool(average) == (name == "averaged")
    settings, given = SETTINGS[name], [batches(3, rank) for rank in range(2)]
    accumulate = settings.get("accumulate", 1)
    groups = [[one[i : i + accumulate] for one in given] for i in range(0, 3, accumulate)]
    plain = trainer_of(model(), **RULES["auglocal"])
    assert count == len(groups) * len(plain.local_modules)
    assert_close(first, expected(weights(plain), RULES["auglocal"], groups, **settings))


@pytest.mark.parametrize(("name", "without"), [("plainly", (1, 1)), ("together", (0, 1))])
def test_what_is_not_finite_on_one_rank_is_left_out_on_both(both, name, without):
    (first, skipped, taken_back), (second, *others) = (found["skipped"][name] for found in both)
    assert skipped == [0, 1, 0] and taken_back and others == [skipped, taken_back]
    assert all(torch.equal(first[n], second[n]) for n in first)
    settings, given = SETTINGS[name], [batches(3, rank) for rank in range(2)]
    accumulate = settings.get("accumulate", 1)
    groups = [[one[i : i + accumulate] for one in given] for i in range(0, 3, accumulate)]
    plain = weights(trainer_of(model(), **RULES["auglocal"]))
    assert_close(first, expected(plain, RULES["auglocal"], groups, without=without, **settings))


def test_with_fixed_statistics_two_ranks_are_one_process_with_both_batches(both):
    fixed = model()
    for module in fixed.modules():
        module.eval() if isinstance(module, torch.nn.BatchNorm2d) else None
    trainer = trainer_of(fixed, rule="bp")
    for pair in zip(batches(3, 0), batches(3, 1), strict=True):
        trainer.step(*(torch.cat(parts) for parts in zip(*pair, strict=True)))
    for found in both:
        assert_close(found["fixed"], weights(trainer))


def test_what_is_frozen_is_not_reduced(both):
    assert [found["frozen"] for found in both] == [2, 2]  # of two modules one, in two steps


class Recorded:
    """Stands for a Reduction in one process: notes what is asked of it."""

    def __init__(self, log):
        self.log, self.pending = log, []

    def start(self, key, parameters):
        assert all(p.grad is not None for p in parameters)
        self.log.append(f"start {key}")
        self.pending.append(key)

    def wait(self):
        while self.pending:
            self.log.append(f"wait {self.pending[0]}")
            yield self.pending[0]
            self.pending.pop(0)

    def drop(self):
        self.pending.clear()


def recorded(**options):
    trainer, log = trainer_of(model(), **RULES["auglocal"], **options), []
    trainer.stepper.reduction = Recorded(log)
    for index, (module, optimizer) in enumerate(zip(trainer.local_modules, trainer.optimizers, strict=True)):
        next(module.parameters()).register_hook(lambda _, index=index: log.append(f"backward {index}"))
        optimizer.register_step_post_hook(lambda *_, index=index: log.append(f"step {index}"))
    return trainer, log


def test_a_reduction_is_under_way_while_the_next_module_computes():
    trainer, log = recorded()
    trainer.step(*batches(1, 0)[0])
    assert log == [
        *("backward 0", "start 0"),
        *("backward 1", "wait 0", "step 0", "start 1"),
        *("backward 2", "wait 1", "step 1", "start 2", "wait 2", "step 2"),
    ]
    trainer, log = recorded(accumulate=2, clip_norm=1.0, clip="global")
    for batch in batches(2, 0):
        trainer.step(*batch)
    computed = ["backward 0", "start 0", "backward 1", "start 1", "backward 2", "start 2"]
    assert log[3:] == [*computed, *(f"wait {index}" for index in range(3)), *(f"step {index}" for index in range(3))]


@pytest.mark.parametrize(
    ("at", "said"),
    [
        (0, "No finished module was changed"),
        (1, "No finished module was changed"),
        (2, "Module 0 has taken this step already and is one step ahead of the rest"),
    ],
)
def test_a_step_that_stops_says_which_modules_were_stepped(at, said):
    """The one before, whose gradients were under way, was not."""
    trainer, _ = recorded()
    before = weights(trainer)

    def fails(_):
        raise ArithmeticError("a hook has a bug")

    next(trainer.local_modules[at].parameters()).register_hook(fails)
    with pytest.raises(ArithmeticError, match=f"stopped in local module {at} of 3. {said}"):
        trainer.step(*batches(1, 0)[0])
    assert trainer.stepper.reduction.pending == []
    changed = {n for n, value in weights(trainer).items() if not torch.equal(value, before[n])}
    assert changed == {n for n in before if at == 2 and n.startswith(("model.conv1", "model.bn1", "aux_nets.0."))}


# ---- float16 ---------------------------------------------------------------------------------------------------------


def halves(rank):
    """A gradient overflows on rank 1 alone, in the first of two steps: (scales, weights changed) after each step."""
    trainer = trainer_of(model().float(), depth=2, modules=2, precision="fp16")
    trainer.model.conv1.weight.register_hook(lambda g: g * torch.inf if rank and not found else None)
    found = []
    for images, labels in batches(2, rank):
        before = weights(trainer)
        trainer.step(images.float(), labels)
        after = weights(trainer)
        found.append((trainer.loss_scales, [n for n in before if not torch.equal(before[n], after[n])]))
    return found


def test_a_gradient_that_overflows_on_one_rank_leaves_the_module_out_on_all(both):
    first, second = (found["half"] for found in both)
    assert first == second
    (scales, changed), (later, changed_later) = first
    assert scales[0] == scales[1] / 2 and later == scales
    assert "model.fc.weight" in changed and "model.conv1.weight" not in changed
    assert "model.conv1.weight" in changed_later


# ---- memory ----------------------------------------------------------------------------------------------------------

BYTES = [
    {"rule": "bp"},
    {"depth": 2, "modules": 3},
    {"depth": 2},
    {"depth": 2, "accumulate": 2, "clip_norm": 1.0},
    {"depth": 2, "accumulate": 2, "clip_norm": 1.0, "clip": "global", "ema": 0.9},
    {"depth": 2, "modules": 2, "precision": "bf16", "recompute": True},
    {"depth": 2, "modules": 2, "optimizer": torch.optim.Adagrad, "clip_norm": 1.0},
    {"depth": 2, "modules": 3, "size": 2},
]


def measured(options):
    """(planned, measured) bytes of a step."""
    options = {"optimizer": SGD} | options
    size = options.pop("size", 8)
    torch.manual_seed(0)
    trainer = LocalTrainer(models.CifarResNet(1), **options)
    given = [(images.float(), labels) for images, labels in batches(options.get("accumulate", 1), 0, size)]
    peaks = []
    for step in range(3):
        for batch in given:
            with LiveBytes([*trainer.tensors(), *batch]) as live:
                trainer.step(*batch)
            peaks += [live.peak] * (step > 0)
    return trainer.plan.peak_bytes, max(peaks)


def test_the_prediction_is_what_is_measured(both):
    for options, pair in zip(BYTES, both[0]["bytes"], strict=True):
        assert pair[0] == pair[1], options
    assert both[0]["bytes"] == both[1]["bytes"]


def test_several_ranks_need_more_than_one():
    """Gradients wait for a module longer, and are moved into one tensor behind their own."""
    parameters = [[torch.empty(2), torch.empty(3)], [torch.empty(10)], [torch.empty(1), torch.empty(1)]]
    assert Stepping().bytes_around(parameters, [5, 6, 7]) == [(0, 5), (0, 6), (0, 7)]
    assert Stepping(ranks=2).bytes_around(parameters, [5, 6, 7]) == [(0, 20), (20, 25), (40, 46)]
    assert Stepping(ranks=2, accumulate=2).bytes_around(parameters, [5, 6, 7]) == [(0, 0), (0, 5), (0, 7)]


# ---- what is told ----------------------------------------------------------------------------------------------------


def sentences(rank):
    """What is refused, on both ranks."""
    deeper = models.CifarResNet(1 + rank)
    wider = models.CifarResNet(1)
    wider.fc = torch.nn.Linear(64, 10 + rank)
    planned = plan(models.CifarResNet(1), (4, 3, 16, 16), 2, modules=2)
    object.__setattr__(planned.origin, "stepping", Stepping(ranks=1))
    small = [(torch.randn(2, 3, 8, 8), torch.arange(2))]
    attempts = [
        lambda: LocalTrainer(deeper, 2, modules=2),
        lambda: LocalTrainer(wider, 2, modules=2),
        lambda: LocalTrainer(models.CifarResNet(1), 2 + rank, modules=2),
        lambda: LocalTrainer(models.CifarResNet(1), 2, optimizer=partial(torch.optim.SGD, lr=0.1 + rank)),
        lambda: LocalTrainer(models.CifarResNet(1), plan=planned),
        lambda: train(models.CifarResNet(1), [(torch.randn(2 + rank, 3, 8, 8), torch.arange(2 + rank))], 2),
        lambda: train(models.CifarResNet(1), small, 2, nonfinite=("stop", "skip")[rank]),
    ]
    said = []
    for attempt in attempts:
        try:
            attempt()
            said.append(None)
        except (ValueError, RankFailed) as error:
            said.append(str(error))
    return said


def test_what_does_not_fit_is_told_in_one_sentence_on_every_rank(both):
    said = [
        "rank 1 has units ['stem', 'layer1.0', 'layer1.1', ",
        "rank 1 has parameter model.fc.weight ('torch.float32', (11, 64), True), rank 0 has ('torch.float32', (10, "
        "64), True): make the same model and trainer on every rank",
        "rank 1 has depth 3, rank 0 has 2: make the same",
        "rank 1 has the optimizer's lr [1.1], rank 0 has [0.1]: make the same",
        "the plan is for 1 ranks, given to one of 2: call auglocal_ext.plan in the processes that train",
        "rank 1 has batches of images of shape (3, 3, 8, 8), rank 0 has (2, 3, 8, 8): give every rank the same",
        "rank 1 has nonfinite 'skip', rank 0 has 'stop': give every rank the same",
    ]
    for found in both:
        for sentence, beginning in zip(found["sentences"], said, strict=True):
            assert sentence and sentence.startswith(beginning), (sentence, beginning)


def test_a_state_of_another_number_of_ranks_is_gone_on_from_between_groups():
    trainer = trainer_of(model(), **RULES["bp"])
    state = trainer.state_dict()
    assert state["made_of"].pop("ranks") == 1
    trainer.load_state_dict(state)  # of before there were several
    state["made_of"]["ranks"] = 2
    trainer.load_state_dict(state)
    state["stepper"]["count"] = 1
    with pytest.raises(ValueError, match="within a group of batches that 2 ranks accumulate together, this trainer is"):
        trainer.load_state_dict(state)
