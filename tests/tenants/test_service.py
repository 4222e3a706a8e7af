import pytest
from sqlalchemy import select

from core.db.session import Database
from core.errors import Conflict, Invalid, NotFound
from core.models import ApiKey
from core.tenants import service as tenants
from tests.races import race
from tests.rows import make_tenant


def test_a_key_opens_its_tenant_and_its_secret_is_not_kept(database: Database) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        made = tenants.create_key(session, tenant.id, "laptop")
    assert made.secret.startswith("dfk_")
    with database.read() as session:
        assert tenants.authenticate(session, made.secret).id == tenant.id
        row = session.scalars(select(ApiKey)).one()
        kept = [getattr(row, column.key) for column in ApiKey.__table__.columns]
    assert made.secret not in map(str, kept)
    assert made.secret.startswith(row.prefix)
    assert len(row.prefix) < len(made.secret) / 4


@pytest.mark.parametrize("change", [str.upper, lambda secret: secret + "x", lambda secret: secret[:-1], lambda _: ""])
def test_any_other_secret_opens_nothing(database: Database, change: object) -> None:
    with database.write() as session:
        secret = tenants.create_key(session, make_tenant(session).id, "k").secret
    assert callable(change)
    with database.read() as session, pytest.raises(tenants.Unauthenticated) as refused:
        tenants.authenticate(session, change(secret))
    assert refused.value.code == "invalid_api_key"


def test_a_revoked_key_is_dead_at_once_and_the_others_live(database: Database) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        old, new = (tenants.create_key(session, tenant.id, name) for name in ("old", "new"))
        first = tenants.revoke_key(session, tenant.id, old.key.id).revoked_at
        assert tenants.revoke_key(session, tenant.id, old.key.id).revoked_at == first
    with database.read() as session:
        with pytest.raises(tenants.Unauthenticated):
            tenants.authenticate(session, old.secret)
        assert tenants.authenticate(session, new.secret).id == tenant.id


def test_the_last_live_key_stays_whoever_revokes_at_once(database: Database) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        made = [tenants.create_key(session, tenant.id, str(number)).key.id for number in range(3)]

    def revoke(key_id: str) -> bool:
        try:
            with database.write() as session:
                tenants.revoke_key(session, tenant.id, key_id)
        except Conflict as error:
            return error.code != "last_api_key"
        return True

    assert sum(race(*[lambda key_id=key_id: revoke(key_id) for key_id in made])) == 2


def test_a_suspended_tenants_keys_open_nothing(database: Database) -> None:
    with database.write() as session:
        tenant = make_tenant(session)
        secret = tenants.create_key(session, tenant.id, "k").secret
        tenant.status = "suspended"
    with database.read() as session, pytest.raises(tenants.Suspended):
        tenants.authenticate(session, secret)


def test_another_tenants_key_is_not_there(database: Database) -> None:
    with database.write() as session:
        owner, other = make_tenant(session), make_tenant(session)
        key = tenants.create_key(session, owner.id, "k").key
        tenants.create_key(session, other.id, "k")
    with database.write() as session:
        with pytest.raises(NotFound):
            tenants.revoke_key(session, other.id, key.id)
        assert key.id not in [row.id for row in tenants.list_keys(session, other.id, None, 100).rows]
        assert [row.id for row in tenants.list_keys(session, owner.id, None, 100).rows] == [key.id]
        with pytest.raises(NotFound):
            tenants.list_keys(session, other.id, key.id, 100)


def test_two_tenants_cannot_have_one_name(database: Database) -> None:
    with database.write() as session:
        make_tenant(session, "acme")
        with pytest.raises(Conflict) as refused:
            tenants.create_tenant(session, "acme")
    assert (refused.value.code, refused.value.pointer) == ("tenant_exists", "/name")


@pytest.mark.parametrize("name", ["", "Acme", "a b", "a:b", "-a", "a" * 64, "a\n"])
def test_a_name_that_could_not_stand_in_a_models_name_is_refused(database: Database, name: str) -> None:
    with database.write() as session, pytest.raises(Invalid) as refused:
        tenants.create_tenant(session, name)
    assert (refused.value.code, refused.value.pointer) == ("bad_tenant_name", "/name")
