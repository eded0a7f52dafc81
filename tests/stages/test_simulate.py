"""Predicted schedules against what is known of them in closed form."""

import pytest

from auglocal_ext.stages.events import Event, Task, run
from auglocal_ext.stages.pieces import Costs, Link, Piece
from auglocal_ext.stages.simulate import FORMS, predicted

AT_ONCE = Link(float("inf"), 0.0)
PIECE = Piece(1.0, 2.0, 1.0, 0.0, output=8, state=100, gradients=40, kept=48, activations=64, peak=110)
IMAGES = 64


def equal(stages, piece=PIECE, images=IMAGES):
    return Costs(images, (piece,) * stages, (piece,) * stages)


def slower(factors):
    pieces = tuple(PIECE.scaled(factor) for factor in factors)
    return Costs(IMAGES, pieces, pieces)


def test_a_task_waits_for_its_lane_and_for_what_it_is_told_to():
    a, b, c = (("forward", 0, 0, 0), 1.0), (("send", 0, 0, 0), 2.0), (("forward", 1, 0, 0), 4.0)
    lanes = {"first": [Task(*a), Task(("step", 0, 0, 0), 0.5)], "link": [Task(*b, [a[0]])], "next": [Task(*c, [b[0]])]}
    assert sorted(run(lanes)) == [
        Event(0, 0, "forward", 0.0, 1.0),
        Event(0, 0, "send", 1.0, 3.0),
        Event(0, 0, "step", 1.0, 1.5),
        Event(1, 0, "forward", 3.0, 7.0),
    ]


def test_a_schedule_that_waits_for_itself_is_refused():
    key = ("forward", 0, 0, 0)
    with pytest.raises(ValueError, match=r"never comes to \('send', 0, 0, 0\)"):
        run({0: [Task(key, 1.0, [("send", 0, 0, 0)])]})


@pytest.mark.parametrize(("stages", "micro"), [(2, 4), (4, 8), (4, 4), (8, 32)])
@pytest.mark.parametrize("form", ["gpipe", "1f1b"])
def test_equal_stages_of_a_pipeline_wait_as_the_formula_says(form, stages, micro):
    found = predicted(equal(stages), stages, form, link=AT_ONCE, micro_batches=micro)
    assert found.bubble == pytest.approx((stages - 1) / (micro + stages - 1))
    assert found.images_per_second == pytest.approx(IMAGES / (3 * (micro + stages - 1) / micro))


@pytest.mark.parametrize(("stages", "micro"), [(2, 8), (4, 8), (8, 32)])
def test_zero_bubble_waits_a_third_of_1f1b(stages, micro):
    found = {f: predicted(equal(stages), stages, f, link=AT_ONCE, micro_batches=micro) for f in FORMS}
    idle = {form: found[form].bubble / found[form].images_per_second for form in ("1f1b", "zero-bubble")}
    assert idle["zero-bubble"] == pytest.approx(idle["1f1b"] / 3)
    assert idle["zero-bubble"] * IMAGES == pytest.approx((stages - 1) / micro)


@pytest.mark.parametrize("stages", [1, 2, 5, 16])
def test_local_learning_that_is_balanced_never_waits(stages):
    found = predicted(equal(stages), stages, link=AT_ONCE)
    assert found.bubble == pytest.approx(0)
    assert found.images_per_second == pytest.approx(IMAGES / 3)
    assert found.lag == stages - 1


@pytest.mark.parametrize("factors", [(1, 3, 2, 1), (4, 1, 1, 1), (1, 1, 1, 4)])
@pytest.mark.parametrize("max_lag", [1, 3])
def test_the_slowest_stage_sets_the_pace_of_local_learning(factors, max_lag):
    found = predicted(slower(factors), 4, max_lag=max_lag, link=AT_ONCE)
    assert found.images_per_second == pytest.approx(IMAGES / (3 * max(factors)))
    assert found.bubble == pytest.approx(1 - sum(factors) / 4 / max(factors))


def test_the_first_rank_is_ahead_as_far_as_buffers_allow():
    costs = slower((1, 1, 100))
    assert [predicted(costs, 3, max_lag=lag, link=AT_ONCE).lag for lag in (1, 2, 3)] == [2, 4, 6]


def test_synchronous_ranks_work_one_after_another():
    found = predicted(slower((1, 3, 2)), 3, "synchronous", link=Link(8.0, 0.5))
    seconds = 3 * 6 + 2 * 1.5  # 8 bytes by 8 bytes a second and half a second, twice
    assert found.images_per_second == pytest.approx(IMAGES / seconds)
    assert found.bubble == pytest.approx(1 - 18 / seconds / 3) and found.lag == 0


@pytest.mark.parametrize("form", FORMS)
def test_one_stage_is_the_sum(form):
    costs = slower((1, 3, 2))
    found = predicted(costs, 1, form)
    assert found.images_per_second == pytest.approx(IMAGES / 18)
    assert found.bubble == pytest.approx(0) and len(found.memory) == 1


