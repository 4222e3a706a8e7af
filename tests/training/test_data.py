import numpy as np
import pytest
import torch

from core.diffusion.base import Base
from core.errors import Invalid
from core.training.data import batch_indices, batch_order, prepare
from tests.training.jobs import CLASSES, make_data, make_images


def test_flips_are_encoded_beside_the_images(base: Base):
    data = make_data(base, flip=True)
    assert data.mean.shape == (24, 2, 3, 8, 8)
    assert torch.equal(data.mean[:, 1], data.mean[:, 0].flip(-1))
    assert make_data(base, flip=False).mean.shape == (24, 1, 3, 8, 8)


def test_a_tenth_of_each_class_is_held_out_where_it_has_five(base: Base):
    images, _ = make_images(base, per_class=20)
    labels = [0] * 30 + [1] * 5 + [2] * 4 + [0] * 21
    data = prepare(base, images, labels, CLASSES, seed=3, flip=False)
    held = data.labels[data.held_out].bincount(minlength=3)
    assert held.tolist() == [5, 1, 0]
    assert sorted([*data.train.tolist(), *data.held_out.tolist()]) == list(range(60))
    again = prepare(base, images, labels, CLASSES, seed=3, flip=False)
    other = prepare(base, images, labels, CLASSES, seed=4, flip=False)
    assert torch.equal(data.held_out, again.held_out)
    assert not torch.equal(data.held_out, other.held_out)


def test_each_epoch_shows_every_image_once(base: Base):
    data = make_data(base)
    count = len(data.train)
    seen = torch.cat([batch_indices(data, 5, step, 4) for step in range(count)])
    for epoch in range(4):
        assert sorted(seen[epoch * count : (epoch + 1) * count].tolist()) == data.train.tolist()
    assert not torch.equal(batch_order(5, 0, count), batch_order(5, 1, count))
    first = batch_order(5, 0, count)
    batch_order.cache_clear()
    assert torch.equal(batch_order(5, 0, count), first)


def test_a_batch_may_be_larger_than_the_dataset(base: Base):
    data = make_data(base, per_class=1)
    assert batch_indices(data, 0, 0, 16).bincount().max() == 6


def test_the_digest_is_of_everything_that_shapes_the_data(base: Base):
    images, labels = make_images(base)
    digest = prepare(base, images, labels, CLASSES, 0, False).digest
    changed = images.copy()
    changed[0, 0, 0, 0] ^= 1
    others = [
        prepare(base, changed, labels, CLASSES, 0, False),
        prepare(base, images, labels[::-1], CLASSES, 0, False),
        prepare(base, images, labels, ("a", "b", "c"), 0, False),
        prepare(base, images, labels, CLASSES, 1, False),
        prepare(base, images, labels, CLASSES, 0, True),
    ]
    assert len({digest, *(other.digest for other in others)}) == 6
    assert prepare(base, images, labels, CLASSES, 0, False).digest == digest


def test_posteriors_of_a_vae_keep_their_spread(latent_base: Base):
    data = make_data(latent_base, per_class=2)
    assert data.mean.shape == (6, 1, 4, 8, 8)
    assert (data.deviation > 0).all()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), [0, 0], "uint8"),
        (np.zeros((2, 8, 9, 3), np.uint8), [0, 0], r"\(N, s, s, 3\)"),
        (np.zeros((2, 9, 9, 3), np.uint8), [0, 0], "does not divide"),
        (np.zeros((2, 8, 8, 3), np.uint8), [0], "2 images and 1 labels"),
        (np.zeros((2, 8, 8, 3), np.uint8), [0, 3], "outside of the 3 classes"),
        (np.zeros((0, 8, 8, 3), np.uint8), [], "0 images"),
    ],
)
def test_data_that_cannot_be_is_refused(base: Base, images: np.ndarray, labels: list[int], message: str):
    with pytest.raises(Invalid, match=message):
        prepare(base, images, labels, CLASSES, 0, False)
