"""Loaders whose batches follow from seed, epoch and place: the same whatever happened before, from any batch on."""

import pickle

import numpy as np
import pytest
import torch

from auglocal_ext.data import DeviceLoader, large_images, mean_and_std
from auglocal_ext.data.resumable import seed_at


def small(seed=None, count=10, batch_size=3, channels=3, **options):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, channels, 8, 6), dtype=torch.uint8, generator=generator)
    options = {"augment": True, "pad": 2, "flip": True} | options
    return DeviceLoader(images, torch.arange(count), batch_size, *mean_and_std(images), seed=seed, **options)


class Pictures:
    """A dataset of small pictures that draws by itself too, and knows which were read in this process."""

    def __init__(self, count):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        from PIL import Image

        self.read.append(index)
        pixels = np.random.default_rng(index).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index + 100 * torch.randint(100, ()).item()


def large(seed=None, count=10, batch_size=3, workers=0):
    return large_images(Pictures(count), Pictures(2), batch_size, [str(i) for i in range(count)],
                        workers=workers, seed=seed).train  # fmt: skip


def large_with_workers(seed=None, **options):
    return large(seed, workers=2, **options)


@pytest.fixture(params=[small, large, large_with_workers])
def make(request, torchvision):
    return request.param


def same(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for batches in pairs for a, b in zip(*batches, strict=True)
    )


def test_batches_follow_from_seed_and_epoch(make):
    loader = make(seed=5)
    epochs = [list(loader) for _ in range(2)]
    assert [len(labels) for _, labels in epochs[0]] == ([3, 3, 3, 1] if make is small else [3, 3, 3])
    assert not same(*epochs)
    torch.rand(7)
    other = make(seed=5)
    other.set_epoch(1)
    assert same(list(other), epochs[1])
    other.set_epoch(0)
    next(iter(other))  # a pass that is broken off
    assert same(list(other), epochs[0]) and same(list(other), epochs[1])
    assert not same(list(make(seed=6)), epochs[0])


def test_the_number_of_workers_changes_nothing(torchvision):
    assert same(list(large(3)), list(large_with_workers(3)))


def test_from_any_batch_the_rest_is_the_same(make):
    """Epoch 1, and behind it epoch 2."""
    loader, other = make(seed=5), make(seed=9)
    loader.set_epoch(1)
    batches, states = [], [loader.state_dict()]
    for given in loader:
        batches.append(given)
        states.append(pickle.loads(pickle.dumps(loader.state_dict())))
    assert [state["batch"] for state in states] == list(range(len(loader) + 1))
    assert loader.state_dict() | {"epoch": 2, "batch": 0} == loader.state_dict()
    after = list(loader)
    for state in states[1:]:
        other.load_state_dict(state)
        other.set_epoch(1)  # as a loop says before each epoch
        assert other.state_dict() == state
        assert same(list(other), batches[state["batch"] :])
    assert same(list(other), after)


def test_nothing_is_drawn_from_the_default_generator(make):
    before = torch.get_rng_state()
    list(make(seed=1))
    list(make())
    assert torch.equal(torch.get_rng_state(), before)


def test_skipped_images_are_not_read(torchvision):
    loader = large(seed=2)
    labels = [label % 100 for _, batch in loader for label in batch.tolist()]
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "batch": 2})
    loader.dataset.dataset.read.clear()
    list(loader)
    assert loader.dataset.dataset.read == labels[6:9]


def test_without_a_seed_torchs_decides_where_epoch_0_begins():
    loader = small()
    assert loader.state_dict() == {"seed": None, "epoch": 0, "batch": 0, "images": 10, "batch_size": 3}
    torch.manual_seed(1)
    first = list(loader)
    torch.manual_seed(2)
    second = list(loader)  # goes on with the training that it began
    loader.set_epoch(0)
    assert not same(list(loader), first)
    torch.manual_seed(1)
    loader.set_epoch(0)
    assert same(list(loader), first) and same(list(loader), second)
    assert same(list(small(seed=1)), first)


def test_a_loaded_state_brings_its_seed_for_all_epochs_behind():
    loader, other = small(seed=1), small(seed=2)
    state = loader.state_dict()
    assert state["seed"] is None
    expected = [list(loader), list(loader)]
    other.load_state_dict(state | {"seed": 1})
    assert same(list(other), expected[0]) and same(list(other), expected[1])


def test_taking_as_many_batches_as_there_are_is_a_whole_pass():
    loader = small(seed=1)
    epochs = [[given for _, given in zip(range(len(loader)), loader, strict=False)] for _ in range(2)]
    assert loader.state_dict()["epoch"] == 1 and not same(*epochs)


def test_every_image_comes_once_and_augmentation_is_of_its_place():
    first, second = ([labels.tolist() for _, labels in epoch] for epoch in (small(seed=1), small(seed=1, pad=0)))
    assert first == second and sorted(sum(first, [])) == list(range(10))
    assert [labels.tolist() for _, labels in small(seed=1, augment=False)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_channels_last(channels):
    for images, _ in small(seed=1, channels=channels):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.stride() == (48 * channels, 1, 6 * channels, channels)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "this is no state of a loader: expected what its state_dict\\(\\) returned"),
        ({"seed": 1}, "this is no state of a loader"),
        ({"images": 11}, "of 11 images in batches of 3, this one has 10 in batches of 3: give it the same data and"),
        ({"batch_size": 4}, "of 10 images in batches of 4, this one has 10 in batches of 3"),
        ({"batch": 5}, "the state's batch must be from 0 to 4, given 5"),
        ({"epoch": -1}, "the state's epoch must be a whole number of at least 0, given -1"),
        ({"seed": "1"}, "seed must be a whole number from"),
    ],
)
def test_a_state_of_something_else_is_refused(state, message):
    loader = small(seed=1)
    next(iter(loader))
    before = loader.state_dict()
    if state and len(state) == 1 and state != {"seed": 1}:
        state = before | state
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict(state)
    assert loader.state_dict() == before


@pytest.mark.parametrize("epoch", [-1, 1.5, True, None])
def test_what_is_no_epoch(epoch):
    with pytest.raises(ValueError, match="epoch must be a whole number of at least 0, given"):
        small().set_epoch(epoch)


@pytest.mark.parametrize("seed", ["1", 1.0, 2**64])
def test_what_is_no_seed(seed):
    with pytest.raises(ValueError, match="seed must be a whole number from"):
        small(seed)


def test_seeds_of_places_near_each_other_differ():
    places = [(seed, epoch, image) for seed in (0, 1) for epoch in range(10) for image in range(100)]
    assert len({seed_at(*place) % 2**32 for place in places}) == len(places)
    assert seed_at(1, 2) == 10285946319064981719 and 0 <= seed_at(-(2**63), 5) < 2**64
