"""Data parallel times layer parallel: two pipelines of two stages, against one process on both their batches."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from ranks import together

from auglocal_ext import models, train, train_stages
from auglocal_ext.distributed.group import among, world
from auglocal_ext.stages.grid import Grid, grid_of
from auglocal_ext.stages.trainer import StageTrainer
from auglocal_ext.training.divergence import NotFinite

CUT = {"modules": 4, "depth": 2, "sync_batch_norm": True}
COMMON = {"epochs": 2, "seed": 0, "progress": False, **CUT}


def model(seed=0):
    torch.manual_seed(seed)
    return models.CifarResNet(1).double()


def batches(sizes=(8, 8, 6)):
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(n, 3, 16, 16, generator=generator, dtype=torch.float64) - 0.5 for n in sizes]
    return [(one, torch.randint(0, 10, (len(one),), generator=generator)) for one in images]


def share(replica, of=batches):
    """A pipeline's part of every batch."""
    return [(images.chunk(2)[replica], labels.chunk(2)[replica]) for images, labels in of()]


def of_the_model(trained):
    return {name: tensor.clone() for name, tensor in trained.state_dict().items() if not tensor.is_meta}


def trained(**options):
    """One rank's part: (the model's tensors here, history); loaders of second stages are looked at by nobody."""
    grid, own = grid_of(2), model(world().rank)
    loader = share(grid.replica) if grid.stage == 0 else None
    val_loader = batches(((5, 2), (3,))[grid.replica]) if grid.stage == 0 else None
    given = {"stages": 2, "val_loader": val_loader, "balance": "arithmetic"}
    result = train_stages(own, loader, **given, **COMMON, **options)
    return of_the_model(own), result.history


def stopped_and_gone_on(folder):
    """The first epoch in one training, the second one from its checkpoint."""

    def stop(entry):
        if entry["epoch"] == 1:
            raise InterruptedError("a stop")

    with pytest.raises(InterruptedError):
        trained(checkpoint=folder, on_epoch=stop)
    return trained(checkpoint=folder)


def in_steps():
    """A trainer's: (tensors that it has behind an epoch, its mesh, a batch that one pipeline alone cannot take)."""
    grid = grid_of(2)
    trainer = StageTrainer(model(), *share(0)[0], stages=2, balance="memory", **CUT | {"sync_batch_norm": False})
    loader = share(grid.replica) + [batches((1 + grid.replica,))[0]]  # the last one is skipped by both
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        entry = trainer.epoch(loader)
    mesh = trainer.mesh
    ranks = [torch.distributed.get_process_group_ranks(mesh[name].get_group()) for name in ("replica", "stage")]
    found = (mesh.shape, mesh.mesh_dim_names, mesh.get_coordinate(), ranks)
    held = {name: tensor.detach().clone() for name, tensor in trainer.parts.held.items()}
    states = [optimizer.state_dict()["state"] for optimizer in trainer.stage.optimizers]
    return held, states, entry, found, trainer.rank_bytes, [str(one.message) for one in caught]


def poisoned(logits, labels):
    """NaN in a batch that begins with class 9."""
    return F.cross_entropy(logits, labels) + torch.where(labels[0] == 9, torch.nan, 0.0)


def one_diverges():
    """What is said where the third batch of the second pipeline has no finite loss, and how many of 30 were read."""
    grid = grid_of(2)
    trainer = StageTrainer(model(), *share(0)[0], stages=2, balance="arithmetic", criterion=poisoned, **CUT)
    images, read = share(0)[0][0], []

    def loader():
        for step in range(30):
            read.append(step)
            yield images, torch.full((4,), 9 if step == 2 and grid.replica else 3)

    try:
        trainer.epoch(loader(), title="epoch 1/1")
    except NotFinite as error:
        return str(error).split(";")[0], len(read)


def one_is_left_out():
    """(steps that were left out, weights) where the second batch of the second pipeline has no finite loss."""
    grid, more = grid_of(2), {"criterion": poisoned, "nonfinite": "skip"}
    trainer = StageTrainer(model(), *share(0)[0], stages=2, balance="arithmetic", **more, **CUT)
    images = share(grid.replica)[0][0]
    entry = trainer.epoch([(images, torch.full((4,), 9 if step == 1 and grid.replica else 3)) for step in range(3)])
    return entry.skipped_steps, {name: tensor.detach().clone() for name, tensor in trainer.parts.held.items()}


def one_has_more():
    grid = grid_of(2)
    trainer = StageTrainer(model(), *share(0)[0], stages=2, balance="arithmetic", **CUT)
    try:
        trainer.epoch(share(grid.replica)[: 2 + grid.replica])
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def everything(folder):
    return stopped_and_gone_on(folder), in_steps(), one_diverges(), one_is_left_out(), one_has_more()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def of_four_ranks(folder):
    found = together(everything, folder, folder / "checkpoint", size=4, seconds=30)
    return list(zip(*found, strict=True))


