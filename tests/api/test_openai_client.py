"""The `openai` package, unchanged, against our base URL."""

import base64
import threading
import time

import openai
import pytest
from openai import OpenAI
from sqlalchemy import select

from core.models import Sample
from tests.api.conftest import Owner, Service, archive
from tests.api.serving import running


def test_it_uploads_trains_follows_and_draws(service: Service, owner: Owner) -> None:
    with running(service) as port:
        client = OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key=str(owner.client.headers["authorization"]).removeprefix("Bearer "),
            max_retries=0,
        )
        file = client.files.create(file=("shapes.zip", archive()), purpose="fine-tune")
        assert (file.status, file.filename) == ("uploaded", "shapes.zip")
        assert [item.id for item in client.files.list()] == [file.id]
        assert client.files.content(file.id).read() == archive()
        job = client.fine_tuning.jobs.create(
            model="tiny-dit",
            training_file=service.dataset_ready(file.id),
            suffix="shapes",
            metadata={"team": "a", "stage": "trial"},
            method={"type": "difffit", "difffit": {"hyperparameters": {"steps": 10}}},  # pyright: ignore[reportArgumentType]
        )
        assert job.status == "queued"
        assert client.fine_tuning.jobs.retrieve(job.id).id == job.id
        assert [item.id for item in client.fine_tuning.jobs.list(limit=1)] == [job.id]
        assert [item.id for item in client.fine_tuning.jobs.list(metadata={"team": "a"})] == [job.id]
        assert list(client.fine_tuning.jobs.list(metadata={"team": "a", "stage": "live"})) == []
        assert list(client.fine_tuning.jobs.list(extra_query={"metadata": "null"})) == []
        assert client.fine_tuning.jobs.pause(job.id).id == job.id
        assert client.fine_tuning.jobs.resume(job.id).status == "queued"
        events = client.fine_tuning.jobs.list_events(job.id, limit=2)
        assert len(list(events)) >= 3  # it pages by itself
        assert list(client.fine_tuning.jobs.checkpoints.list(job.id)) == []
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        assert [model.id for model in client.models.list()] == ["tiny-dit"]
        threading.Thread(target=_draw_when_asked, args=(service,)).start()
        images = client.images.generate(
            model="tiny-dit", prompt="circle", n=2, response_format="b64_json", extra_body={"seed": 5, "steps": 4}
        )
        assert [base64.b64decode(image.b64_json or "") for image in images.data or []] == [b"picture 5", b"picture 6"]
        with pytest.raises(openai.NotFoundError) as missing:
            client.files.retrieve("file-unknown")
        assert (missing.value.code, missing.value.type) == ("not_found", "invalid_request_error")
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.images.generate(model="tiny-dit", prompt="cat")
        assert (refused.value.code, refused.value.param) == ("unknown_class", "prompt")
        with pytest.raises(openai.ConflictError):
            client.fine_tuning.jobs.cancel(job.id)
        assert client.files.delete(file.id).deleted
        client.close()


def _draw_when_asked(service: Service) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with service.database.read() as session:
            if session.scalar(select(Sample.id).where(Sample.status == "queued")):
                break
        time.sleep(0.02)
    service.draw()
