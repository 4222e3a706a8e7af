"""Loss curves as inline SVG; colours come from the page's own variables, so they follow light and dark."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 34
_NEIGHBOURS = 4  # that the solid training line averages over, each side; the faint one is as measured

Point = tuple[float, float]


def loss_chart(metrics: Sequence[Mapping[str, Any]], title: str) -> str:
    """Training loss (faint as measured, solid smoothed) and validation loss over steps."""
    train = _points(metrics, "train_loss")
    valid = _points(metrics, "valid_loss")
    if not train and not valid:
        return "<p class='quiet'>No losses were recorded.</p>"
    smooth = _smoothed(train)
    shown = smooth[1:] + valid or train
    first, last = 0.0, max(x for x, _ in train + valid)
    low, high = _padded([y for _, y in shown])

    def x_of(step: float) -> float:
        return _LEFT + (step - first) / max(last - first, 1e-9) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(loss: float) -> float:
        return _TOP + (high - min(max(loss, low), high)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def line(points: Sequence[Point], kind: str) -> str:
        if len(points) < 2:
            return ""
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        return f"<polyline class='{kind}' points='{path}'/>"

    parts = [f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{escape(title, quote=True)}'>"]
    for tick in _ticks(low, high, 4):
        y = y_of(tick)
        parts.append(f"<line class='rule' x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
        parts.append(f"<text class='tick' x='{_LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{tick:g}</text>")
    for tick in _ticks(first, last, 5):
        parts.append(f"<text class='tick' x='{x_of(tick):.1f}' y='{_HEIGHT - 14}' text-anchor='middle'>{tick:g}</text>")
    parts.append(
        f"<text class='tick' x='{(_LEFT + _WIDTH) / 2:.0f}' y='{_HEIGHT - 1}' text-anchor='middle'>step</text>"
    )
    parts += [line(train, "train raw"), line(smooth, "train"), line(valid, "valid")]
    for step, loss in valid:
        tip = f"<title>step {step:g}: validation {loss:.4f}</title>"
        parts.append(f"<circle class='valid' cx='{x_of(step):.1f}' cy='{y_of(loss):.1f}' r='3.2'>{tip}</circle>")
    parts.append("</svg>")
    return "".join(parts)


def _points(metrics: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    found = [(float(item["step"]), item.get(name)) for item in metrics]
    return [(step, float(loss)) for step, loss in found if loss is not None and math.isfinite(loss)]


def _smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean of each point and its neighbours on both sides, so that the line does not lag.

    The first have fewer, as many on each side, for there it is steep; the last have theirs before them.
    """
    out: list[Point] = []
    for i, (step, _) in enumerate(points):
        near = min(_NEIGHBOURS, i)
        around = [loss for _, loss in points[i - near : i + near + 1]]
        out.append((step, sum(around) / len(around)))
    return out


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return low - pad, high + pad


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers inside the range."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    count = math.floor(high / step) - math.ceil(low / step) + 1
    return [round((math.ceil(low / step) + i) * step, 10) for i in range(count)]
