from pathlib import Path

from client.api import DiffFit


def test_an_adapters_metadata_is_replaced(client: DiffFit, images: Path) -> None:
    file = client.files.push(images)
    job = client.jobs.wait(client.jobs.create(file.id, model="tiny-dit", hyperparameters={"steps": 2}).id)
    adapter_id = job.adapter_id or ""
    assert client.adapters.update(adapter_id, metadata={"stage": "live", "team": "a"}).metadata["team"] == "a"
    client.adapters.update(adapter_id, metadata={"stage": "old"})
    assert client.adapters.get(adapter_id).metadata == {"stage": "old"}
