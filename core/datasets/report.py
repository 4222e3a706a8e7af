"""What intake says about an archive: one verdict an image, one outcome for the whole."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from core.errors import Invalid


class Refused(Invalid):
    """The archive as a whole is not acceptable. The message names the entry and says what would be right."""

    code = "invalid_archive"

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message, code=code, pointer="/file")


class Rejected(Exception):
    """One image is of no use; the rest of the dataset goes on."""

    def __init__(self, code: str, message: str, width: int | None = None, height: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.width = width
        self.height = height


def quoted(name: str | bytes) -> str:
    """A name from an archive, safe to show: short, on one line, control characters escaped."""
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    return repr(text if len(text) <= 100 else f"{text[:60]}…{text[-30:]}")


@dataclass(frozen=True)
class Verdict:
    """One image file. `width` and `height` are the picture's own, in pixels, upright; None where unreadable."""

    name: str
    class_name: str
    verdict: Literal["accepted", "rejected"]
    code: str | None = None
    detail: str | None = None
    width: int | None = None
    height: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "class": self.class_name,
            "verdict": self.verdict,
            "code": self.code,
            "detail": self.detail,
            "width": self.width,
            "height": self.height,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Verdict":
        return cls(class_name=data["class"], **{key: value for key, value in data.items() if key != "class"})


@dataclass(frozen=True)
class ClassCount:
    name: str
    count: int

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "count": self.count}


@dataclass(frozen=True)
class Report:
    """The outcome. `sha256` is the pack's, and None unless `status` is `processed`."""

    status: Literal["processed", "error"]
    code: str | None = None
    detail: str | None = None
    images: int = 0
    rejected: int = 0
    classes: Sequence[ClassCount] = ()
    verdicts: Sequence[Verdict] = field(default=(), repr=False)
    sha256: str | None = None

    @classmethod
    def processed(cls, classes: Sequence[ClassCount], verdicts: Sequence[Verdict]) -> "Report":
        """An accepted dataset whose pack is yet to be hashed."""
        reasons = Counter(verdict.code for verdict in verdicts if verdict.verdict == "rejected")
        detail = None
        if reasons:
            listed = ", ".join(f"{count} {code}" for code, count in sorted(reasons.items(), key=str))
            detail = f"{reasons.total()} of {len(verdicts)} images were rejected: {listed}"
        accepted = len(verdicts) - reasons.total()
        return cls("processed", None, detail, accepted, reasons.total(), tuple(classes), tuple(verdicts))

    @classmethod
    def error(cls, code: str, detail: str, verdicts: Sequence[Verdict] = ()) -> "Report":
        """A refused dataset, with the verdicts given until then. It offers no images to anyone."""
        rejected = sum(verdict.verdict == "rejected" for verdict in verdicts)
        return cls("error", code, detail, rejected=rejected, verdicts=tuple(verdicts))

    def with_sha256(self, digest: str) -> "Report":
        return replace(self, sha256=digest)

    def to_json(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            "images": self.images,
            "rejected": self.rejected,
            "classes": [count.to_json() for count in self.classes],
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "sha256": self.sha256,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Report":
        lists = {
            "classes": tuple(ClassCount(**count) for count in data["classes"]),
            "verdicts": tuple(Verdict.from_json(verdict) for verdict in data["verdicts"]),
        }
        return cls(**{**data, **lists})
