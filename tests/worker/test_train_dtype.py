"""What type jobs train in: the settings decide for a job that begins, its own record for one that goes on."""

import pytest
import torch

from core.diffusion.products import is_quick_at_bfloat16
from tests.worker.shop import MODEL, Shop
from worker import runtime as runtime_module


def trained_in(shop: Shop, job_id: str) -> str:
    return (shop.get_job(job_id).numeric_path or {})["dtype"]


def test_jobs_train_in_bfloat16_where_the_device_is_quick_at_it(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module, "is_quick_at_bfloat16", lambda device: True)
    quick = shop.job(steps=2)
    shop.pump()
    monkeypatch.setattr(runtime_module, "is_quick_at_bfloat16", lambda device: False)
    slow = shop.job(steps=2)
    shop.pump()
    assert (trained_in(shop, quick), trained_in(shop, slow)) == ("bfloat16", "float32")
    [adapter] = shop.adapters(quick)
    picture = shop.sample(adapter.id)
    shop.pump()
    assert shop.get_sample(picture).status == "succeeded"


def test_pictures_are_drawn_in_float32_from_the_one_codec(shop: Shop) -> None:
    shop.services.settings.train_dtype = "bfloat16"
    drawing, training = shop.runtime.device(MODEL).base, shop.runtime.training_base(MODEL, None)
    assert (drawing.dtype, training.dtype) == (torch.float32, torch.bfloat16)
    assert training.vae is drawing.vae
    assert training.fingerprint == drawing.fingerprint
    assert shop.runtime.training_base(MODEL, None) is training


def test_a_base_is_held_once_where_it_trains_and_draws_in_one_type(shop: Shop) -> None:
    shop.services.settings.train_dtype = "float32"
    assert shop.runtime.training_base(MODEL, None) is shop.runtime.device(MODEL).base


@pytest.mark.parametrize(("first", "then"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_job_goes_on_in_the_type_that_it_began_in(shop: Shop, first: str, then: str) -> None:
    shop.services.settings.train_dtype = first  # pyright: ignore[reportAttributeAccessIssue]
    whole = shop.job()
    shop.pump()
    killed = shop.job()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFFIT_TRAIN_DTYPE", first)
        assert shop.pump_elsewhere("after_step:9:kill") == -9
    shop.lose_leases()
    shop.services.settings.train_dtype = then  # pyright: ignore[reportAttributeAccessIssue]
    shop.pump()
    assert trained_in(shop, killed) == first
    assert shop.adapters(killed)[0].sha256 == shop.adapters(whole)[0].sha256


def test_a_compiled_job_goes_on_compiled(shop: Shop) -> None:
    shop.services.settings.compile = True
    whole = shop.job()
    shop.pump()
    killed = shop.job()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFFIT_COMPILE", "true")
        assert shop.pump_elsewhere("after_step:9:kill") == -9
    shop.lose_leases()
    shop.services.settings.compile = False
    shop.pump()
    for job in (whole, killed):
        assert (shop.get_job(job).numeric_path or {})["compiled"] is True
    assert shop.adapters(killed)[0].sha256 == shop.adapters(whole)[0].sha256


def test_a_cpu_that_multiplies_bfloat16_itself_is_quick_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_there in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda there=is_there: {"avx512_bf16": there})
        assert is_quick_at_bfloat16(torch.device("cpu")) is is_there
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict[str, bool])
    assert is_quick_at_bfloat16(torch.device("cpu")) is False
