"""Pictures and previews from a thread of their own: they hold no step up, and one that fails harms nobody else."""

from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any

import numpy as np
import torch
from structlog.testing import capture_logs

from core.diffusion.base import Base
from core.sampling.decoder import Decoder
from tests.sampling.engines import draw, largest_difference, make_engine, make_request, make_shelf, run


def test_previews_show_what_is_expected_and_come_before_the_picture(base: Base):
    engine = make_engine(base, make_shelf(base))
    shown: list[tuple[int, np.ndarray]] = []
    item = make_request(1, adapter="adapter-0", steps=8, previews=(2, 7, 8))
    future = engine.submit(item, lambda step, image: shown.append((step, image)))
    run(engine)
    final = future.result(0).image.astype(int)
    assert [step for step, _ in shown] == [2, 7]  # the picture itself is the eighth
    early, late = (np.abs(image.astype(int) - final).mean() for _, image in shown)
    assert late < early
    [plain] = draw(engine, replace(item, id="r-2", previews=()))
    assert largest_difference([plain], [future.result(0)]) == 0


def test_a_preview_that_its_caller_cannot_take_harms_nobody(base: Base):
    engine = make_engine(base, make_shelf(base))

    def broken(step: int, image: np.ndarray) -> None:
        raise OSError("gone")

    future = engine.submit(make_request(1, previews=(1, 2)), broken)
    other = engine.submit(make_request(2))
    with capture_logs() as logs:
        run(engine)
    assert [line["event"] for line in logs] == ["picture.undelivered"] * 2
    assert future.result(0).stats.steps == other.result(0).stats.steps == 4


def test_decoding_holds_nobody_up(base: Base):
    """While a picture is being decoded others are put, and then decoded together."""
    held, begun = Event(), Event()
    counts: list[int] = []

    def slow(latents: torch.Tensor) -> np.ndarray:
        counts.append(len(latents))
        begun.set()
        assert held.wait(10)
        return base.decode(latents)

    decoder = Decoder(slow)
    latents = torch.randn(4, base.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    delivered: dict[int, Any] = {}
    for number, latent in enumerate(latents):
        decoder.put(latent, partial(delivered.__setitem__, number))
        assert begun.wait(10)
    assert (counts, delivered) == ([1], {})
    held.set()
    decoder.close()
    assert counts == [1, 3]
    for number, image in enumerate(base.decode(latents)):
        assert np.array_equal(image, delivered[number])


def test_what_cannot_be_decoded_fails_alone(base: Base):
    held = Event()

    def decode(latents: torch.Tensor) -> np.ndarray:
        assert held.wait(10)
        if latents.shape[-1] == 16:
            raise MemoryError
        return base.decode(latents)

    decoder = Decoder(decode)
    delivered: dict[int, Any] = {}
    for number, side in enumerate((8, 16, 8, 16)):
        decoder.put(torch.zeros(base.channels, side, side), partial(delivered.__setitem__, number))
    held.set()
    decoder.close()
    assert [isinstance(delivered[number], MemoryError) for number in range(4)] == [False, True, False, True]
