import numpy as np
import pytest
import torch

from lrf_nerfstudio.training.data import photo_crops as crops_module
from lrf_nerfstudio.training.data.photo_crops import PhotoCrops
from lrf_nerfstudio.utils.images import find_images


@pytest.fixture
def paths(photographs):
    return find_images([photographs])


def test_an_item_depends_on_its_number_and_the_seed_alone(paths):
    one, other = (PhotoCrops(paths, 32, 3.0, seed=3) for _ in range(2))
    for index in (0, 7, 2):
        other[index + 1]
        assert torch.equal(one[index]["image"], other[index]["image"])
    assert not torch.equal(one[0]["image"], one[1]["image"])
    assert not torch.equal(one[0]["image"], PhotoCrops(paths, 32, 3.0, seed=4)[0]["image"])
    assert one[0]["image"].shape == (32, 32, 3) and one[0]["image"].dtype == torch.float32


def test_photographs_come_up_equally_often_and_are_read_once_while_there_is_room(paths, monkeypatch):
    reads = []
    monkeypatch.setattr(crops_module, "read_image", lambda path: reads.append(path) or np.zeros((40, 40, 3), np.uint8))
    roomy = PhotoCrops(paths, 32, 1.0, images_in_memory=2)
    for index in range(40):
        roomy[index]
    assert sorted(reads) == paths
    reads.clear()
    narrow = PhotoCrops(paths, 32, 1.0, images_in_memory=0)
    for index in range(100):
        narrow[index]
    assert 30 < reads.count(paths[0]) < 70 and len(reads) == 100
