"""`difffit` against the real API: what it does, prints and returns."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

from client.api import DiffFit
from tests.client.conftest import Outcome, Run, Service


def only(pattern: str, text: str) -> str:
    found = re.findall(pattern, text)
    assert found, text
    return found[0]


def push(difffit: Run, images: Path) -> str:
    return only(r"file-\w+", difffit("files", "push", str(images)).out)


def trained(difffit: Run, images: Path) -> Outcome:
    return difffit("train", str(images), "--steps", "10", "--suffix", "pets", "--watch")


def test_a_folder_is_pushed_validated_listed_and_removed(difffit: Run, images: Path) -> None:
    pushed = difffit("files", "push", str(images))
    assert pushed.code == 0
    assert "uploaded pets.zip" in pushed.out
    file_id = only(r"file-\w+", pushed.out)
    assert f"{file_id}: 32 images in 2 classes" in pushed.out

    listed = [line.split("\t") for line in difffit("files", "list").out.splitlines()]
    assert listed[0][:4] == ["ID", "NAME", "SIZE", "STATUS"]
    assert [file_id, "pets.zip", "processed"] == [listed[1][0], listed[1][1], listed[1][3]]
    assert json.loads(difffit("files", "show", file_id).out)["dataset"]["images"] == 32

    assert difffit("files", "rm", file_id).out.strip() == f"deleted {file_id}"
    gone = difffit("files", "show", file_id)
    assert gone.code == 1
    assert file_id in gone.err
    assert "[404 not_found]" in gone.err


def test_a_refused_dataset_fails_the_command_with_its_reason(service: Service, difffit: Run, images: Path) -> None:
    service.worker.verdict = "error"
    try:
        pushed = difffit("files", "push", str(images))
    finally:
        service.worker.verdict = "processed"
    assert pushed.code == 1
    assert "was refused: not what it should be" in pushed.out


def test_several_paths_are_pushed_in_one_command(difffit: Run, images: Path) -> None:
    pushed = difffit("files", "push", str(images), str(images), "--no-wait")
    assert pushed.code == 0
    assert len(set(re.findall(r"file-\w+", pushed.out))) == 2


def test_train_uploads_follows_and_says_how_to_draw(difffit: Run, client: DiffFit, images: Path) -> None:
    run = trained(difffit, images)
    assert run.code == 0
    job = client.jobs.get(only(r"ftjob-\w+", run.out))
    assert (job.status, job.hyperparameters["steps"]) == ("succeeded", 10)
    assert job.raw["suffix"] == "pets"
    assert "succeeded  step 10/10  loss 0.1000  validation 0.1200" in run.out
    assert f"draw with it: difffit sample {job.adapter_id} CLASS" in run.out
    assert len(client.jobs.metrics(job.id)) == 2


def test_train_makes_the_job_of_a_file_that_is_still_being_validated(
    service: Service, difffit: Run, client: DiffFit, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.cli.train._VERDICT_SECONDS", 0.0)
    monkeypatch.setattr(service.worker, "validates", False)
    run = difffit("train", str(images))
    assert run.code == 0, run.err
    job_id = only(r"ftjob-\w+", run.out)
    assert "is still being validated: the job waits for that and starts by itself" in run.out
    assert f"created {job_id} on tiny-dit: validating_files" in run.out
    service.worker.validates = True
    assert client.jobs.wait(job_id).status == "succeeded"


def test_a_hyperparameter_that_json_has_not_is_refused_in_a_line(difffit: Run) -> None:
    refused = difffit("train", "file-x", "--set", "learning_rate=NaN")
    assert refused.code == 1
    assert "learning_rate is nan: it must be a finite number" in refused.err
    assert "Traceback" not in refused.err


def test_jobs_are_listed_by_the_metadata_that_they_were_made_with(difffit: Run, images: Path) -> None:
    file_id = push(difffit, images)
    made = only(r"ftjob-\w+", difffit("train", file_id, "--metadata", "team=a b", "--metadata", "stage=live").out)
    difffit("train", file_id, "--metadata", "team=a b")
    listed = difffit("jobs", "list", "--metadata", "team=a b", "--metadata", "stage=live").out
    assert re.findall(r"ftjob-\w+", listed) == [made]


def test_watch_of_several_jobs_fails_when_one_did(service: Service, difffit: Run, images: Path) -> None:
    file_id = push(difffit, images)
    service.worker.trains = False
    try:
        first, second = (only(r"ftjob-\w+", difffit("train", file_id).out) for _ in range(2))
        assert difffit("jobs", "cancel", second).line() == f"{second}: cancelled"
    finally:
        service.worker.trains = True
    watched = difffit("watch", first, second)
    assert watched.code == 1
    assert f"{second} cancelled" in watched.out
    assert f"{first} made ft:" in watched.out


def test_ctrl_c_leaves_the_job_running_and_says_so(
    service: Service, difffit: Run, client: DiffFit, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_id = push(difffit, images)
    service.worker.trains = False
    try:
        job_id = only(r"ftjob-\w+", difffit("train", file_id).out)
        monkeypatch.setattr("client.follow.time.sleep", _interrupt)
        watched = difffit("watch", job_id)
        monkeypatch.undo()
        assert watched.code == 130
        assert f"the work goes on. Look again: difffit watch {job_id}" in watched.out
        assert client.jobs.get(job_id).status == "queued"
        client.jobs.cancel(job_id)
    finally:
        service.worker.trains = True


def _interrupt(_seconds: float) -> None:
    raise KeyboardInterrupt


def test_a_paused_job_resumes(service: Service, difffit: Run, client: DiffFit, images: Path) -> None:
    file_id = push(difffit, images)
    service.worker.trains = False
    try:
        job_id = only(r"ftjob-\w+", difffit("train", file_id).out)
        assert difffit("jobs", "pause", job_id).line() == f"{job_id}: paused"
        assert difffit("jobs", "resume", job_id).line() == f"{job_id}: queued"
    finally:
        service.worker.trains = True
    assert client.jobs.wait(job_id).status == "succeeded"


def test_previews_events_and_lists_of_a_job(difffit: Run, images: Path, tmp_path: Path) -> None:
    job_id = only(r"ftjob-\w+", trained(difffit, images).out)
    assert "step 10: a, b" in difffit("jobs", "previews", job_id, "-o", "strips").out
    assert [Image.open(path).size for path in sorted((tmp_path / "strips").iterdir())] == [(32, 16)] * 2
    (tmp_path / "taken").write_text("a file")
    refused = difffit("jobs", "previews", job_id, "-o", "taken")
    assert (refused.code, len(refused.err.splitlines())) == (1, 1)
    assert "cannot write taken/" in refused.err
    events = difffit("jobs", "events", job_id)
    assert "Created fine-tuning job" in events.line()
    assert "successfully completed" in events.line(-1)
    assert job_id in difffit("jobs", "list").line(1)
    assert json.loads(difffit("jobs", "show", job_id).out)["object"] == "fine_tuning.job"


def test_a_jobs_checkpoints_and_metrics_are_listed(difffit: Run, client: DiffFit, images: Path) -> None:
    job_id = only(r"ftjob-\w+", trained(difffit, images).out)
    kept = [line.split("\t") for line in difffit("jobs", "checkpoints", job_id).out.splitlines()]
    assert [line[1] for line in kept] == ["STEP", "10", "5"]
    assert kept[1][0] == client.jobs.checkpoints(job_id)[0]["id"]
    measured = [line.split("\t")[:3] for line in difffit("jobs", "metrics", job_id).out.splitlines()]
    assert measured == [["STEP", "LOSS", "VALIDATION"], ["5", "0.2000", "0.2400"], ["10", "0.1000", "0.1200"]]


def test_models_are_listed_and_shown_with_their_classes(difffit: Run, client: DiffFit, images: Path) -> None:
    adapter = client.adapters.get(only(r"adapter-\w+", trained(difffit, images).out))
    listed = [line.split("\t") for line in difffit("models", "list").out.splitlines()]
    assert listed[1][:3] == ["tiny-dit", "base", "8x8"]
    assert [adapter.model, "adapted", "8x8", "2", adapter.id] in listed
    assert json.loads(difffit("models", "show", adapter.id).out)["classes"] == ["a", "b"]
    assert "circle" in json.loads(difffit("models", "show", "base").out)["classes"]
    assert "404 model_not_found" in difffit("models", "show", "ft:nowhere").err


def test_the_command_says_which_it_is(difffit: Run) -> None:
    said = difffit("--version")
    assert (said.code, said.out) == (0, f"difffit {version('difffit-service')}\n")


def test_evaluate_waits_and_says_how_far_training_went(difffit: Run, images: Path) -> None:
    adapter_id = only(r"adapter-\w+", trained(difffit, images).out)
    refused = difffit("evaluate", adapter_id)
    assert (refused.code, "images held out of training" in refused.err) == (1, True)
    measured = difffit("evaluate", adapter_id, push(difffit, images), "-n", "50")
    assert measured.code == 0
    assert "100 pictures to draw" in measured.line()
    assert "kernel distance\t400.0 ± 9.0\t100.0 ± 5.0" in measured.out
    assert "training went 75% of the way" in measured.line(-1)
    evaluation_id = only(r"eval-\w+", measured.out)
    assert evaluation_id in difffit("evaluations", "list").line(1)
    assert json.loads(difffit("evaluations", "show", evaluation_id).out)["status"] == "succeeded"
    assert "is succeeded already" in difffit("evaluations", "cancel", evaluation_id).err


def test_evaluate_without_a_file_needs_a_model_that_was_trained_here(difffit: Run) -> None:
    assert "name a file to measure against" in difffit("evaluate", "base").err


def test_sample_saves_every_image_and_their_grid(difffit: Run, images: Path, tmp_path: Path) -> None:
    adapter_id = only(r"adapter-\w+", trained(difffit, images).out)
    drawn = difffit("sample", adapter_id, "a", "-n", "3", "--seed", "5", "-o", "out/cats.png")
    assert drawn.code == 0
    assert "(seed 5, 6, 7;" in drawn.out
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["cats-1.png", "cats-2.png", "cats-3.png", "cats.png"]
    assert Image.open(out / "cats-2.png").getpixel((0, 0)) == (1, 5, 9)
    assert Image.open(out / "cats.png").size == (2 * 16 + 3 * 4, 2 * 16 + 3 * 4)


def test_a_mix_is_drawn_as_it_was_asked(
    service: Service, difffit: Run, client: DiffFit, images: Path, tmp_path: Path
) -> None:
    one, two = (client.adapters.get(only(r"adapter-\w+", trained(difffit, images).out)) for _ in range(2))
    mixed = ("sample", "base", "a", "--mix", f"{one.id}=0.7", "--mix", f"{two.model}=-0.3", "--timeout", "50")
    drawn = difffit(*mixed, "--guidance-interval", "0.2", "0.8", "-n", "2", "-o", "two.webp")
    assert drawn.code == 0, drawn.err
    assert [Image.open(tmp_path / name).format for name in ("two.webp", "two-1.webp", "two-2.webp")] == ["WEBP"] * 3
    spec = service.worker.claimed[-1].spec
    assert [(part.model, part.weight) for part in spec.adapters] == [(one.model, 0.7), (two.model, -0.3)]
    assert (spec.guidance_interval, spec.timeout, spec.output_format) == ((0.2, 0.8), 50, "webp")


@pytest.mark.parametrize(
    ("words", "file"), [(("-o", "a.jpg"), "a.jpg"), (("-o", "a.png"), "a.jpeg"), ((), "sample.jpeg")]
)
def test_the_suffix_follows_the_format(difffit: Run, tmp_path: Path, words: tuple[str, ...], file: str) -> None:
    drawn = difffit("sample", "base", "--output-format", "jpeg", "--output-compression", "90", *words)
    assert f"saved {file}" in drawn.out
    assert Image.open(tmp_path / file).format == "JPEG"


def test_partial_images_are_saved_as_they_come(
    service: Service, difffit: Run, tmp_path: Path, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The images themselves are drawn only once the partial ones lie on the disk.
    monkeypatch.setattr(service.worker, "finishes", lambda: len(list(tmp_path.glob("*.partial-*"))) == 4)
    drawn = difffit("sample", "base", "-n", "2", "--seed", "5", "--partial", "2")
    assert drawn.code == 0, drawn.err
    finished = {"sample.png", "sample-1.png", "sample-2.png"}
    partial = {f"sample-{image}.partial-{number}.png" for image in (1, 2) for number in (0, 1)}
    assert {path.name for path in tmp_path.iterdir()} == finished | partial
    assert Image.open(tmp_path / "sample-2.partial-1.png").getpixel((0, 0)) == (1, 1, 99)
    assert Image.open(tmp_path / "sample-2.png").getpixel((0, 0)) == (1, 5, 9)
    assert "saved sample-2.partial-1.png" in drawn.out
    assert "saved sample.png (seed 5, 6;" in drawn.line(-1)


@pytest.mark.parametrize("name", ["base", "job"])
def test_sample_takes_the_base_and_a_jobs_id_too(difffit: Run, images: Path, tmp_path: Path, name: str) -> None:
    if name == "job":
        name = only(r"ftjob-\w+", trained(difffit, images).out)
    drawn = difffit("sample", name, "--seed", "1")
    assert (drawn.code, Image.open(tmp_path / "sample.png").size) == (0, (16, 16))


def test_an_unknown_class_is_named_with_those_that_are_there(difffit: Run) -> None:
    drawn = difffit("sample", "base", "unicorn")
    assert drawn.code == 1
    assert "prompt names no class of tiny-dit; it draws: circle" in drawn.err
    assert "422 unknown_class" in drawn.err
    assert len(drawn.err.splitlines()) == 1


def test_an_adapter_is_listed_pulled_and_removed(difffit: Run, client: DiffFit, images: Path, tmp_path: Path) -> None:
    adapter_id = only(r"adapter-\w+", trained(difffit, images).out)
    assert difffit("adapters", "list").line(1).split("\t")[4] == "0.10%"
    difffit("adapters", "pull", adapter_id, "-o", "pets.safetensors")
    assert (tmp_path / "pets.safetensors").read_bytes() == client.adapters.pull(adapter_id)
    assert json.loads(difffit("adapters", "show", adapter_id).out)["id"] == adapter_id
    assert difffit("adapters", "rm", adapter_id).code == 0
    assert "404 not_found" in difffit("adapters", "show", adapter_id).err


def test_a_key_opens_until_it_is_revoked(difffit: Run, service: Service) -> None:
    made = difffit("keys", "create", "laptop")
    secret, key_id = made.line(), only(r"key-\w+", made.err)
    assert made.out.splitlines() == [secret]  # KEY=$(difffit keys create ci)
    with DiffFit(service.url, secret) as other:
        assert other.models.default_base().id == "tiny-dit"
        assert difffit("keys", "revoke", key_id).out.strip() == f"revoked {key_id}"
        listed = difffit("keys", "list").out
        assert secret not in listed
        assert key_id in listed
        assert len(difffit("keys", "list", "-n", "1").out.splitlines()) == 2  # with the heading
        with pytest.raises(Exception, match="401 invalid_api_key"):
            other.models.list()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--learning-rate", "100"), "learning_rate"),
        (("--set", "gamma_depth=sideways"), "gamma_depth"),
        (("--set", "colour=red"), "colour"),
        (("--model", "nowhere"), "unknown base model 'nowhere'"),
    ],
)
def test_a_bad_hyperparameter_is_one_line_that_names_it(
    difffit: Run, client: DiffFit, images: Path, words: tuple[str, ...], names: str
) -> None:
    before = [job.id for job in client.jobs.list()]
    run = difffit("train", push(difffit, images), *words)
    assert run.code == 1
    assert names in run.err
    assert "422" in run.err
    assert "Traceback" not in run.err
    assert [job.id for job in client.jobs.list()] == before


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("files", "push", "nowhere"), 1, "nowhere: no such file or folder"),
        (("train", "file-unknown"), 1, "file-unknown"),
        (("sample", "adapter-unknown"), 1, "404 not_found"),
        (("train", "file-x", "--set", "steps"), 2, "takes NAME=VALUE"),
        (("train", "file-x", "--steps", "0"), 2, "greater than or equal to 1"),
        (("sample", "base", "--mix", "ft:a"), 2, "--mix takes MODEL=WEIGHT, as in ft:…=0.7, not"),
        (("sample", "base", "--mix", "ft:a=much"), 2, "--mix takes MODEL=WEIGHT, as in ft:…=0.7, not"),
        (("sample", "base", "--mix", "ft:a=nan"), 2, "--mix takes MODEL=WEIGHT, as in ft:…=0.7, not"),
        (("sample", "base", "--mix", "ft:a=5"), 1, "/adapters/0/weight"),
        (("sample", "base", "--partial", "4"), 2, "less than or equal to 3"),
        (("sample", "base", "--output-format", "gif"), 2, "not one of 'png'"),
        (("sample", "base", "--partial", "1", "--guidance", "loud"), 1, "422 invalid"),
        (("dance",), 2, "dance"),
    ],
)
def test_wrong_words_and_ids_are_said_plainly(difffit: Run, words: tuple[str, ...], code: int, message: str) -> None:
    run = difffit(*words)
    assert run.code == code
    assert message in run.err
    assert "Traceback" not in run.err


def test_a_silent_service_has_an_exit_code_of_its_own(difffit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFFIT_URL", "http://127.0.0.1:9")
    run = difffit("files", "list")
    assert (run.code, run.err.count("\n")) == (3, 1)
    assert "start it with `difffit up`" in run.err


def test_without_a_key_nothing_is_asked(difffit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFFIT_API_KEY")
    run = difffit("jobs", "list")
    assert run.code == 1
    assert "no API key: set DIFFFIT_API_KEY" in run.err


def test_hostile_text_of_a_reply_reaches_the_terminal_escaped(difffit: Run) -> None:
    run = difffit("sample", "ft:\x1b[31mred")
    assert run.code == 1
    assert "\x1b" not in run.err


def test_the_client_reads_what_the_command_wrote(client: DiffFit, difffit: Run, images: Path) -> None:
    job_id = only(r"ftjob-\w+", trained(difffit, images).out)
    job = client.jobs.get(job_id)
    model = client.models.get(job.fine_tuned_model or "")
    assert (model.is_base, list(model.classes), model.adapter_id) == (False, ["a", "b"], job.adapter_id)
    assert client.files.get(job.training_file).classes == {"a": 20, "b": 12}
    messages = [event.message for event in client.jobs.events(job_id)]
    assert messages[0].startswith("Created")
    assert client.ready()["checks"]["database"]["status"] == "ok"
    assert client.health()["status"] == "ok"
