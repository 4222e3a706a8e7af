"""docs/api.md names every route and every error code, and nothing else."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from api.errors import domain_problem
from api.routes import ROUTERS
from core.errors import Conflict
from core.training.hyperparameters import NAMES

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "api.md").read_text()

# Where replies of the API get their codes. Those of archives are in docs/datasets.md.
SOURCES = [
    "api/**/*.py",
    "core/errors.py",
    "core/bases.py",
    "core/storage/*.py",
    "core/tenants/*.py",
    "core/jobs/*.py",
    "core/adapters/service.py",
    "core/adapters/repository.py",
    "core/samples/*.py",
    "core/evaluations/*.py",
    "core/datasets/service.py",
    "core/datasets/repository.py",
]
NEVER_SENT = {
    "error",  # the families' base
    "bad_settings",  # said at start
    "bad_tenant_name",  # tenants are made by the operator
    "tenant_exists",
    "tenant_busy",
    "object_corrupt",  # whoever finds one says of what
}
FROM_WORKERS = {"adapter_corrupt", "cancelled", "image_not_finite", "unknown_prompt"}  # on an image request's row
SPELLED_OUT = {"malformed_json", "internal_error", "method_not_allowed"}  # given to `problem` as they are


def test_every_route_is_described_with_a_line_to_try() -> None:
    described = set(re.findall(r"^### `([A-Z]+ [^`]+)`$", PAGE, re.MULTILINE))
    offered = {
        f"{method} {route.path.replace(':path}', '}')}"
        for router in ROUTERS
        for route in router.routes
        for method in route.methods or ()
        if route.include_in_schema
    }
    assert described == offered
    for section in PAGE.split("\n### ")[1:]:
        assert "```sh\ncurl " in section, section.splitlines()[0]


def test_every_error_code_is_listed_and_every_listed_one_exists() -> None:
    table = PAGE.split("## Error codes")[1]
    rows = [line.split("|")[2] for line in table.splitlines() if re.match(r"\| \d", line)]
    listed = {code for row in rows for code in re.findall(r"`([a-z_]+)`", row)}
    texts = [path.read_text() for path in _sources()]
    known = {code for text in texts for code in re.findall(r"\bcode ?= ?\"([a-z_]+)\"", text)}
    assert listed == (known - NEVER_SENT) | FROM_WORKERS | SPELLED_OUT


def test_the_conflicts_that_are_said_to_pass_are_those_that_may_be_tried_again() -> None:
    rows = [row.split("|") for row in PAGE.split("## Error codes")[1].splitlines() if row.startswith("| 409 |")]
    codes = {
        code: "`Retry-After`" in told for _, _, named, told, _ in rows for code in re.findall(r"`([a-z_]+)`", named)
    }
    raised = {code for path in _sources() for code, passes in _codes(ast.parse(path.read_text())) if passes}
    assert {code for code, passes in codes.items() if passes} == raised & codes.keys() != set()


def test_a_conflict_says_whether_to_try_again() -> None:
    passing = domain_problem(Conflict("it is so", retry_after_seconds=3), "/").headers
    standing = domain_problem(Conflict("it is so"), "/").headers
    assert (passing["retry-after"], "x-should-retry" in passing) == ("3", False)
    assert ("retry-after" in standing, standing["x-should-retry"]) == (False, "false")


def _sources() -> list[Path]:
    return [path for source in SOURCES for path in REPOSITORY.glob(source)]


def _codes(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Each code that an error is raised with or a class of errors has, and whether it says when to try again."""
    for node in ast.walk(tree):
        given: dict[str | None, ast.expr] = {}
        if isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
        elif isinstance(node, ast.ClassDef):
            plain = [item for item in node.body if isinstance(item, ast.Assign)]
            given = {ast.unparse(item.targets[0]): item.value for item in plain}
        code = given.get("code")
        if isinstance(code, ast.Constant):
            yield str(code.value), "retry_after_seconds" in given


def test_every_hyperparameter_is_described() -> None:
    table = PAGE.split("Hyperparameters;")[1].split("###")[0]
    named = {
        name
        for line in table.splitlines()
        for name in re.findall(r"`([a-z_]+)`", line.split("|")[1] if "|" in line else "")
    }
    assert named == NAMES