def test_weights_and_losses_are_those_of_one_process_on_all_images(of_four_ranks):
    found = of_four_ranks[0]
    whole = model()
    result = train(whole, batches(), val_loader=batches((5, 2)) + batches((3,)), **COMMON)
    weights, history = found[0]
    for name, expected in whole.state_dict().items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(history, result.history, strict=True):
        for name in ("train_accuracy", "val_accuracy", "val_top5_accuracy"):
            assert ours[name] == theirs[name]
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-9)
        assert ours["module_losses"] == pytest.approx(theirs["module_losses"], rel=1e-9)
    assert all(one[1] == history for one in found)


def test_ranks_of_one_stage_have_the_same_and_others_nothing_of_it(of_four_ranks):
    found, steps, *_ = of_four_ranks
    for first, second in ((0, 2), (1, 3)):
        held, states, entry, _, planned, _ = steps[first]
        others = steps[second]
        assert list(held) == list(others[0]) and all(torch.equal(held[name], others[0][name]) for name in held)
        for ours, theirs in zip(states, others[1], strict=True):
            assert all(torch.equal(ours[i]["momentum_buffer"], theirs[i]["momentum_buffer"]) for i in ours)
        assert entry == others[2] == steps[0][2] and planned[first] == planned[second]
    assert not steps[0][0].keys() & steps[1][0].keys()
    # Only the first rank's model is whole afterwards.
    counts = [len(one[0]) for one in found]
    assert counts[0] == len(model().state_dict()) > counts[2] and counts[1] == counts[3] < counts[0]


def test_a_batch_of_one_image_in_one_pipeline_is_skipped_by_both(of_four_ranks):
    said = [one[5] for one in of_four_ranks[1]]
    assert [len(one) for one in said] == [1, 0, 1, 0] and "a batch of one image is skipped" in said[2][0]


def test_the_layout_is_a_mesh(of_four_ranks):
    for rank, (*_, found, _, _) in enumerate(of_four_ranks[1]):
        shape, names, place, ranks = found
        assert (tuple(shape), names, tuple(place)) == ((2, 2), ("replica", "stage"), divmod(rank, 2))
        assert ranks == [[rank % 2, rank % 2 + 2], [rank // 2 * 2, rank // 2 * 2 + 1]]


def test_a_loss_that_is_not_finite_in_one_pipeline_ends_all(of_four_ranks):
    said, read = zip(*of_four_ranks[2], strict=True)
    assert set(said) == {"epoch 1/1, step 3: the loss of local module 0 of 4 (stem) is not finite"}
    assert 3 <= read[0] == read[2] < 20 and read[1] == read[3] == 0


def test_a_loss_that_is_not_finite_in_one_pipeline_is_left_out_by_all(of_four_ranks):
    found = of_four_ranks[3]
    assert [skipped for skipped, _ in found] == [CUT["modules"]] * 4  # a step of each module
    for (_, one), (_, other) in zip(found[:2], found[2:], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        assert all(tensor.isfinite().all() for tensor in one.values())


def test_one_pipeline_goes_on_from_two(of_four_ranks, folder, tmp_path):
    """As one process on all images, which it is from there on."""
    made = [model(), model()]
    for epochs in (2, 3):
        train(made[0], batches(), checkpoint=tmp_path, **COMMON | {"epochs": epochs})
    with pytest.warns(UserWarning, match="has a training by 2 pipelines, which goes on with 1: learning rates are by"):
        train_stages(made[1], batches(), checkpoint=folder / "checkpoint", **COMMON | {"epochs": 3})
    for name, expected in made[0].state_dict().items():
        torch.testing.assert_close(made[1].state_dict()[name], expected, rtol=1e-9, atol=1e-9)


def test_a_pipeline_with_more_batches_ends_all(of_four_ranks):
    said = of_four_ranks[4]
    assert all("the loader of rank 0 ended after 2 batches, another rank's has more" in one for one in said), said


def test_stages_that_do_not_divide_the_ranks():
    assert grid_of(None) == grid_of(1) == Grid(1, 1, 0)
    for given in (2, 0, True, 1.0):
        with pytest.raises(ValueError, match="a whole number that divides the number of ranks, 1, given"):
            grid_of(given)


def test_a_grid():
    grid = Grid(3, 2, 3)
    assert (grid.replica, grid.stage) == (1, 1)
    assert list(grid.pipeline) == [2, 3] and list(grid.copies) == [1, 3, 5] and list(grid.border(0)) == [2, 3]


def test_among_others_a_process_alone_is_alone():
    with among(range(3, 5)):
        assert world().alone
