"""Adapt the base to images, then draw each of their classes. Needs a running service: `difffit up`.

python examples/quickstart.py examples/mnist_digits_32.zip --steps 60
"""

import argparse
from pathlib import Path

from client import DiffFit


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", help="a folder with one sub-folder a class, or a .zip, .tar or .tar.gz of it")
    parser.add_argument("--steps", type=int, help="default: chosen for the dataset")
    parser.add_argument("--out", type=Path, default=Path("quickstart"))
    asked = parser.parse_args()

    with DiffFit() as difffit:  # DIFFFIT_URL and DIFFFIT_API_KEY, or the service in .difffit
        file = difffit.files.wait(difffit.files.push(asked.images).id)
        hyperparameters = {"steps": asked.steps} if asked.steps else {}
        job = difffit.jobs.create(file.id, model=difffit.models.default_base().id, hyperparameters=hyperparameters)
        for event in difffit.jobs.events(job.id):
            print(event.message)
        job = difffit.jobs.get(job.id)
        if job.fine_tuned_model is None:
            raise SystemExit(f"{job.status}: {job.trouble}")

        asked.out.mkdir(parents=True, exist_ok=True)
        for name in difffit.models.get(job.fine_tuned_model).classes:
            drawn = difffit.images.generate(job.fine_tuned_model, name, seed=0)
            (asked.out / f"{name}.png").write_bytes(drawn.images[0].data)
        print(f"{job.fine_tuned_model} drew into {asked.out}")


if __name__ == "__main__":
    main()
