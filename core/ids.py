"""Prefixed random ids: 128 bits, so that nobody guesses another tenant's."""

import secrets

_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_LENGTH = 25  # 36^25 > 2^128


def new_id(prefix: str) -> str:
    """`file-…`, `ftjob-…`: the prefix names the noun."""
    return f"{prefix}-" + "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))
