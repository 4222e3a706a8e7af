"""The five families of trouble that a caller can do something about. Edges translate each family once."""


class DomainError(Exception):
    """Base of the families. `code` is stable and documented; `pointer` (RFC 6901) names the field at fault, if any."""

    code = "error"

    def __init__(self, message: str, *, code: str | None = None, pointer: str | None = None) -> None:
        super().__init__(message)
        self.code = code or type(self).code
        self.pointer = pointer

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
    """The thing is in a state that does not allow this."""

    code = "conflict"


class Invalid(DomainError):
    """Parsed, but not acceptable."""

    code = "invalid"


class OverQuota(DomainError):
    """A limit of the tenant is reached; `retry_after_seconds` says when to ask again."""

    code = "over_quota"

    def __init__(
        self, message: str, *, retry_after_seconds: int = 60, code: str | None = None, pointer: str | None = None
    ) -> None:
        super().__init__(message, code=code, pointer=pointer)
        self.retry_after_seconds = retry_after_seconds


class Unavailable(DomainError):
    """Something that we depend on does not answer now. The only family that is worth a retry."""

    code = "unavailable"
