"""An adapter exported as a pipeline folder: unmodified diffusers loads it and draws what the engine draws."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel

from core.adapters import format as adapter_format
from core.diffusion.adapter import Adapter
from core.diffusion.base import Base
from core.diffusion.export import export, main
from core.diffusion.families import load_base
from core.sampling.engine import Engine
from core.sampling.request import AdapterPart, SampleRequest
from core.settings import PACKAGED_BASE
from tests.diffusion.tiny import make_adapter, make_pipeline

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scheduler = {"timestep_spacing": "trailing"}  # as the engine steps
    return make_pipeline(
        tmp_path_factory.mktemp("export") / "base", learned_sigma=True, affine_norms=True, scheduler=scheduler
    )


def adapter_of(base: Base, classes: int = 3, strength: float = 0.05) -> Adapter:
    layout = base.widest_layout()
    return make_adapter(base, layout=layout, classes=classes, class_start=(1, None, 2)[:classes], strength=strength)


def drawn(base: Base, adapter: Adapter | None, labels: list[int], **fields: object) -> np.ndarray:
    """By the engine; image i from seed i."""
    layout = base.widest_layout()
    engine = Engine(base, layout, slots=4, max_rows=8, load_adapter=lambda _: adapter)  # pyright: ignore
    try:
        futures = [
            engine.submit(
                SampleRequest(
                    id=str(number),
                    tenant="t",
                    seed=number,
                    label=None if adapter else label,
                    adapters=(AdapterPart("d", 1.0, label),) if adapter else (),
                    **{"steps": STEPS, "solver": "ddim", "guidance": "none", **fields},  # pyright: ignore
                )
            )
            for number, label in enumerate(labels)
        ]
        while not all(future.done() for future in futures):
            if not engine.step():
                engine.wait(0.05)
        return np.stack([future.result().image for future in futures])
    finally:
        engine.close()


def drawn_by_diffusers(folder: Path, labels: list[int], scale: float = 1.0, side: int | None = None) -> np.ndarray:
    pipe = DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if side is not None:
        pipe.transformer.register_to_config(sample_size=side)
    noises = [torch.Generator().manual_seed(number) for number in range(len(labels))]
    images = pipe(labels, generator=noises, guidance_scale=scale, num_inference_steps=STEPS, output_type="np").images
    return (255 * images).round().astype(np.uint8)


def differ(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference, in 1/255."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_diffusers_draws_the_same_pictures_within_one_step_of_eight_bits(folder: Path, tmp_path: Path):
    base = load_base(folder)
    adapter = adapter_of(base)
    to = export(adapter, folder, tmp_path / "out")
    ours, labels = drawn(base, adapter, [0, 1, 2]), [0, 1, 2]
    assert differ(drawn_by_diffusers(to, labels), ours) <= 1
    assert differ(drawn(base, None, labels), ours) > 10  # the negative control: the base draws something else
    assert json.loads((to / "model_index.json").read_text())["id2label"] == {
        "0": "class-0",
        "1": "class-1",
        "2": "class-2",
    }
    assert DiTPipeline.from_pretrained(to).get_label_ids(["class-2"]) == [2]
    assert (to / "README.md").read_text().startswith("---\nlicense: cc0-1.0\n---\n")


def test_the_shipped_base_too(tmp_path: Path):
    base = load_base(PACKAGED_BASE)
    adapter = adapter_of(base, strength=0.03)
    to = export(adapter, PACKAGED_BASE, tmp_path / "out")
    ours = drawn(base, adapter, [0, 2])
    assert differ(drawn_by_diffusers(to, [0, 2]), ours) <= 1
    assert differ(drawn(base, None, [0, 2]), ours) > 10


def test_every_block_of_the_exported_model_has_the_embedders_again(folder: Path, tmp_path: Path):
    base = load_base(folder)
    adapter = adapter_of(base)
    model = DiTTransformer2DModel.from_pretrained(export(adapter, folder, tmp_path / "out") / "transformer")
    starts = base.class_starts(base.start_indices(adapter.classes, adapter.class_start))
    for block in model.transformer_blocks:
        assert torch.equal(block.norm1.emb.class_embedder.embedding_table.weight, starts + adapter.class_delta)
        offset = adapter.layout.split(adapter.theta)["conditioning.timestep_embedder.linear_1.bias"]
        before = base.network.timestep_embedder.linear_1.inner.bias
        assert torch.equal(block.norm1.emb.timestep_embedder.linear_1.bias, before + offset)
    own = load_base(tmp_path / "out")  # and the service itself may take it for a base
    assert (own.num_classes, own.id2label[1]) == (3, "class-1")


def test_padded_to_imagenets_null_class_diffusers_guides_as_the_engine_does(folder: Path, tmp_path: Path):
    base = load_base(folder)
    adapter = adapter_of(base)
    to = export(adapter, folder, tmp_path / "out", pad=True)
    guided = drawn(base, adapter, [0, 2], guidance="cfg", guidance_scale=3.0)
    assert differ(drawn_by_diffusers(to, [0, 2], scale=3.0), guided) <= 2
    assert differ(drawn_by_diffusers(to, [0, 2]), guided) > 10


def test_an_adapter_of_twice_the_size_draws_there_too(folder: Path, tmp_path: Path):
    base = load_base(folder)
    adapter = replace(adapter_of(base), meta={"image_size": 64})
    to = export(adapter, folder, tmp_path / "out")
    assert "register_to_config(sample_size=16)" in (to / "README.md").read_text()
    assert differ(drawn_by_diffusers(to, [1], side=16), drawn(base, adapter, [1], size=64)) <= 1


def test_the_command_writes_the_folder_and_says_what_is_wrong(folder: Path, tmp_path: Path, capsys):
    base = load_base(folder)
    file = tmp_path / "a.safetensors"
    file.write_bytes(adapter_format.save(adapter_of(base)))
    ask = [str(file), "--base", str(folder), "--to", str(tmp_path / "out")]
    assert main(ask) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert main(ask) == 1
    assert "not an empty folder" in capsys.readouterr().err
    other = make_pipeline(tmp_path / "other", seed=5)
    assert main([str(file), "--base", str(other), "--to", str(tmp_path / "none")]) == 1
    assert "another base" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    file.write_bytes(b"PK\x03\x04 a pickle")
    assert main([str(file), "--base", str(folder), "--to", str(tmp_path / "none")]) == 1
    assert "pickle" in capsys.readouterr().err