def test_steps_are_not_cut_into_micro_batches():
    costs = equal(2, Piece(1.0, 2.0, 1.0, 6.0))
    for form, bubble in (("gpipe", 1), ("1f1b", 1), ("zero-bubble", 1 / 3)):
        found = predicted(costs, 2, form, link=AT_ONCE, micro_batches=8)
        # The last rank's step ends before the first one's, which begins the next batch.
        assert IMAGES / found.images_per_second == pytest.approx(9 + 3 * bubble / 8, rel=0.02), form


def test_a_message_takes_latency_and_bytes():
    """The slowest of stages and messages sets the pace where messages go beside the computing."""
    fast, slow = Link(8 / 2.5, 0.25), Link(8 / 4.5, 0.5)
    assert predicted(equal(4), 4, link=fast).images_per_second == pytest.approx(IMAGES / 3)
    assert predicted(equal(4), 4, link=slow).images_per_second == pytest.approx(IMAGES / 5)
    # A pipeline's first micro-batch passes each border twice.
    found = predicted(equal(3), 3, "gpipe", link=Link(float("inf"), 0.01), micro_batches=4)
    assert IMAGES / found.images_per_second == pytest.approx(3 * 6 / 4 + 4 * 0.01)


def test_gradients_are_averaged_while_the_rest_computes():
    link = Link(40.0, 0.0)  # 1.5 seconds over four ranks, of 40 bytes
    assert link.all_reduce(40, 4) == pytest.approx(1.5) and link.all_reduce(40, 1) == 0
    found = predicted(equal(8), 4, "bp data parallel", link=link)
    # Backward takes 0.5 of each: from the first gradient on, averaging takes longer than what it hides behind.
    assert IMAGES / found.images_per_second == pytest.approx(8 * 0.25 + 0.5 + 8 * 1.5)
    quick = Link(400.0, 0.0)
    found = predicted(equal(8), 4, "bp data parallel", link=quick)
    assert IMAGES / found.images_per_second == pytest.approx(8 * 0.75 + 0.15)  # the first unit's alone is waited for
    assert found.bubble == pytest.approx(0.15 / 6.15)
    found = predicted(equal(8), 4, "local data parallel", link=quick)
    assert IMAGES / found.images_per_second == pytest.approx(8 * 0.75 + 0.15)


def test_gpipe_holds_all_micro_batches_and_1f1b_as_many_as_there_are_ranks():
    fixed, extra = 100 + 40, (64 - 48) / 8
    memory = {
        form: predicted(equal(4), 4, form, link=AT_ONCE, micro_batches=8).memory
        for form in ("gpipe", "1f1b", "zero-bubble")
    }
    given = [0, 1, 1, 1]  # a micro-batch's input, of 8 bytes a batch; the first rank's is the batch
    assert memory["gpipe"] == tuple(fixed + 8 * (6 + x) + extra for x in given)
    assert memory["1f1b"] == tuple(fixed + held * (6 + x) + extra for held, x in zip((4, 3, 2, 1), given, strict=True))
    assert memory["zero-bubble"] == tuple(fixed + 4 * (6 + x) + extra for x in given)


def test_local_learning_holds_one_batch_of_one_module_and_the_buffers():
    costs = equal(8)
    assert predicted(costs, 4, max_lag=2).memory == (326, 342, 342, 326)
    assert predicted(costs, 4, max_lag=3).memory == (334, 358, 358, 334)
    assert predicted(costs, 4, "synchronous").memory == (318, 326, 326, 318)
    assert predicted(costs, 4, "local data parallel").memory == (800 + 64 / 4 + 40 + 40,) * 4
    assert predicted(costs, 4, "bp data parallel").memory == (8 * 140 + (8 * 48 + 16) / 4,) * 4


def test_given_borders_are_taken():
    found = predicted(slower((1, 1, 1, 3)), 2, spans=[range(0, 1), range(1, 4)], link=AT_ONCE)
    assert found.images_per_second == pytest.approx(IMAGES / 15)
    assert predicted(slower((1, 1, 1, 3)), 2, link=AT_ONCE).spans == (range(0, 3), range(3, 4))


def test_ranks_that_slow_each_other_down():
    assert predicted(equal(2).scaled(1.25), 2).images_per_second == pytest.approx(IMAGES / 3.75)


def test_many_stages():
    found = predicted(equal(100), 100)
    assert found.images_per_second == pytest.approx(IMAGES / 3, rel=1e-3) and found.bubble == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        (2, {"form": "pipedream"}, "form must be one of decoupled, .* given 'pipedream'"),
        (5, {}, "4 local modules cannot be spread over 5 stages"),
        (5, {"form": "gpipe"}, "4 local modules cannot be spread over 5 stages"),
        (2, {"form": "gpipe", "micro_batches": 65}, "64 images cannot be cut into 65 micro-batches"),
        (65, {"form": "bp data parallel"}, "64 images cannot be shared out to 65 ranks"),
    ],
)
def test_what_cannot_be_is_told_in_one_sentence(stages, options, message):
    with pytest.raises(ValueError, match=message):
        predicted(equal(4), stages, **options)
