from pathlib import Path

import pytest

from client.api import DiffFit


@pytest.mark.parametrize(
    ("previews", "resolved"),
    [
        ({"every": 3, "images": 2, "steps": 5}, {"preview_every": 3, "preview_images": 2, "preview_steps": 5}),
        (False, {"preview_every": None}),
    ],
)
def test_a_job_draws_previews_as_it_was_asked(
    client: DiffFit, images: Path, previews: bool | dict[str, int], resolved: dict[str, int | None]
) -> None:
    file = client.files.wait(client.files.push(images).id)
    made = client.jobs.create(file.id, model="tiny-dit", hyperparameters={"steps": 10}, previews=previews)
    assert {name: made.hyperparameters[name] for name in resolved} == resolved
