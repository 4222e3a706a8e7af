"""The layers of docs/decisions/0001: import-linter's contracts, and what those cannot say."""

import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from core.jobs.states import LEGAL
from tests.deploy.module_list import PAGE, listed
from tests.deploy.module_list import modules as module_paths

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TORCH = ("torch", "diffusers", "safetensors", "transformers", "huggingface_hub")

BLOCKED = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {TORCH!r}:
            raise ImportError(f"{{name}} is not installed here")

sys.meta_path.insert(0, Blocked())
"""


def packages() -> set[str]:
    """Top-level packages that are the service; tests, examples and the like are not."""
    included = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    return {pattern.removesuffix("*") for pattern in included}


def modules(*names: str) -> list[str]:
    found: list[str] = []
    for name in names:
        for path in sorted((ROOT / name).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] in ("__init__", "__main__") else parts))
    return found


def test_the_contracts_hold() -> None:
    tool = Path(sysconfig.get_path("scripts")) / "lint-imports"
    done = subprocess.run([str(tool), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(PROJECT['tool']['importlinter']['contracts'])} kept, 0 broken" in done.stdout


def test_every_package_of_the_service_is_under_the_contracts() -> None:
    covered = set(PROJECT["tool"]["importlinter"]["root_packages"])
    assert packages() - covered == {"migrations"}  # Alembic loads it by path; it imports core and is imported by nobody
    on_disk = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert on_disk - packages() <= {"tests", "pretraining", "examples", "benchmarks"}


@pytest.mark.parametrize("package", ["api", "client"])
def test_every_module_imports_without_torch(package: str) -> None:
    """The whole package, transitively, in a process where torch's family is not to be had."""
    names = modules(package)
    code = f"{BLOCKED}\nimport importlib\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_block_blocks() -> None:
    """Control of the test above."""
    code = f"{BLOCKED}\nimport core.diffusion.bank\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "torch is not installed here" in done.stderr


def test_upkeep_and_the_one_shot_commands_need_no_torch() -> None:
    """They run from the API's image."""
    names = ["worker.upkeep", "core.db.migrate", "core.storage.__main__", "core.tenants.__main__"]
    code = f"{BLOCKED}\nimport importlib\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_module_is_named_for_nothing() -> None:
    """STYLE: a file's name says what is in it."""
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
    assert [name for name in modules(*packages()) if vague & set(name.split("."))] == []


def test_the_architecture_page_lists_every_module() -> None:
    page = PAGE.read_text()
    assert listed(page) == set(module_paths()), "python -m tests.deploy.module_list writes it anew"


def test_the_architecture_page_draws_every_move_between_states() -> None:
    diagram = PAGE.read_text().split("stateDiagram-v2")[1].split("```")[0]
    drawn = set(re.findall(r"^  ([a-z_]+) --> ([a-z_]+)", diagram, re.MULTILINE))
    assert drawn == {(str(source), str(target)) for source, targets in LEGAL.items() for target in targets}
