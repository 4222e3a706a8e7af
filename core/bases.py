"""The bases that this installation offers, by name."""

from functools import cached_property
from pathlib import Path

from core.diffusion.catalog import BaseSummary, base_summary, locate
from core.errors import Invalid


class Catalog:
    """Folders or hub names, read when first asked for; the first is the default."""

    def __init__(self, bases: list[str]) -> None:
        self._bases = bases

    def names(self) -> list[str]:
        return list(self._summaries)

    def get(self, name: str, pointer: str = "/model") -> BaseSummary:
        if name not in self._summaries:
            offered = ", ".join(self._summaries)
            raise Invalid(
                f"unknown base model {name!r}; this service has {offered}", code="unknown_model", pointer=pointer
            )
        return self._summaries[name]

    def all(self) -> list[BaseSummary]:
        return list(self._summaries.values())

    def folder(self, name: str) -> Path:
        return self._folders[name]

    @cached_property
    def _folders(self) -> dict[str, Path]:
        """A folder goes by its own name, a base from the hub by its hub name."""
        return {(Path(base).resolve().name if Path(base).is_dir() else base): locate(base) for base in self._bases}

    @cached_property
    def _summaries(self) -> dict[str, BaseSummary]:
        return {name: base_summary(folder, name) for name, folder in self._folders.items()}
