"""The list of modules in `docs/architecture.md`, from their own first lines.

`python -m tests.deploy.module_list` writes it anew.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
START = "<!-- modules: written by `python -m tests.deploy.module_list` -->"
END = "<!-- end of modules -->"

_PACKAGES = ("api", "worker", "core", "client", "migrations", "pretraining")
# Files whose role is in their name carry no docstring; this is what the role means.
_ROLES = {
    "api/schemas/": "Bodies and replies of the noun.",
    "core/models/": "The noun's table.",
    "/repository.py": "Queries, of one tenant's rows alone.",
    "core/datasets/limits.py": "What one dataset may cost us.",
}


def modules() -> list[str]:
    """Every module with code in it, as a path."""
    paths = [path for package in _PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    own = [path for path in paths if "versions" not in path.parts and ".work" not in path.parts]
    return [path.relative_to(ROOT).as_posix() for path in own if path.name != "__init__.py"]


def listed(page: str) -> set[str]:
    section = page.split(START)[1].split(END)[0]
    return {line.split("`")[1] for line in section.splitlines() if line.startswith("| `")}


def line_of(path: str) -> str:
    documented = ast.get_docstring(ast.parse((ROOT / path).read_text()))
    first = (documented or "").split("\n")[0]
    if not first:
        first = next((role for part, role in _ROLES.items() if part in path), "")
    return f"| `{path}` | {first.replace('|', chr(92) + '|')} |"


def with_modules(page: str) -> str:
    before, rest = page.split(START)
    rows = "\n".join(["| module | what it is |", "|---|---|", *map(line_of, modules())])
    return f"{before}{START}\n{rows}\n{END}{rest.split(END)[1]}"


def main() -> None:
    PAGE.write_text(with_modules(PAGE.read_text()))


if __name__ == "__main__":
    main()
