import pytest

from core.diffusion.base import Base
from core.diffusion.families import load_base
from core.settings import PACKAGED_BASE
from tests.diffusion.bases import base, latent_base, latent_folder, one_thread, pixel_folder
from tests.diffusion.tiny import make_pipeline

__all__ = ["base", "latent_base", "latent_folder", "one_thread", "pixel_folder"]


@pytest.fixture(scope="session")
def shipped_base() -> Base:
    return load_base(PACKAGED_BASE)


@pytest.fixture(scope="session")
def flow_base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(make_pipeline(tmp_path_factory.mktemp("bases") / "flow-dit", vae=False, flow=True))
