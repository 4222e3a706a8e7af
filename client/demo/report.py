"""The demo's page: one file with its pictures and charts inside, to be opened or mailed as it is."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from client.cli.output import duration, size
from client.demo.charts import loss_chart
from client.demo.scenes import PreviewStrip, Row, Show, Trained
from client.pictures import sheet, to_png

_TEMPLATE = Path(__file__).with_name("report.html")
_GRID_SIDE = 96


def build_page(show: Show) -> str:
    """The HTML. Names that came from outside are escaped."""
    total = sum(stage.seconds for stage in show.stages)
    adapters = [one.adapter for one in show.trained]
    tiles = [
        (f"{show.drawn.adapters_at_once}", "adapters in one forward pass"),
        (size(max((adapter.bytes for adapter in adapters), default=0)), "largest adapter file"),
        (f"{max((adapter.share_of_base for adapter in adapters), default=0):.2%}", "of the base's parameters"),
        (duration(total), "for the whole demo"),
    ]
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        summary=_summary(show),
        facts=" · ".join(escape(f"{name} {value}".strip()) for name, value in show.facts),
        tiles="".join(
            f"<div class='tile'><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in tiles
        ),
        batch_sentence=escape(batch_sentence(show)),
        grid_head="<tr><td></td>" + "".join(f"<td>seed {seed}</td>" for seed in show.drawn.seeds) + "</tr>",
        grid="".join(_row(row) for row in show.rows),
        training="".join(_training(one) for one in show.trained),
        base_parameters=f"{show.base.parameters or (adapters[0].base_parameters if adapters else 0):,}",
        adapters="".join(_adapter(one) for one in show.trained),
        batch="".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in _batch(show)),
        stages=_stages(show, total),
        next_steps="".join(f"<p>{escape(what)}</p><pre>{escape(command)}</pre>" for what, command in next_steps(show)),
        credits=escape(_credits(show)),
    )


def build_grid(show: Show) -> Image.Image:
    """The grid alone, for a README."""
    return sheet(
        [row.pictures for row in show.rows],
        side=_GRID_SIDE,
        row_titles=[row.title for row in show.rows],
        captions=[row.captions for row in show.rows],
    )


def batch_sentence(show: Show) -> str:
    """What the batch held, by the service's own figures."""
    count = len(show.drawn.stats)
    if show.drawn.adapters_at_once >= len(show.trained):
        return (
            f"All {count} were asked for at the same time, and one forward pass held "
            f"{show.drawn.adapters_at_once} different adapters in a batch of up to {show.drawn.most('batch_size'):.0f}."
        )
    return f"All {count} were asked for at the same time; no single forward pass happened to hold all adapters."


def next_steps(show: Show, *, is_running: bool = False) -> list[tuple[str, str]]:
    """(what, command), with this run's own names in them."""
    one = show.trained[-1].adapter
    prompt = one.classes[min(3, len(one.classes) - 1)]
    start = [] if is_running else [("Start the service again; all that was made is still there.", _command("up"))]
    if show.exports:
        start.insert(0, ("Tell the commands where this service is.", "export " + " ".join(show.exports)))
    return [
        *start,
        ("Draw more with an adapter.", _command(f'sample {one.id} "{prompt}" -n 9 -o more.png')),
        (
            "Turn an adapter half down: 0 is the base, 1 the adapter.",
            _command(f'sample {one.id} "{prompt}" -n 9 --adapter-scale 0.5'),
        ),
        (
            "Adapt to images of your own: a folder, one sub-folder a class.",
            _command("train path/to/folder --suffix mine --watch"),
        ),
        ("Train the two adapters of this page anew.", _command("demo --fresh")),
        ("Read the REST interface, while the service runs.", f"{show.url}/docs"),
    ]


def _command(words: str) -> str:
    """As it can be typed in the repository, whether or not the environment is active."""
    program = ".venv/bin/difffit" if Path(".venv/bin/difffit").exists() else "difffit"
    return f"{program} {words}"


def _summary(show: Show) -> str:
    listed = " and ".join(f"{one.images} images of {escape(one.domain.title)}" for one in show.trained)
    return (
        f"<b>{escape(show.base.id)}</b> stays as it is. Two jobs adapted it to {listed}; "
        "below, the base and both adapters draw from the same seeds."
    )


