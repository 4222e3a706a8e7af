"""Write the base as a `DiTPipeline` folder: `python -m pretraining.export` from `.work`, averaged weights, float16."""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel

from pretraining.attribution import attribution
from pretraining.classes import CLASSES, ID2LABEL
from pretraining.data import STYLES, WORK, fetch_packages
from pretraining.dit import make_scheduler, untied
from pretraining.sample import contact_sheet
from pretraining.train import MODEL, STATE, Recipe, Run, averaged, resume

MAX_BYTES = 40 * 2**20


def write_pipeline(dit: DiTTransformer2DModel, vae: AutoencoderKL, folder: Path) -> None:
    """`model_index.json`, `transformer/`, `vae/`, `scheduler/`, as diffusers lays them out; at most 40 MiB."""
    pipeline = DiTPipeline(untied(dit), vae.half(), make_scheduler())
    pipeline.register_to_config(id2label={str(number): name for number, name in ID2LABEL.items()})
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # where it was loaded from: a path of the machine that trained it
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise ValueError(f"{folder.name} has {size} bytes, over {MAX_BYTES}")


def write_progress(run: Run, folder: Path) -> None:
    """How far these weights came, for a run that has only this folder, and the rate that jobs take ten times of."""
    told = {"step": run.step, "hours": round(run.seconds / 3600, 3), "learning_rate": run.recipe.rate}
    (folder / "training.json").write_text(json.dumps(told) + "\n")


def copies_are_equal(dit: DiTTransformer2DModel) -> bool:
    """Whether every block's embedder is bit for bit block 0's."""
    first = dit.transformer_blocks[0].norm1.emb.state_dict()
    return all(
        torch.equal(value, first[name])
        for block in dit.transformer_blocks
        for name, value in block.norm1.emb.state_dict().items()
    )


def check(folder: Path) -> None:
    """Load the folder with unmodified diffusers and draw one image of class 0; raises where that fails."""
    pipeline = DiTPipeline.from_pretrained(folder, dtype=torch.float32)
    if not copies_are_equal(pipeline.transformer):
        raise ValueError("the blocks' embedders differ")
    pipeline.set_progress_bar_config(disable=True)
    label = pipeline.get_label_ids([CLASSES[0].name])
    pipeline(label, guidance_scale=1.0, num_inference_steps=2, generator=torch.manual_seed(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=3.0, help="guidance of the contact sheet")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = resume(Recipe(), STATE)
    dit = averaged(run)
    shipped = MODEL / "vae"  # never replaced once there
    vae = AutoencoderKL.from_pretrained(shipped if shipped.is_dir() else WORK / "vae", dtype=torch.float32)
    write_pipeline(dit, vae, MODEL)
    write_progress(run, MODEL)
    check(MODEL)
    (MODEL / "ATTRIBUTION.md").write_text(attribution(fetch_packages(), STYLES))
    picture = contact_sheet(dit, vae.float(), make_scheduler(), range(len(CLASSES)), 8, 0, args.steps, args.scale)
    picture.save(MODEL / "contact_sheet.png", optimize=True)
    print((MODEL / "training.json").read_text())


if __name__ == "__main__":
    main()
