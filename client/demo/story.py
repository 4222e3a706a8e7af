"""The demo's acts, in order: upload, train, draw."""

import difflib
import re
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from PIL import Image

from client.adapters import Adapter
from client.api import DiffFit
from client.archive import sha256_of
from client.cli.board import watch
from client.cli.output import duration, say
from client.demo.scenes import DOMAINS, Domain, Drawn, PreviewStrip, Row, Stage, Trained
from client.errors import ApiError, ClientError
from client.files import File
from client.images import Generation
from client.jobs import Job
from client.models import Model
from client.pictures import open_picture, slices

FIRST_SEED = 7
_MOST_COLUMNS = 10
_LETTERS = "ABCDEFGH"


@dataclass
class Clock:
    """Times the acts, and says each time as it ends."""

    stages: list[Stage] = field(default_factory=list)
    _note: str = ""

    @contextmanager
    def act(self, name: str) -> Iterator[None]:
        began, self._note = time.monotonic(), ""
        say(f"— {name}")
        yield
        self.stages.append(Stage(name, time.monotonic() - began, self._note))
        say(f"  {self._note + ': ' if self._note else ''}{duration(self.stages[-1].seconds)}")

    def note(self, words: str) -> None:
        """What there is to say of the act under way."""
        self._note = words


def upload(client: DiffFit, domains: Sequence[Domain] = DOMAINS) -> tuple[list[File], int]:
    """Every domain's archive as a validated file, and how many were there already."""
    known = list(client.files.list(100))
    found = [_find_file(known, domain) for domain in domains]
    pushed = [file or client.files.push(domain.archive) for file, domain in zip(found, domains, strict=True)]
    files = [client.files.wait(file.id) for file in pushed]
    for file, earlier in zip(files, found, strict=True):
        if file.status != "processed":
            raise ClientError(f"{file.filename} was refused: {file.status_details}")
        there = " (there already)" if earlier else ""
        say(f"  {file.filename}: {file.images} images, {len(file.classes)} classes{there}")
    return files, sum(file is not None for file in found)


def train(client: DiffFit, base: Model, files: Sequence[File], fresh: bool) -> list[Trained]:
    """One adapter a domain: an earlier run's where there is one, else trained now, both watched live."""
    known = [] if fresh else list(client.jobs.list(100))
    jobs: list[tuple[Job, bool]] = []
    for domain, file in zip(DOMAINS, files, strict=True):
        marks = {"demo": domain.name, "digest": sha256_of(domain.archive), "base": base.fingerprint}
        found = _find_job(client, known, marks)
        job = found or client.jobs.create(
            file.id,
            model=base.id,
            seed=0,
            suffix=domain.title.replace(" ", "-"),
            metadata=marks,
            hyperparameters={"steps": domain.steps},
        )
        if job.status == "paused":
            job = client.jobs.resume(job.id)
        jobs.append((job, found is not None and found.has_ended))
    names = {
        job.id: f"{letter} {domain.title}" for (job, _), letter, domain in zip(jobs, _LETTERS, DOMAINS, strict=False)
    }
    if not all(is_reused for _, is_reused in jobs):
        ended = {job.id: job for job in watch(client, names)}
        for job in ended.values():
            if job.status != "succeeded":
                raise ClientError(f"job {job.id} ({names[job.id]}) {job.status}: {job.trouble or 'no reason given'}")
        jobs = [(ended[job.id], is_reused) for job, is_reused in jobs]
    parts = zip(_LETTERS, DOMAINS, files, jobs, strict=False)
    return [_trained(client, letter, domain, file, *job) for letter, domain, file, job in parts]


