"""Fixtures of every folder that draws or trains: tiny bases, and torch on one thread. A conftest imports them."""

from pathlib import Path

import pytest
import torch

from core.diffusion.base import Base
from core.diffusion.families import load_base
from tests.diffusion.tiny import make_pipeline


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pixel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("bases") / "pixel-dit", vae=False)


@pytest.fixture(scope="session")
def latent_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("bases") / "latent-dit", learned_sigma=True)


@pytest.fixture(scope="session")
def base(pixel_folder: Path) -> Base:
    return load_base(pixel_folder)


@pytest.fixture(scope="session")
def latent_base(latent_folder: Path) -> Base:
    return load_base(latent_folder)
