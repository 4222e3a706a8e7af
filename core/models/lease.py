"""What a row that workers claim carries: a fence (`attempt`) and a time until which the claim holds."""

from datetime import datetime

from sqlalchemy.orm import Mapped, mapped_column


class Leased:
    """`attempt` rises with every claim; a worker writes only WHERE its own attempt still stands."""

    attempt: Mapped[int] = mapped_column(default=0)
    crashes: Mapped[int] = mapped_column(default=0)  # claims that ended by silence, in a row
    lease_until: Mapped[datetime | None] = mapped_column(default=None)
    worker: Mapped[str | None] = mapped_column(default=None)
