"""A rank's part of the images: dealt as torch's DistributedSampler deals them, and drawn for apart."""

import pytest
import torch
from torch.utils.data import DistributedSampler, TensorDataset

from auglocal_ext import data
from auglocal_ext.data.split import images_of_part, part_of


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize(("count", "ranks"), [(10, 2), (11, 2), (11, 4), (2, 5), (7, 1)])
def test_parts_are_those_of_torch(count, ranks, pad):
    order = torch.arange(count)
    for rank in range(ranks):
        found = part_of(order, (rank, ranks), pad)
        assert len(found) == images_of_part(count, (rank, ranks), pad)
        if pad:
            sampler = DistributedSampler(TensorDataset(order), ranks, rank, shuffle=False)
            assert found.tolist() == list(sampler)
    every = torch.cat([part_of(order, (rank, ranks), False) for rank in range(ranks)])
    assert every.sort().values.tolist() == order.tolist()


def loader(part, augment=True, count=11, **more):
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    given = images, torch.arange(count), 2, [0.0] * 3, [1.0] * 3
    return data.DeviceLoader(*given, augment=augment, seed=4, part=part, **more)


def labels_of(loader):
    return torch.cat([labels for _, labels in loader]).tolist()


def test_all_ranks_have_the_same_order_and_as_many_batches():
    whole, parts = loader((0, 1)), [loader((rank, 2)) for rank in range(2)]
    for _ in range(2):  # epochs
        order, dealt = labels_of(whole), [labels_of(part) for part in parts]
        assert [len(one) for one in dealt] == [6, 6] and [len(part) for part in parts] == [3, 3]
        assert dealt == [order[::2], order[1::2] + order[:1]]
    tested = [labels_of(loader((rank, 2), augment=False)) for rank in range(2)]
    assert tested == [list(range(0, 11, 2)), list(range(1, 11, 2))] and len(loader((1, 2), augment=False)) == 3


def test_what_is_drawn_differs_between_ranks():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 8, 8), generator=generator).to(torch.uint8)
    given = image.expand(8, -1, -1, -1), torch.zeros(8, dtype=torch.int64), 8, [0.0] * 3, [1.0] * 3
    options = {"augment": True, "pad": 2, "flip": True, "seed": 4}
    alone, first, second = (
        next(iter(data.DeviceLoader(*given, **options, part=part)))[0] for part in ((0, 1), (0, 2), (1, 2))
    )
    assert not torch.equal(first, second) and not torch.equal(alone[:4], second)


def test_a_part_goes_on_where_it_was():
    one, other = loader((1, 2)), loader((1, 2))
    batches = iter(one)
    next(batches)
    other.load_state_dict(one.state_dict())
    assert [labels.tolist() for _, labels in other] == [labels.tolist() for _, labels in batches]


def test_large_images_are_dealt_too(tmp_path, torchvision):
    from PIL import Image

    for split, count in (("train", 7), ("test", 5)):
        for index in range(count):
            path = tmp_path / split / f"class{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (100, 100), (index, 0, 0)).save(path)
    parts = [data.load(f"imagefolder:{tmp_path}", 2, image_size=8, seed=1, part=(rank, 2)) for rank in range(2)]
    assert [len(part.train) for part in parts] == [2, 2] and [len(part.test) for part in parts] == [2, 1]
    assert sum(len(labels) for part in parts for _, labels in part.train) == 8
    assert sum(len(labels) for part in parts for _, labels in part.test) == 5


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (2, r"part must be \(rank, ranks\), \(0, 1\) for all images, given 2"),
        ((2, 2), r"part must be \(rank, ranks\), rank from 0 to 1, given 2"),
        ((0, 0), r"part must be \(rank, ranks\), ranks a whole number of at least 1, given 0"),
    ],
)
def test_a_part_that_is_none_is_told(part, said):
    with pytest.raises(ValueError, match=said):
        loader(part)
