"""What the README and `examples/` tell people to run, run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.service import RunningService
from tests.e2e.shapes import shapes_zip

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
NEEDS_CURL = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.fixture
def at_service(service: RunningService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to work in, with the service's address and key in the environment."""
    monkeypatch.setenv("DIFFFIT_URL", service.url)
    monkeypatch.setenv("DIFFFIT_API_KEY", service.key_file.read_text().strip())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes.zip").write_bytes(shapes_zip())
    return tmp_path


def test_the_readmes_python_runs_as_it_stands(service: RunningService, at_service: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    here = {
        "path/to/images": "shapes.zip",
        "examples/mnist_digits_32.zip": "shapes.zip",
        "emoji-dit-64": "tiny-dit",
        "digit-3": "disc",
        "seed=1)\n    for": 'seed=1, hyperparameters={"steps": 4})\n    for',
        '"steps": 800': '"steps": 4',
        "http://127.0.0.1:8321": service.url,
        ".difffit/api_key": str(service.key_file),
    }
    for block in blocks:
        for written, meant in here.items():
            block = block.replace(written, meant)
        exec(compile(block, "README.md", "exec"), {})
    assert (at_service / "three.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "quickstart.py", "{digits}", "--steps", "4"],
        [sys.executable, "openai_client.py", "{digits}", "digit-3", "--steps", "4"],
        pytest.param(["bash", "curl.sh", "{digits}", "digit-3", "4"], marks=NEEDS_CURL),
        [sys.executable, "quickstart.py", "shapes.zip"],
        [sys.executable, "openai_client.py", "shapes.zip", "disc"],
        pytest.param(["bash", "curl.sh", "shapes.zip", "disc"], marks=NEEDS_CURL),
    ],
    ids=lambda command: f"{command[1]} {command[2].strip('{}')}",
)
def test_an_example_runs_with_steps_and_without(command: list[str], at_service: Path) -> None:
    program, script, *rest = command
    digits = str(ROOT / "examples" / "mnist_digits_32.zip")
    command = [program, str(ROOT / "examples" / script), *(word.format(digits=digits) for word in rest)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert list(at_service.rglob("*.png"))
