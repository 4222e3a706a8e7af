"""The same with the `openai` package, unchanged: only the base URL and the key differ. Needs `pip install openai`.

python examples/openai_client.py examples/mnist_digits_32.zip "digit-3" --steps 60
"""

import argparse
import base64
import os
import time
from pathlib import Path

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("archive", type=Path, help="a .zip, .tar or .tar.gz with one folder a class")
    parser.add_argument("prompt", help="a class to draw: the name of one of its folders")
    parser.add_argument("--steps", type=int, help="default: chosen for the dataset")
    parser.add_argument("--out", type=Path, default=Path("openai_client.png"))
    asked = parser.parse_args()
    url = os.environ.get("DIFFFIT_URL", "http://127.0.0.1:8321")
    key = os.environ.get("DIFFFIT_API_KEY") or Path(".difffit/api_key").read_text().strip()
    client = OpenAI(base_url=f"{url}/v1", api_key=key)

    file = client.files.create(file=asked.archive, purpose="fine-tune")
    base = next(model.id for model in client.models.list() if not model.id.startswith("ft:"))
    method = {"type": "difffit", "difffit": {"hyperparameters": {"steps": asked.steps or "auto"}}}
    job = client.fine_tuning.jobs.create(model=base, training_file=file.id, method=method)  # type: ignore[arg-type]
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=5).data):
        print(event.message)
    if job.fine_tuned_model is None:
        raise SystemExit(f"{job.status}: {job.error}")

    drawn = client.images.generate(
        model=job.fine_tuned_model, prompt=asked.prompt, response_format="b64_json", extra_body={"seed": 0}
    )
    asked.out.write_bytes(base64.b64decode((drawn.data or [])[0].b64_json or ""))
    print(f"{job.fine_tuned_model} drew {asked.out}")


if __name__ == "__main__":
    main()
