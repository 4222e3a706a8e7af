"""${message.capitalize()}.

Old code serves while this runs, and goes on serving after it: add first, remove one release later.
"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
from migrations.timeouts import set_timeouts

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    set_timeouts(op.get_bind(), lock_seconds=4, statement_seconds=60)
    ${upgrades if upgrades else "pass"}
