"""Latents to pictures on a thread of its own: the device's next step does not wait for the codec."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
import structlog
import torch
from torch import Tensor

log = structlog.get_logger()

Deliver = Callable[[np.ndarray | Exception], None]


@dataclass(frozen=True)
class _Waiting:
    latent: Tensor  # (C, h, w)
    deliver: Deliver


class Decoder:
    """`decode` takes latents (N, C, h, w) of one size to images (N, s, s, 3) uint8; what waits is decoded together."""

    def __init__(self, decode: Callable[[Tensor], np.ndarray]) -> None:
        self._decode = decode
        self._lock = Lock()
        self._waiting: deque[_Waiting] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="decode")

    def put(self, latent: Tensor, deliver: Deliver) -> None:
        """`deliver` is called from the decoder's thread with the image (s, s, 3), or with what went wrong."""
        with self._lock:
            is_first = not self._waiting
            self._waiting.append(_Waiting(latent, deliver))
        if is_first:  # who finds others there knows that they have a run coming, which takes all
            self._pool.submit(self._run)

    def close(self) -> None:
        """Returns when everything that was put has been delivered."""
        self._pool.shutdown(wait=True)

    @torch.no_grad()
    def _run(self) -> None:
        with self._lock:
            waiting, self._waiting = list(self._waiting), deque()
        by_shape: dict[torch.Size, list[_Waiting]] = {}
        for one in waiting:
            by_shape.setdefault(one.latent.shape, []).append(one)
        for group in by_shape.values():
            try:
                images = list(self._decode(torch.stack([one.latent for one in group])))
            except Exception as error:  # whatever it is, nobody must wait for ever
                images = [error] * len(group)
            for one, image in zip(group, images, strict=True):
                try:
                    one.deliver(image)
                except Exception as error:  # the caller's own: the others still get theirs
                    log.error("picture.undelivered", exc_info=error)
