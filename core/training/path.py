"""How the numbers of a job come about: part of its record, since another way gives other bits. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

RowPath = Literal["row", "fused"]
Packing = Literal["exact", "shared"]


@dataclass(frozen=True)
class NumericPath:
    """How the numbers of a job come about; fixed before step 0, since another path gives other bits."""

    torch: str
    device: str
    threads: int
    dtype: str
    rows: RowPath
    micro_batch: int
    world: int = 1  # processes that share a step's rows
    packing: Packing = "exact"
    """`exact`: who shares its passes changes no bit of the job, or nobody does; `shared`: it may."""
    compiled: bool = False  # docs/decisions/0015

    @property
    def is_steady(self) -> bool:
        """Whether a job has the same bits alone and in any company (docs/decisions/0011)."""
        return (self.device, self.threads, self.rows, self.world) == ("cpu", 1, "row", 1)

    def may_share(self, other: "NumericPath") -> bool:
        """Whether jobs of these paths may train in one pass."""
        if self.packing == other.packing == "shared" and self.world == 1:
            return replace(self, micro_batch=other.micro_batch) == other
        is_alike = (self.dtype, self.compiled) == (other.dtype, other.compiled)
        return self.is_steady and other.is_steady and is_alike

    def to_json(self) -> dict[str, Any]:
        """As the job's row and its checkpoints have it."""
        return dict(self.__dict__)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "NumericPath":
        """Read back what `to_json` wrote. Raises TypeError for parts that this version does not know."""
        return cls(**data)
