"""A second family through the same seam: PixArt, conditioned on prompts, adapts, trains, saves, loads and draws."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline

from core.adapters import format as adapter_format
from core.adapters.format import CorruptAdapter, WrongBase
from core.diffusion.adapter import Adapter
from core.diffusion.bank import AdapterBank
from core.diffusion.base import Base
from core.diffusion.catalog import base_summary, fingerprint
from core.diffusion.families import load_base
from core.diffusion.families.pixart import PixArtBase
from core.diffusion.fold import fold
from core.errors import Invalid
from core.sampling.engine import Engine
from core.sampling.request import AdapterPart, SampleRequest
from core.training import checkpoint
from core.training.continuing import continued, read_adapter, read_checkpoint
from core.training.data import TrainingData, prepare
from core.training.loop import finish, fit, start, validation_loss
from core.training.machine import numeric_path
from core.training.spec import POINTER, TrainSpec, resolve
from tests.diffusion.tiny import make_pixart
from tests.training.jobs import CLASSES, make_images

STEPS = 5
PROMPTS = ["disc", "a red fox", ""]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "told of sizes"])
def any_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pixart(tmp_path_factory.mktemp("pixart") / "base", sizes=request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pixart(tmp_path_factory.mktemp("pixart") / "base")


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(folder)


@pytest.fixture(scope="module")
def data(base: Base) -> TrainingData:
    images, labels = make_images(base)
    return prepare(base, images, labels, CLASSES, 0, flip=False)


def spec_of(base: Base, **asked: object) -> TrainSpec:
    given = {"steps": 60, "batch_size": 8, "learning_rate": 0.01, "validation_every": 100, **asked}
    return resolve(given, images=24, classes=len(CLASSES), base=base.summary, seed=0)


def some_adapter(base: Base, strength: float = 0.1, seed: int = 1) -> Adapter:
    zero = Adapter.zero(base.widest_layout(), base, ["disc", "a red fox"])
    zero.theta.normal_(0, strength, generator=torch.Generator().manual_seed(seed))
    return zero


def inputs(base: Base) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(7)), torch.tensor([0, 37, 999])


def c_rows_of(base: Base) -> torch.Tensor:
    return base.class_starts(base.start_indices(PROMPTS[:2], (None, None)))


def test_zero_is_diffusers_own_forward_bit_for_bit(any_folder: Path):
    base, pipe = load_base(any_folder), PixArtAlphaPipeline.from_pretrained(any_folder)
    embeddings, mask, _, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    x, t = inputs(base)
    told = {"resolution": torch.tensor([[32.0, 32.0]] * 3), "aspect_ratio": torch.ones(3, 1)}
    layout = base.widest_layout()
    c_rows = torch.cat([embeddings, mask[..., None].float()], dim=2).flatten(1)
    with torch.no_grad():
        wanted = pipe.transformer(
            x, encoder_hidden_states=embeddings, encoder_attention_mask=mask, timestep=t, added_cond_kwargs=told
        ).sample
        for theta in (None, torch.zeros(3, layout.size), torch.zeros(layout.size)):
            assert torch.equal(base.forward(x, t, theta, c_rows, layout), wanted)
        torch.testing.assert_close(base.forward(x, t, None, c_rows_of(base)), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted[0], wanted[2])


def test_every_entry_of_the_widest_layout_changes_the_output_of_its_own_row_alone(base: Base):
    layout = base.widest_layout()
    names = set(layout.by_name)
    assert {
        "transformer_blocks.1.attn1.gamma",
        "transformer_blocks.1.attn2.gamma",
        "transformer_blocks.1.ff.gamma",
    } <= names
    assert {"transformer_blocks.0.scale_shift_table", "scale_shift_table", "caption_projection.linear_2.bias"} <= names
    assert "transformer_blocks.1.attn2.gamma" not in base.layout().by_name  # the first half alone
    x, t = inputs(base)
    c_rows = c_rows_of(base)
    with torch.no_grad():
        zero = base.forward(x, t, None, c_rows)
        for entry in layout.entries:
            if entry.name.endswith("to_k.bias"):
                continue  # a shift of all keys cancels in the softmax
            rows = torch.zeros(3, layout.size)
            rows[1, entry.offset : entry.offset + entry.size] = torch.linspace(0.5, 1.5, entry.size)
            changed = base.forward(x, t, rows, c_rows, layout)
            assert not torch.allclose(changed[1], zero[1]), entry.name
            assert torch.equal(changed[0], zero[0]), entry.name


def test_a_folded_adapter_equals_the_unfolded_one(base: Base, folder: Path):
    own, adapter = load_base(folder), some_adapter(base)
    fold(own, adapter)
    x, t = inputs(base)
    c_rows = c_rows_of(base)
    with torch.no_grad():
        unfolded = base.forward(x, t, adapter.theta.expand(3, -1), c_rows, adapter.layout)
        folded = own.forward(x, t, None, c_rows)
    assert float((folded - unfolded).abs().max()) <= 1e-5 * float(unfolded.abs().max())


@pytest.mark.parametrize("rows", ["row", "fused"])
def test_it_trains_and_its_table_is_empty(base: Base, data: TrainingData, rows):
    spec = spec_of(base)
    before = validation_loss(base, data, spec, start(base, data, spec))
    weights = {name: value.clone() for name, value in base.network.state_dict().items()}
    *_, last = fit(base, data, spec, path=numeric_path(base, spec, rows))
    after = validation_loss(base, data, spec, last.state)
    assert before is not None
    assert after is not None
    assert after < 0.8 * before
    assert all(torch.equal(value, weights[name]) for name, value in base.network.state_dict().items())
    adapter = finish(last.state, base, spec, data)
    assert adapter.class_delta.shape == (len(CLASSES) + 1, 0)
    assert adapter.parameter_count == len(adapter.theta) == base.layout().size


@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
def test_a_job_goes_on_from_what_another_left(base: Base, data: TrainingData, kind: str):
    spec = spec_of(base, steps=3)
    *_, last = fit(base, data, spec)
    if kind == "adapter":
        source = read_adapter(adapter_format.save(finish(last.state, base, spec, data)), base, spec)
    else:
        kept = checkpoint.dump(last.state, spec.digest, data.digest, numeric_path(base, spec))
        source = read_checkpoint(kept, base, spec, data.classes)
    state = continued(base, data, spec, source)
    assert torch.equal(state.vector, last.state.average)
    assert (state.step, bool(state.first.any()), state.class_start) == (0, False, (None,) * len(CLASSES))


def test_its_file_loads_again_and_refuses_what_it_does_not_fit(base: Base, tmp_path: Path):
    adapter = some_adapter(base)
    kept = adapter_format.save(adapter)
    back = adapter_format.load(kept, base.fingerprint, adapter.layout)
    assert torch.equal(back.theta, adapter.theta)
    assert back.classes == ("disc", "a red fox")
    assert adapter_format.save(back) == kept
    other = load_base(make_pixart(tmp_path / "other", seed=3))
    with pytest.raises(WrongBase):
        adapter_format.load(kept, other.fingerprint)
    with pytest.raises(CorruptAdapter, match="truncated"):
        adapter_format.load(kept[:-4], base.fingerprint)


def drawn(base: Base, adapters: dict[str, Adapter], requests: list[dict[str, object]]) -> np.ndarray:
    """By the engine that draws class-conditional bases too; picture i from seed i."""
    layout = base.widest_layout()
    engine = Engine(base, layout, slots=8, max_rows=8, load_adapter=adapters.__getitem__)
    common = {"steps": STEPS, "solver": "ddim", "guidance": "none"}
    try:
        futures = [
            engine.submit(SampleRequest(id=str(number), tenant="t", **{**common, "seed": number, **asked}))  # pyright: ignore
            for number, asked in enumerate(requests)
        ]
        while not all(future.done() for future in futures):
            if not engine.step():
                engine.wait(0.05)
        return np.stack([future.result().image for future in futures])
    finally:
        engine.close()


@pytest.mark.parametrize(("guidance", "scale"), [("none", 1.0), ("cfg", 3.0)])
def test_the_engine_draws_what_diffusers_pipeline_draws(base: Base, folder: Path, guidance: str, scale: float):
    """With an adapter of zeros, whose classes are the prompts; its adapted neighbours in the batch change nothing."""
    adapters = {"zero": some_adapter(base, strength=0.0), "other": some_adapter(base)}
    asked = [
        {"adapters": (AdapterPart(digest, 1.0, label),), "guidance": guidance, "guidance_scale": scale}
        for digest, label in (("zero", 0), ("zero", 1), ("other", 0))
    ]
    ours = drawn(base, adapters, asked)
    pipe = PixArtAlphaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    noises = [torch.Generator().manual_seed(number) for number in range(2)]
    options = {"num_inference_steps": STEPS, "guidance_scale": scale, "use_resolution_binning": False}
    images = pipe(PROMPTS[:2], generator=noises, output_type="np", clean_caption=False, **options).images
    theirs = (255 * images).round().astype(int)
    assert np.abs(theirs - ours[:2]).max() <= 1
    alone = drawn(base, adapters, [{**asked[2], "seed": 0}])
    assert np.abs(alone[0].astype(int) - ours[0]).max() > 5  # the same noise and prompt, adapted


def test_domain_guidance_and_mixes_run_through_the_same_engine(base: Base):
    adapters = {"one": some_adapter(base, seed=1), "two": some_adapter(base, seed=2)}
    both = (AdapterPart("one", 0.5, 1), AdapterPart("two", 0.5, 1))
    one = (AdapterPart("one", 1.0, 1),)
    asked = [{"adapters": parts, "seed": 3} for parts in (one, both)]
    asked += [{"adapters": one, "seed": 3, "guidance": "domain", "guidance_scale": 2.0}, {"seed": 3}]
    pictures = drawn(base, adapters, asked)
    assert len({picture.tobytes() for picture in pictures}) == 4
    mixed = drawn(base, adapters, [{"adapters": (AdapterPart("one", 0.5, 1), AdapterPart("one", 0.5, 1)), "seed": 3}])
    assert np.abs(mixed[0].astype(int) - pictures[0]).max() <= 1


def test_prompts_lie_beside_the_base_where_there_is_no_text_encoder(base: Base, folder: Path, tmp_path: Path):
    assert isinstance(base, PixArtBase)
    kept = {text: base._encode(text).clone() for text in PROMPTS}
    bare = make_pixart(tmp_path / "bare", encoder=False, prompts={"Disc ": kept["disc"], "": kept[""]})
    own = load_base(bare)
    assert torch.equal(
        own.class_starts(own.start_indices(["disc"], [None])), base.class_starts(base.start_indices(["disc"], [None]))
    )
    bank = AdapterBank(own.layout(), own, slots=2)
    with pytest.raises(Invalid, match=r"no text encoder.*'a red fox'") as caught:
        bank.load(1, Adapter.zero(own.layout(), own, ["disc", "a red fox"]))
    assert caught.value.code == "unknown_prompt"
    assert not bank.is_loaded(1)
    bank.load(1, Adapter.zero(own.layout(), own, ["disc"]))
    assert fingerprint(bare) != fingerprint(folder)
    (bare / "prompts" / "prompts.safetensors").unlink()
    assert fingerprint(bare) != own.fingerprint  # prompts are part of what is frozen
    with pytest.raises(Invalid, match="no prompt ''"):
        load_base(bare)


def test_a_text_base_has_no_classes_of_its_own(base: Base, folder: Path):
    summary = base_summary(folder)
    assert (summary.conditioning, summary.num_classes, summary.id2label) == ("text", 0, {})
    assert (summary.image_size, summary.learned_sigma, summary.licence) == (32, True, "cc0-1.0")
    with pytest.raises(Invalid) as caught:
        spec_of(base, class_start="best")
    assert caught.value.pointer == f"{POINTER}/class_start"
    with pytest.raises(Invalid, match="has prompts"):
        base.start_indices(["disc"], [0])


def test_a_pickled_text_encoder_is_not_opened(folder: Path, tmp_path: Path):
    copy = tmp_path / "pickled"
    shutil.copytree(folder, copy)
    weights = copy / "text_encoder" / "model.safetensors"
    weights.rename(copy / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(Invalid, match=r"pytorch_model\.bin is a pickle"):
        load_base(copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    with pytest.raises(Invalid, match="PixArtAlphaPipeline"):
        load_base(copy)
