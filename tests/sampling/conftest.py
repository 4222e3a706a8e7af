import pytest
import torch

from core.diffusion.base import Base
from core.diffusion.families import load_base
from core.settings import PACKAGED_BASE
from tests.diffusion.tiny import make_pipeline


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(make_pipeline(tmp_path_factory.mktemp("bases") / "pixel-dit", vae=False))


@pytest.fixture(scope="session")
def latent_base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(make_pipeline(tmp_path_factory.mktemp("bases") / "latent-dit", learned_sigma=True))


@pytest.fixture(scope="session")
def shipped_base() -> Base:
    return load_base(PACKAGED_BASE)


@pytest.fixture(scope="session")
def flow_base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(make_pipeline(tmp_path_factory.mktemp("bases") / "flow-dit", vae=False, flow=True))
