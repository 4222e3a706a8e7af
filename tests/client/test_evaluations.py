from pathlib import Path

from client.api import DiffFit


def test_an_evaluation_is_drawn_as_it_was_asked(client: DiffFit, images: Path) -> None:
    file = client.files.wait(client.files.push(images).id)
    how = {"steps": 7, "solver": "ddim", "guidance": "cfg", "guidance_scale": 2.5, "seed": 3}
    made = client.evaluations.create("tiny-dit", file.id, images=8, baseline=False, **how)
    asked = made.raw["request"]
    assert (asked["baseline"], made.total) == (False, 8)
    assert {name: asked[name] for name in how} == how
    assert client.evaluations.wait(made.id).trouble is None
