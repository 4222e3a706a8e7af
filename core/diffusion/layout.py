"""What an adapter is made of: an ordered list of named pieces of one flat vector of differences. No torch at import."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from core.errors import Invalid

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["difffit", "bitfit"]
GammaDepth = Literal["none", "half", "all"] | tuple[int, int]
KINDS: tuple[Kind, ...] = ("difffit", "bitfit")
GAMMA_DEPTHS = ("none", "half", "all")
GAMMA_PLACES = ("attention", "mlp", "qkv", "projection", "hidden")
DEFAULT_GAMMA_PLACES = ("attention", "mlp")
_POINTER = "/layout"


@dataclass(frozen=True)
class Entry:
    """One piece of the flat vector: `shape` values from `offset` on."""

    name: str
    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class LayoutOptions:
    """Where the scale factors γ sit: in which blocks (`half` is the first half, a pair is [start, end)) and places."""

    gamma_depth: GammaDepth = "half"
    gamma_places: tuple[str, ...] = DEFAULT_GAMMA_PLACES

    @classmethod
    def resolve(cls, kind: Kind, gamma_depth: object = None, gamma_places: object = None) -> "LayoutOptions":
        """Checked options of a kind; None is the default of that kind (`bitfit` has no γ)."""
        if kind not in KINDS:
            raise Invalid(f"layout {kind!r} is unknown; one of {', '.join(KINDS)}", pointer=f"{_POINTER}/kind")
        if kind == "bitfit":
            if gamma_depth not in (None, "none"):
                raise Invalid("bitfit has no scale factors: gamma_depth must be none", pointer="/gamma_depth")
            if gamma_places:
                raise Invalid("bitfit has no scale factors: gamma_places must be empty", pointer="/gamma_places")
            return cls("none", ())
        depth = _depth(gamma_depth)
        places = _places(gamma_places)
        return cls("none", ()) if depth == "none" or not places else cls(depth, places)

    def blocks(self, count: int) -> range:
        """The blocks that carry γ, of `count`."""
        if isinstance(self.gamma_depth, tuple):
            start, end = self.gamma_depth
            if end > count:
                raise Invalid(f"gamma_depth ends at block {end}, the base has {count}", pointer="/gamma_depth")
            return range(start, end)
        return range({"none": 0, "half": max(1, count // 2), "all": count}[self.gamma_depth])

    def to_json(self) -> dict[str, Any]:
        depth = list(self.gamma_depth) if isinstance(self.gamma_depth, tuple) else self.gamma_depth
        return {"gamma_depth": depth, "gamma_places": list(self.gamma_places)}


def _depth(value: object) -> GammaDepth:
    match value:
        case "none":
            return "none"
        case "all":
            return "all"
        case None | "half":
            return "half"
        case [int(start), int(end)] if 0 <= start < end and not isinstance(start, bool) and not isinstance(end, bool):
            return (start, end)
    raise Invalid(
        "gamma_depth must be none, half, all or a range [start, end) with 0 <= start < end", pointer="/gamma_depth"
    )


def _places(value: object) -> tuple[str, ...]:
    if value is None:
        return DEFAULT_GAMMA_PLACES
    if not isinstance(value, list | tuple) or any(place not in GAMMA_PLACES for place in value):
        raise Invalid(f"gamma_places must be a list of {', '.join(GAMMA_PLACES)}", pointer="/gamma_places")
    return tuple(place for place in GAMMA_PLACES if place in value)


@dataclass(frozen=True)
class AdapterLayout:
    """The flat vector's pieces in order, for one base. Two layouts are the same when all of this is equal."""

    kind: Kind
    entries: tuple[Entry, ...]
    hidden: int
    options: LayoutOptions = field(default_factory=LayoutOptions)

    @classmethod
    def build(
        cls, kind: Kind, shapes: Iterable[tuple[str, tuple[int, ...]]], hidden: int, options: LayoutOptions
    ) -> "AdapterLayout":
        """Lay the named shapes one behind the other."""
        entries: list[Entry] = []
        offset = 0
        for name, shape in shapes:
            entries.append(Entry(name, offset, shape))
            offset += entries[-1].size
        return cls(kind, tuple(entries), hidden, options)

    @cached_property
    def size(self) -> int:
        """P, the length of the flat vector."""
        return sum(entry.size for entry in self.entries)

    @cached_property
    def by_name(self) -> Mapping[str, Entry]:
        return {entry.name: entry for entry in self.entries}

    def parameter_count(self, classes: int) -> int:
        """Everything that trains for so many classes: the flat vector, a row per class and the null row."""
        return self.size + (classes + 1) * self.hidden

    def split(self, rows: "Tensor") -> "dict[str, Tensor]":
        """Rows (B, P), or one vector (P,), as views (B, *shape) by name; its backward is one concatenation."""
        pieces = rows.split([entry.size for entry in self.entries], dim=-1)
        return {
            entry.name: piece if len(entry.shape) == 1 else piece.unflatten(-1, entry.shape)
            for entry, piece in zip(self.entries, pieces, strict=True)
        }

    def pieces(self, vector: "Tensor", classes: int) -> "tuple[Tensor, Tensor]":
        """θ (P,) and the class rows' differences (C + 1, H) of a whole vector, as views of it."""
        theta, table = vector.split([self.size, (classes + 1) * self.hidden])
        return theta, table.view(classes + 1, self.hidden)

    def embed(self, other: "AdapterLayout", theta: "Tensor") -> "Tensor":
        """A vector of `other` as one of this layout: zero, which is the base, wherever `other` has no entry."""
        if other == self:
            return theta
        self.require(other)
        wide = theta.new_zeros(self.size)
        for entry in other.entries:
            place = self.by_name[entry.name]
            wide[place.offset : place.offset + place.size] = theta[entry.offset : entry.offset + entry.size]
        return wide

    def require(self, other: "AdapterLayout") -> None:
        """Refuse a layout that this one does not cover."""
        for entry in other.entries:
            mine = self.by_name.get(entry.name)
            if mine is None or mine.shape != entry.shape:
                raise Invalid(f"the layout has no place {entry.name} of shape {list(entry.shape)}", code="wrong_layout")

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "hidden": self.hidden,
            **self.options.to_json(),
            "entries": [[entry.name, list(entry.shape)] for entry in self.entries],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "AdapterLayout":
        """Read back what `to_json` wrote; anything else is refused."""
        try:
            options = LayoutOptions.resolve(data["kind"], data["gamma_depth"], data["gamma_places"])
            shapes = [(str(name), tuple(int(size) for size in shape)) for name, shape in data["entries"]]
            hidden = int(data["hidden"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise Invalid(f"the layout is not readable: {error!r}", pointer=_POINTER) from error
        if len({name for name, _ in shapes}) != len(shapes) or any(size < 1 for _, shape in shapes for size in shape):
            raise Invalid("the layout repeats a name or has an empty entry", pointer=_POINTER)
        return cls.build(data["kind"], shapes, hidden, options)
