"""The five families of trouble that a caller can do something about. Edges translate each family once."""


class DomainError(Exception):
    """Base of the families. `code` is stable and documented; `pointer` (RFC 6901) names the field at fault, if any.

    `retry_after_seconds` says when the same may be asked again; None where asking again changes nothing.
    """

    code = "error"
    retry_after_seconds: int | None = None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        pointer: str | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code or type(self).code
        self.pointer = pointer
        if retry_after_seconds is not None:
            self.retry_after_seconds = retry_after_seconds

    @property
    def param(self) -> str | None:
        """The field at fault in OpenAI's spelling, as replies and the records of what failed have it."""
        return param_of(self.pointer)


def param_of(pointer: str | None) -> str | None:
    """`/a/b` as `a.b`."""
    return (pointer or "").strip("/").replace("/", ".") or None


class NotFound(DomainError):
    """Not there, or not yours: the two look the same."""

    code = "not_found"


class Conflict(DomainError):
    """The thing is in a state that does not allow this, until somebody acts or for `retry_after_seconds`."""

    code = "conflict"


class Invalid(DomainError):
    """Parsed, but not acceptable."""

    code = "invalid"


class OverQuota(DomainError):
    """A limit of the tenant is reached."""

    code = "over_quota"
    retry_after_seconds = 60


class Unavailable(DomainError):
    """Something that we depend on does not answer now. The family that workers try again."""

    code = "unavailable"
    retry_after_seconds = 2
