"""The demo's page from small data: well-formed, whole, and safe against names from outside."""

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from client.adapters import Adapter
from client.demo.charts import loss_chart
from client.demo.report import batch_sentence, build_grid, build_page, next_steps
from client.demo.scenes import DOMAINS, Domain, Drawn, PreviewStrip, Row, Show, Stage, Trained
from client.demo.story import nearest
from client.jobs import Job
from client.models import Model

_VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Every tag must be closed in order; what a browser would run or show is collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.tags: list[str] = []
        self.polylines: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(found["src"] or "")
        if tag == "polyline":
            self.polylines.append(found["points"] or "")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def picture(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (16, 16), colour)


def make_trained(letter: str, domain: Domain, classes: tuple[str, ...] = ("one", "two")) -> Trained:
    job = Job.from_json(
        {
            "id": f"ftjob-{letter}",
            "status": "succeeded",
            "model": "base",
            "training_file": "file-1",
            "created_at": 1,
            "method": {"difffit": {"hyperparameters": {"steps": 20, "batch_size": 4}}},
        }
    )
    adapter = Adapter.from_json(
        {
            "id": f"adapter-{letter}",
            "model": f"ft:base:t::{letter}",
            "base": "base",
            "job_id": job.id,
            "bytes": 123_456,
            "sha256": letter * 64,
            "parameters": 1_000,
            "base_parameters": 1_000_000,
            "classes": list(classes),
            "metrics": {},
            "metadata": {},
            "created_at": 1,
        }
    )
    metrics = [
        {"step": step, "train_loss": 1 / step, "valid_loss": 1.1 / step if step % 5 == 0 else None}
        for step in range(1, 21)
    ]
    previews = [PreviewStrip(step, [picture(), picture("blue")], list(classes)) for step in range(2, 22, 2)]
    return Trained(letter, domain, job, adapter, 60, metrics, previews, is_reused=False)


def make_show(title: str = "line art", distinct: int = 2) -> Show:
    first = Domain("a", title, Path("a.zip"), "somebody, CC0")
    trained = [make_trained("A", first), make_trained("B", DOMAINS[1])]
    rows = [
        Row(name, "note", [picture(), picture("green")], ["x", "y"]) for name in ("Base", f"A: {title}", "B: digits")
    ]
    rows.append(Row("real", "CC0", [picture(), picture()], ["x", "y"], is_real=True))
    stats = [{"distinct_adapters": distinct, "batch_size": 6, "queue_ms": 12, "compute_ms": 900}] * 6
    facts = {"parameters": 1_000_000, "licence": "cc0", "image_size": 64, "fingerprint": "f", "adapter_id": None}
    base = Model.from_json({"id": "base", "classes": ["x", "y"], **facts})
    drawn = Drawn(stats, [7, 8], 1.5)
    return Show(
        base, trained, rows, drawn, [("cores", "2")], "http://127.0.0.1:1", (), [Stage("Train", 60.0, "by turns")]
    )


def read(page: str) -> Page:
    parser = Page()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    page = build_page(make_show())
    parsed = read(page)
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    assert re.findall(r"(?:src|href)=.(?!data:)", page) == []
    assert "$" not in re.sub(r"<pre>.*?</pre>", "", page)


def test_every_picture_is_inside_and_can_be_opened() -> None:
    images = read(build_page(make_show())).images
    assert len(images) == 4 * 2 + 2 * 6 * 2  # the grid, and at most six strips of each job
    for source in images:
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(data)).size == (16, 16)


def test_the_figures_are_the_runs_own() -> None:
    page = build_page(make_show())
    for figure in ("123,456", "0.100%", "A" * 64, "1,000,000", "seed 8", "60 s", "by turns", "adapter-B"):
        assert figure in page


def test_names_from_outside_are_shown_not_obeyed() -> None:
    page = build_page(make_show(title="<script>alert(1)</script>"))
    assert "script" not in read(page).tags
    assert "&lt;script&gt;" in page


def test_the_page_says_so_when_no_pass_held_every_adapter() -> None:
    assert "held 2 different adapters" in batch_sentence(make_show())
    assert "no single forward pass" in batch_sentence(make_show(distinct=1))


def test_the_next_steps_name_this_runs_adapter() -> None:
    assert any("adapter-B" in command for _, command in next_steps(make_show()))


def test_the_grid_holds_every_row_and_column() -> None:
    grid = build_grid(make_show())
    assert grid.width > 2 * 96
    assert grid.height >= 4 * 96
    colours = {colour for _, colour in grid.getcolors(maxcolors=100_000) or []}
    assert {(255, 0, 0), (0, 128, 0)} <= colours


def test_both_losses_are_drawn_within_the_frame() -> None:
    chart = loss_chart(make_trained("A", DOMAINS[0]).metrics, "losses")
    lines = read(chart).polylines
    assert len(lines) == 3  # as measured, smoothed, validation
    for line in lines:
        for point in line.split():
            x, y = (float(number) for number in point.split(","))
            assert 0 <= x <= 560
            assert 0 <= y <= 250


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"step": 1, "train_loss": None}],
        [{"step": 1, "train_loss": 0.5}],
        [{"step": 1, "train_loss": 0.5}, {"step": 2, "train_loss": 0.5, "valid_loss": 0.5}],
        [{"step": 1, "train_loss": math.nan}, {"step": 2, "train_loss": 1e9}, {"step": 3, "train_loss": 1e-9}],
    ],
)
def test_odd_metrics_still_make_a_chart(metrics: list[dict]) -> None:
    read(loss_chart(metrics, "losses"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ground_vehicle", "vehicle"),
        ("sky_weather", "sky-weather"),
        ("fruit_veg", "fruit"),
        ("faces", "face"),
        ("digit-3", "arrow"),  # nothing is like it: the classes take turns
    ],
)
def test_the_base_draws_its_class_nearest_in_name(name: str, expected: str) -> None:
    assert nearest(name, ["face", "animal-face", "fruit", "arrow", "vehicle", "sky-weather"], 3) == expected
