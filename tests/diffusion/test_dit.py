"""The DiT family: zero is the base bit for bit, the copies of the embedders are one, the counts are the paper's."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from core.diffusion.base import Base
from core.diffusion.catalog import base_summary, fingerprint
from core.diffusion.families import load_base
from core.diffusion.families.dit import make_dit
from core.diffusion.layout import GAMMA_PLACES
from core.diffusion.schedule import Schedule
from core.errors import Invalid, NotFound
from tests.diffusion.tiny import make_adapter, make_pipeline, make_transformer


def inputs(base: Base, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, base.channels, base.sample_size, base.sample_size, generator=generator)
    return x, torch.tensor([0, 37, 999])[:rows], torch.tensor([0, 3, 4])[:rows]


def unmodified(folder: Path) -> DiTTransformer2DModel:
    return DiTTransformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False).eval()


@pytest.mark.parametrize("which", ["pixel_folder", "latent_folder"])
@pytest.mark.parametrize("rows", ["none", "per row", "shared"])
def test_zero_is_diffusers_own_forward_bit_for_bit(which: str, rows: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(which)
    base = load_base(folder)
    x, t, labels = inputs(base)
    size = base.widest_layout().size
    theta = {"none": None, "per row": torch.zeros(3, size), "shared": torch.zeros(size)}[rows]
    layout = base.widest_layout()
    with torch.no_grad():
        wanted = unmodified(folder)(x, timestep=t, class_labels=labels).sample
        assert torch.equal(base.forward(x, t, theta, base.class_table[labels], layout), wanted)
        assert torch.equal(base.forward(x, t, None, base.class_table[labels]), wanted)


def test_affine_norms_are_adapted_too(tmp_path: Path):
    folder = make_pipeline(tmp_path / "affine", vae=False, affine_norms=True)
    base = load_base(folder)
    x, t, labels = inputs(base)
    layout = base.layout()
    assert "transformer_blocks.0.norm3.weight" in layout.by_name
    rows = torch.zeros(3, layout.size)
    with torch.no_grad():
        zero = base.forward(x, t, rows, base.class_table[labels])
        assert torch.equal(zero, unmodified(folder)(x, timestep=t, class_labels=labels).sample)
        entry = layout.by_name["transformer_blocks.0.norm3.weight"]
        rows[1, entry.offset : entry.offset + entry.size] = 0.5
        changed = base.forward(x, t, rows, base.class_table[labels])
    assert [torch.equal(changed[i], zero[i]) for i in range(3)] == [True, False, True]


def test_an_adapter_equals_weights_with_its_offsets_and_scales_folded_in(pixel_folder: Path, base: Base):
    layout = base.widest_layout()
    adapter = make_adapter(base, layout=layout)
    values = layout.split(adapter.theta)
    model = unmodified(pixel_folder)
    with torch.no_grad():
        for name, value in values.items():
            if not name.endswith(".bias"):
                continue
            if name.startswith("conditioning."):
                for block in model.transformer_blocks:
                    block.norm1.emb.get_parameter(name.removeprefix("conditioning.")).add_(value)
            else:
                model.get_parameter(name).add_(value)
        for name, value in values.items():
            if name.endswith(".gamma"):
                path = name.removesuffix(".gamma")
                path = {"attn1": f"{path}.to_out.0", "ff": f"{path}.net.2"}.get(path.rsplit(".", 1)[-1], path)
                module = model.get_submodule(path)
                module.weight.mul_(1 + value[:, None])
                module.bias.mul_(1 + value)
        x, t, labels = inputs(base)
        folded = model(x, timestep=t, class_labels=labels).sample
        rows = adapter.theta.expand(3, -1)
        torch.testing.assert_close(
            base.forward(x, t, rows, base.class_table[labels], layout), folded, rtol=1e-4, atol=1e-4
        )
        shared = base.forward(x, t, adapter.theta, base.class_table[labels], layout)
        torch.testing.assert_close(shared, folded, rtol=1e-4, atol=1e-4)


def test_every_entry_of_the_widest_layout_changes_the_output_of_its_own_row_alone(base: Base):
    layout = base.widest_layout()
    x, t, labels = inputs(base)
    c_rows = base.class_table[labels]
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


def test_nothing_of_an_adapter_stays_in_the_base_after_a_forward_that_fails(base: Base):
    x, t, labels = inputs(base)
    with torch.no_grad():
        before = base.forward(x, t, None, base.class_table[labels])
        with pytest.raises(RuntimeError):
            base.forward(x, t, torch.ones(2, base.layout().size), base.class_table[labels])
        assert torch.equal(base.forward(x, t, None, base.class_table[labels]), before)


def test_copies_of_the_embedders_that_differ_are_refused_by_their_block(tmp_path: Path):
    folder = make_pipeline(tmp_path / "untied", vae=False, equal_copies=False)
    with pytest.raises(Invalid, match=r"transformer_blocks\.1\.norm1\.emb\.timestep_embedder"):
        load_base(folder)


def test_dit_xl_2_counts_to_the_parameter(pixel_folder: Path):
    with torch.device("meta"):
        transformer = DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, patch_size=2
        )
    summary = replace(base_summary(pixel_folder), layers=28, hidden=1152, num_classes=1000, channels=4)
    base = make_dit(summary, transformer, Schedule.from_config({}), device="meta")
    assert base.layout().parameter_count(101) == 639_392
    with_qkv = base.layout(gamma_places=["attention", "mlp", "qkv", "projection"])
    assert with_qkv.parameter_count(101) == 703_904
    assert base.layout(gamma_places=GAMMA_PLACES).parameter_count(101) == 768_416
    assert base.layout("bitfit").parameter_count(101) == 607_136
    names = base.layout().by_name
    for name in ("pos_embed.proj.bias", "conditioning.timestep_embedder.linear_1.bias", "proj_out_2.bias"):
        assert name in names
    assert {"transformer_blocks.13.ff.gamma", "transformer_blocks.13.attn1.gamma"} <= set(names)
    assert "transformer_blocks.14.ff.gamma" not in names


def test_the_base_says_what_it_is(latent_folder: Path, latent_base: Base):
    assert (latent_base.image_size, latent_base.sample_size, latent_base.channels) == (32, 8, 4)
    assert (latent_base.learned_sigma, latent_base.prediction, latent_base.num_classes) == (True, "epsilon", 4)
    assert latent_base.id2label[2] == "star"
    assert latent_base.licence == "cc0-1.0"
    assert latent_base.class_table.shape == (5, 16)
    tied = sum(parameter.numel() for parameter in latent_base.network.parameters()) + latent_base.class_table.numel()
    assert latent_base.summary.parameters == tied
    assert torch.equal(latent_base.schedule.alphas_cumprod, DDIMScheduler().alphas_cumprod.sqrt() ** 2)


def test_the_summary_needs_no_torch(latent_folder: Path):
    code = "import sys; from core.diffusion.catalog import base_summary; s = base_summary(sys.argv[1])\n"
    code += "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules; print(s.fingerprint)"
    done = subprocess.run([sys.executable, "-c", code, str(latent_folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint(latent_folder)


def test_the_fingerprint_is_of_the_bytes(latent_folder: Path, tmp_path: Path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(latent_folder, copy)
    assert fingerprint(copy) == fingerprint(latent_folder)
    (copy / "README.md").write_text("another card")
    assert fingerprint(copy) == fingerprint(latent_folder)
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(copy) != fingerprint(latent_folder)


def test_a_folder_that_is_no_base_is_refused_by_what_is_missing(latent_folder: Path, tmp_path: Path):
    with pytest.raises(NotFound, match=r"no such folder"):
        load_base("nowhere")
    with pytest.raises(NotFound, match=r"model_index\.json is missing"):
        load_base(tmp_path)
    copy = tmp_path / "pickled"
    shutil.copytree(latent_folder, copy)
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(Invalid, match=r"diffusion_pytorch_model\.bin is a pickle"):
        load_base(copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    with pytest.raises(Invalid, match="FluxPipeline"):
        load_base(copy)


def test_images_survive_the_pixel_codec_exactly(base: Base):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    mean, std = base.encode(images)
    assert mean.shape == (5, 3, 8, 8)
    assert not std.any()
    assert np.array_equal(base.decode(mean), images)


def test_latents_are_scaled_as_the_vae_says(latent_base: Base):
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    mean, std = latent_base.encode(images)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = latent_base.vae.encode(x).latent_dist
    torch.testing.assert_close(mean, posterior.mean * 0.18215)
    torch.testing.assert_close(std, posterior.std * 0.18215)
    assert latent_base.decode(mean).shape == (2, 32, 32, 3)


def test_weights_stored_in_half_run_in_full(tmp_path: Path):
    base = load_base(make_pipeline(tmp_path / "half", half=True))
    assert {parameter.dtype for parameter in base.network.parameters()} == {torch.float32}
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    mean, _ = base.encode(images)
    with torch.no_grad():
        out = base.forward(mean, torch.tensor([1, 2]), None, base.class_table[:2])
    assert out.dtype == mean.dtype == torch.float32
    assert base.decode(out).dtype == np.uint8


def test_a_base_takes_twice_its_own_size(base: Base):
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert base.forward(x, torch.tensor([5]), None, base.class_table[:1]).shape == (1, 3, 16, 16)


def test_the_builder_makes_learned_sigma_transformers():
    assert make_transformer(learned_sigma=True).config["out_channels"] == 8


@pytest.mark.parametrize("scale", [1, 1.5, 2])
def test_positions_of_a_larger_picture_lie_between_those_of_the_bases_own(base: Base, scale: float):
    """(i/s, j/s) for s times the base's size, arXiv 2304.06648: the same sines, evaluated at these places."""
    grid, hidden = int(scale * 4), base.hidden
    embed = base.network.transformer.pos_embed
    with torch.no_grad():
        zero = torch.zeros(1, base.channels, 2 * grid, 2 * grid)
        found = (embed(zero) - embed.proj(zero).flatten(2).transpose(1, 2)).view(grid, grid, hidden)
    places = torch.arange(grid) / scale
    frequencies = 10_000.0 ** -(torch.arange(hidden // 4) / (hidden // 4))
    angles = places[:, None] * frequencies
    along = torch.cat([angles.sin(), angles.cos()], dim=1)  # (g, H/2)
    wanted = torch.cat([along.expand(grid, -1, -1), along[:, None].expand(-1, grid, -1)], dim=2)  # x, then y
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert scale == 1 or not torch.allclose(found[1, 0], embed.pos_embed[0].view(4, 4, hidden)[1, 0], atol=1e-2)
