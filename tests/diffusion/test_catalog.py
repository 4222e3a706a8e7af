"""What is read of a base without torch, and where a base is looked for."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core.diffusion.catalog import base_summary, locate, weight_files
from core.errors import Invalid, NotFound
from tests.diffusion.tiny import make_pipeline


def copy_of(folder: Path, to: Path, part: str, **changes: Any) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / part).read_text())
    (to / part).write_text(json.dumps({**config, **changes}))
    return to


def test_a_summary_is_the_folders(latent_folder: Path):
    summary = base_summary(latent_folder)
    assert (summary.name, summary.hidden, summary.layers, summary.patch_size) == ("latent-dit", 16, 4, 2)
    assert summary.id2label == {0: "circle", 1: "square", 2: "star", 3: "heart"}
    assert base_summary(latent_folder, "another").name == "another"
    assert len(summary.fingerprint) == 64


def test_twice_the_channels_are_a_variance_but_of_a_flow(tmp_path: Path):
    """The bound that trains a variance is of noise schedules; a flow's second half is left alone."""
    said = [
        base_summary(make_pipeline(tmp_path / f"{flow}-{wide}", vae=False, learned_sigma=wide, flow=flow)).learned_sigma
        for flow in (False, True)
        for wide in (False, True)
    ]
    assert said == [False, True, False, False]


def test_the_licence_is_the_cards(tmp_path: Path):
    folder = make_pipeline(tmp_path / "base", vae=False, licence=None)
    assert base_summary(folder).licence is None
    (folder / "README.md").write_text("# No front matter\nlicense: mit\n")
    assert base_summary(folder).licence is None
    (folder / "README.md").write_text('---\ntags: [dit]\nlicense: "apache-2.0"\n---\nlicense: mit\n')
    assert base_summary(folder).licence == "apache-2.0"


def test_the_bases_own_rate_is_its_records(tmp_path: Path):
    folder = make_pipeline(tmp_path / "base", vae=False)
    assert base_summary(folder).learning_rate is None
    (folder / "training.json").write_text('{"step": 500, "learning_rate": 0.001}')
    assert base_summary(folder).learning_rate == 0.001


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer/config.json", {"_class_name": "UNet2DModel"}, "UNet2DModel"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type 'sample'"),
    ],
)
def test_a_config_that_does_not_fit_is_named(
    latent_folder: Path, tmp_path: Path, part: str, changes: dict[str, Any], message: str
):
    with pytest.raises(Invalid, match=message):
        base_summary(copy_of(latent_folder, tmp_path / "b", part, **changes))


def test_a_config_that_is_no_json_object_is_named(latent_folder: Path, tmp_path: Path):
    folder = copy_of(latent_folder, tmp_path / "b", "model_index.json")
    for text in ("{", "[]"):
        (folder / "transformer" / "config.json").write_text(text)
        with pytest.raises(Invalid, match=r"transformer/config\.json"):
            base_summary(folder)


def test_a_weight_file_with_an_absurd_header_is_refused(latent_folder: Path, tmp_path: Path):
    folder = copy_of(latent_folder, tmp_path / "b", "model_index.json")
    [weights] = weight_files(folder / "transformer")
    weights.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(Invalid, match="no safetensors header"):
        base_summary(folder)


def test_a_hub_name_is_its_snapshot(latent_folder: Path, tmp_path: Path):
    """Against the hub's own cache layout, offline."""
    entry = tmp_path / "hub" / "models--somebody--latent-dit"
    shutil.copytree(latent_folder, entry / "snapshots" / "0123abcd")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0123abcd")
    code = (
        "from core.diffusion.families import load_base; b = load_base('somebody/latent-dit'); print(b.name, b.hidden)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["somebody/latent-dit", "16"]


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "too/many/parts"])
def test_a_base_that_is_nowhere_is_not_found(name: str):
    with pytest.raises(NotFound, match="no such folder"):
        locate(name)