def _row(row: Row) -> str:
    cells = "".join(
        f"<td><figure><img alt='{escape(caption, quote=True)}' src='{_data_uri(picture)}'>"
        f"<figcaption>{escape(caption)}</figcaption></figure></td>"
        for picture, caption in zip(row.pictures, row.captions, strict=True)
    )
    note = row.note if row.is_real or len(row.note) < 24 else f"{row.note[:16]}…"
    title = f"<th>{escape(row.title)}<small>{escape(note)}</small></th>"
    return f"<tr{' class=real' if row.is_real else ''}>{title}{cells}</tr>"


def _training(one: Trained) -> str:
    title = f"{one.letter}: {one.domain.title}"
    strips = "".join(
        f"<span>step {strip.step}</span><div>"
        + "".join(
            f"<img alt='{name}' title='{name}' src='{_data_uri(picture)}'>"
            for picture, name in zip(strip.pictures, _attributes(strip.classes), strict=True)
        )
        + "</div>"
        for strip in _few(one.previews)
    )
    settings = one.job.hyperparameters
    shown = [f"{name.replace('_', ' ')} {settings[name]}" for name in _SETTINGS if settings.get(name) is not None]
    reused = " · reused from an earlier run" if one.is_reused else ""
    return (
        f"<div><h3>{escape(title)}</h3><p class='quiet'>{escape(' · '.join(shown) + reused)}</p>"
        f"{loss_chart(one.metrics, f'Losses of {title}')}"
        f"<p class='quiet'>Previews during training, always from the same seeds</p>"
        f"<div class='strip'>{strips}</div></div>"
    )


_SETTINGS = ("steps", "batch_size", "learning_rate", "layout", "seed")
_MOST_STRIPS = 6


def _few(items: Sequence[PreviewStrip]) -> Sequence[PreviewStrip]:
    """At most six, evenly spread, the first and the last among them."""
    if len(items) <= _MOST_STRIPS:
        return items
    return [items[round(i * (len(items) - 1) / (_MOST_STRIPS - 1))] for i in range(_MOST_STRIPS)]


def _adapter(one: Trained) -> str:
    adapter = one.adapter
    return (
        f"<tr><td>{escape(one.letter)}: {escape(one.domain.title)}<br>"
        f"<code class='name'>{escape(adapter.id)}</code></td>"
        f"<td>{len(adapter.classes)}</td><td class='n'>{adapter.parameters:,}</td>"
        f"<td class='n'>{adapter.share_of_base:.3%}</td><td class='n'>{adapter.bytes:,}</td>"
        f"<td><code>{escape(adapter.sha256)}</code></td></tr>"
    )


def _batch(show: Show) -> list[tuple[str, str]]:
    drawn = show.drawn
    residency = sorted({str(item.get("adapter_residency")) for item in drawn.stats if item.get("adapter_residency")})
    return [
        ("Requests at once", f"{len(drawn.stats)}, a picture each, {duration(drawn.seconds)} until the last had come"),
        ("Different adapters in one forward pass", str(drawn.adapters_at_once)),
        ("Widest batch", f"{drawn.most('batch_size'):.0f} rows"),
        ("Adapters found", ", ".join(residency) or "not said"),
        ("Slowest load of an adapter", f"{drawn.most('adapter_load_ms'):.1f} ms"),
        ("Longest wait for a place", f"{drawn.most('queue_ms'):.0f} ms"),
        (
            "Longest computing of a picture",
            f"{drawn.most('compute_ms'):.0f} ms, shared with all that were in its batch",
        ),
    ]


def _stages(show: Show, total: float) -> str:
    return "".join(
        f"<tr><th>{escape(stage.name)}</th><td class='n'>{duration(stage.seconds)}</td>"
        f"<td style='width:45%'>{_bar(stage.seconds / max(total, 1e-9))}</td>"
        f"<td class='quiet'>{escape(stage.note)}</td></tr>"
        for stage in show.stages
    )


def _bar(share: float) -> str:
    return f"<div class='bar' style='width:{share:.1%}'></div>"


def _attributes(names: Sequence[str | None]) -> list[str]:
    return [escape(name or "no class", quote=True) for name in names]


def _credits(show: Show) -> str:
    credited = "; ".join(one.domain.credit for one in show.trained)
    licence = f" Base: {show.base.id}, {show.base.licence}." if show.base.licence else ""
    return f"Images: {credited}.{licence} Made by difffit demo; method: DiffFit, arXiv 2304.06648."


def _data_uri(picture: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(to_png(picture)).decode()