def draw(client: DiffFit, base: Model, trained: Sequence[Trained]) -> tuple[list[Row], Drawn]:
    """Base and adapters at the same time, one request a picture; a column's pictures share their seed."""
    columns = min(_MOST_COLUMNS, max(len(one.adapter.classes) for one in trained))
    seeds = [FIRST_SEED + column for column in range(columns)]
    first = trained[0].adapter.classes
    cast: list[tuple[str, str, str, list[str]]] = [
        ("Base", base.id, base.id, [nearest(first[i % len(first)], base.classes, i) for i in range(columns)])
    ]
    for one in trained:
        classes = one.adapter.classes
        prompts = [classes[i % len(classes)] for i in range(columns)]
        cast.append((f"{one.letter}: {one.domain.title}", one.adapter.id, one.adapter.model, prompts))
    began = time.monotonic()
    with ThreadPoolExecutor(max_workers=columns * len(cast)) as threads:
        asked = {  # column by column, so that the first rows of the batch are of every model
            (title, column): threads.submit(client.images.generate, model, prompts[column], seed=seeds[column])
            for column in range(columns)
            for title, _, model, prompts in cast
        }
        drawn: dict[tuple[str, int], Generation] = {key: future.result() for key, future in asked.items()}
    seconds = time.monotonic() - began
    rows = [
        Row(title, note, [open_picture(drawn[title, i].images[0].data) for i in range(columns)], prompts)
        for title, note, _, prompts in cast
    ]
    rows += [_real(one, columns) for one in trained]
    return rows, Drawn([generation.stats for generation in drawn.values()], seeds, seconds)


def nearest(name: str, classes: Sequence[str], turn: int) -> str:
    """The base's class whose name is most like `name`; where none is, the classes take turns."""
    words = _words(name)
    shared = [(len(words & _words(option)) / len(words | _words(option)), option) for option in classes]
    best = max(shared, default=(0.0, ""))
    if best[0] > 0:
        return next(option for score, option in shared if score == best[0])
    close = difflib.get_close_matches(name, classes, n=1, cutoff=0.75)
    return close[0] if close else classes[turn % len(classes)]


def _words(name: str) -> set[str]:
    return {word.lower().removesuffix("s") for word in re.split(r"[^A-Za-z0-9]+", name) if word}


def _find_file(known: Sequence[File], domain: Domain) -> File | None:
    """A usable file with this archive's name and, byte for byte, its content."""
    try:
        digest = sha256_of(domain.archive)
    except OSError as error:
        raise ClientError(f"cannot read {domain.archive}: {error.strerror}; clone the repository whole") from error
    alike = (file for file in known if (file.filename, file.sha256) == (domain.archive.name, digest))
    return next((file for file in alike if file.status == "processed"), None)


def _find_job(client: DiffFit, known: Sequence[Job], marks: dict[str, str]) -> Job | None:
    """An earlier run's job for the same images on the same base, done or still under way."""
    for job in known:
        if any(job.metadata.get(key) != value for key, value in marks.items()) or job.status in ("failed", "cancelled"):
            continue
        if job.status != "succeeded" or _adapter(client, job) is not None:
            return job
    return None


def _adapter(client: DiffFit, job: Job) -> Adapter | None:
    """None where somebody has deleted it."""
    try:
        return client.adapters.get(job.adapter_id) if job.adapter_id else None
    except ApiError as error:
        if error.status == 404:
            return None
        raise


def _trained(client: DiffFit, letter: str, domain: Domain, file: File, job: Job, is_reused: bool) -> Trained:
    adapter = _adapter(client, job)
    if adapter is None:
        raise ClientError(f"the adapter of job {job.id} is gone: run again with --fresh")
    previews = [
        PreviewStrip(
            preview.step,
            slices(open_picture(client.jobs.preview(job.id, preview.id)), len(preview.classes)),
            preview.classes,
        )
        for preview in client.jobs.previews(job.id)
    ]
    metrics = client.jobs.metrics(job.id)
    return Trained(letter, domain, job, adapter, file.images or 0, metrics, previews, is_reused)


def _real(one: Trained, columns: int) -> Row:
    """A real picture of each class, straight from the archive."""
    with zipfile.ZipFile(one.domain.archive) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        classes = one.adapter.classes
        pictures: list[Image.Image] = []
        for column in range(columns):
            kind, turn = classes[column % len(classes)], column // len(classes)
            mine = [name for name in names if f"/{name}".split("/")[-2] == kind] or names
            pictures.append(open_picture(archive.read(mine[turn % len(mine)])))
    captions = [classes[i % len(classes)] for i in range(columns)]
    return Row(f"real {one.domain.title}", one.domain.credit, pictures, captions, is_real=True)
