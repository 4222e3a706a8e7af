"""Idempotency-Key (IETF draft): the effect and the memory of it are one transaction, so a retry finds both or neither.

Only replies that succeeded are remembered: a request that failed had no effect and may be sent again under its key.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy import delete
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from api.deps import TenantDep
from api.errors import InFlight, Malformed
from core.errors import Invalid
from core.models import IdempotencyKey

REPLAYED = {"Idempotency-Replayed": "true"}
MAX_KEY = 255


@dataclass(frozen=True)
class Once:
    """A request that its sender may repeat. Without a key every sending counts."""

    tenant_id: str
    key: str | None
    fingerprint: str

    def reply(self, session: Session, act: Callable[[], BaseModel]) -> JSONResponse:
        """The reply of `act`, or the one that it gave before."""
        stored, is_new = self.once(session, lambda: act().model_dump(mode="json"))
        return JSONResponse(stored, headers=None if is_new else REPLAYED)

    def once(
        self,
        session: Session,
        act: Callable[[], dict[str, Any]],
        stands: Callable[[dict[str, Any]], bool] = lambda _: True,
    ) -> tuple[dict[str, Any], bool]:
        """What `act` returned, now or before, and whether it was now. Raises Invalid for a key of another request.

        What came of it later may have made a reply worthless: one that does not `stands` is forgotten.
        """
        if self.key is None:
            return act(), True
        if (before := self.find(session)) is not None:
            if stands(before):
                return before, False
            own = (IdempotencyKey.tenant_id == self.tenant_id, IdempotencyKey.key == self.key)
            session.execute(delete(IdempotencyKey).where(*own))
            session.expire_all()
        memory = IdempotencyKey(tenant_id=self.tenant_id, key=self.key, fingerprint=self.fingerprint, status_code=0)
        memory.reply = {}
        try:
            with session.begin_nested():
                session.add(memory)
        except IntegrityError:  # PostgreSQL let us wait for the other one's commit: it is there now
            if (before := self.find(session)) is not None:
                return before, False
            raise InFlight("a request with this Idempotency-Key is under way: ask again") from None
        memory.reply = act()
        memory.status_code = 200
        session.flush()
        return memory.reply, True

    def find(self, session: Session) -> dict[str, Any] | None:
        memory = session.get(IdempotencyKey, (self.tenant_id, self.key), populate_existing=True) if self.key else None
        if memory is None:
            return None
        if memory.fingerprint != self.fingerprint:
            raise Invalid(
                "this Idempotency-Key was used for another request: a new request needs a new key",
                code="idempotency_key_reused",
            )
        if memory.status_code == 0:
            raise InFlight("a request with this Idempotency-Key is under way: ask again")
        return memory.reply


def key_of(request: Request) -> str | None:
    """Raises Malformed for a key that is no 1 to 255 printable ASCII characters."""
    given = request.headers.getlist("idempotency-key")
    if not given:
        return None
    key = given[0].strip()
    if len(given) > 1 or not 0 < len(key) <= MAX_KEY or not all(" " <= letter <= "~" for letter in key):
        raise Malformed(
            f"Idempotency-Key must be one header of 1 to {MAX_KEY} printable ASCII characters",
            code="bad_idempotency_key",
            pointer="/Idempotency-Key",
        )
    return key


def fingerprint(request: Request, *facts: Any) -> str:
    """What makes two requests the same one."""
    told = json.dumps([request.method, request.url.path, *facts], ensure_ascii=True)
    return hashlib.sha256(told.encode()).hexdigest()


async def get_once(request: Request, caller: TenantDep) -> Once:
    body = hashlib.sha256(await request.body()).hexdigest()
    return Once(caller.tenant_id, key_of(request), fingerprint(request, body))


OnceDep = Annotated[Once, Depends(get_once)]
