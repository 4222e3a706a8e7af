"""What `.env.example` and the table in `docs/operations.md` must say, from the settings themselves.

`python -m tests.deploy.env_example` writes both anew.
"""

from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from core.settings import Settings

ROOT = Path(__file__).parents[2]

_HEAD = """\
# Every setting of the service. Copy this file to `.env` and change what you need: a line that is commented out shows
# the default, and an empty value stands for it. Environment variables of the same names win over `.env`, which the
# service alone reads: for `difffit` on the command line export what it needs (DIFFFIT_URL, DIFFFIT_DATA_DIR).
"""

_COMPOSE = """
# --- docker-compose.yml only ------------------------------------------------------------------------------------------
# It sets the database, the broker and the object store itself: the lines above for them do not count there (an override
# file does, see docs/operations.md).
#
# Change the two secrets before the first start: PostgreSQL keeps the password that its volume was made with. Letters
# and digits alone, as they stand in a URL: `openssl rand -hex 24`.

POSTGRES_PASSWORD=only-for-development
S3_ACCESS_KEY_ID=difffit
S3_SECRET_ACCESS_KEY=only-for-development

# Where the API is published: the host's own address alone, unless you say otherwise (the port is DIFFFIT_PORT).
# API_BIND=127.0.0.1

# The tag of the images that are built.
# IMAGE_TAG=0.1.0

# A package index for torch in the worker's image; empty takes the default build, for GPUs and CPUs.
# TORCH_INDEX_URL=

# Memory of the device worker, of the cpu worker (datasets), and of every other container.
# DEVICE_MEMORY=8g
# DATASETS_MEMORY=3g
# SERVICE_MEMORY=2g
"""

TABLE_START = "<!-- settings: written by `python -m tests.deploy.env_example` -->"
TABLE_END = "<!-- end of settings -->"


def variable(name: str) -> str:
    return f"DIFFFIT_{name.upper()}"


def default_of(field: FieldInfo) -> str:
    """As one writes it in `.env`; empty where the default is worked out or there is none."""
    value: Any = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, SecretStr):
        return ""
    if isinstance(value, list):
        return ",".join(str(Path(item).relative_to(ROOT)) if Path(item).is_absolute() else item for item in value)
    return str(value)


def env_example() -> str:
    parts = [_HEAD]
    for name, field in Settings.model_fields.items():
        parts.append(f"\n# {field.description}\n# {variable(name)}={default_of(field)}\n")
    return "".join([*parts, _COMPOSE])


def settings_table() -> str:
    rows = ["| setting | default | what it is |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = f"`{default_of(field)}`" if default_of(field) else ""
        rows.append(f"| `{variable(name)}` | {default} | {field.description} |")
    return "\n".join([TABLE_START, *rows, TABLE_END])


def with_table(page: str) -> str:
    before, rest = page.split(TABLE_START)
    return before + settings_table() + rest.split(TABLE_END)[1]


def main() -> None:
    (ROOT / ".env.example").write_text(env_example())
    page = ROOT / "docs" / "operations.md"
    page.write_text(with_table(page.read_text()))


if __name__ == "__main__":
    main()
