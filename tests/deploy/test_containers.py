"""The files that only an engine can run, as far as they can be checked without one."""

import json
import re
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from core.datasets.limits import Limits
from tests.deploy.env_example import ROOT, env_example

BIN = Path(sysconfig.get_path("scripts"))
COMPOSE = ROOT / "docker-compose.yml"
OURS = ("migrate", "bucket", "api", "device-worker", "cpu-worker", "upkeep")


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BIN / tool), *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def compose(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The file as Compose resolves it, on a host without `.env`."""
    nothing = tmp_path_factory.mktemp("env") / "empty"
    nothing.touch()
    done = run("docker-compose", "--env-file", str(nothing), "-f", str(COMPOSE), "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("docker-compose", ["-f", "docker-compose.yml", "config", "--quiet"]),
        ("docker-compose", ["-f", "docker-compose.yml", "-f", "docker-compose.gpu.yml", "config", "--quiet"]),
        ("compose-lint", ["docker-compose.yml"]),
        (
            "check-jsonschema",
            ["--builtin-schema", "vendor.compose-spec", "docker-compose.yml", "docker-compose.gpu.yml"],
        ),
        ("hadolint", ["Dockerfile"]),
    ],
)
def test_the_tools_that_know_the_formats_find_nothing(tool: str, arguments: list[str]) -> None:
    done = run(tool, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_has_every_process_of_the_service(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {*OURS, "postgres", "valkey", "objects"}


@pytest.mark.parametrize("service", OURS)
def test_every_command_names_a_module_that_exists(compose: dict[str, Any], service: str) -> None:
    match compose["services"][service]["command"]:
        case ["python", "-m", module, *_]:
            name = module
        case ["celery", "-A", name, "worker", "-Q", queues, *_]:
            known = set(re.findall(r'"[a-z.]+": "([a-z]+)"', source_of(name)))
            assert set(queues.split(",")) <= known
        case command:
            raise AssertionError(f"{service} runs {command}, which this test does not know")
    assert find_spec(name) is not None, f"{service}: there is no module {name}"
    package = find_spec(name)
    if package is not None and package.submodule_search_locations:
        assert find_spec(f"{name}.__main__") is not None, f"python -m {name} has nothing to run"


def source_of(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text()


def test_every_queue_has_a_worker(compose: dict[str, Any]) -> None:
    served: set[str] = set()
    for service in compose["services"].values():
        command = service.get("command") or []
        if "-Q" in command:
            served |= set(command[command.index("-Q") + 1].split(","))
    assert served == set(re.findall(r'"[a-z.]+": "([a-z]+)"', source_of("worker.app")))


def test_work_starts_only_when_what_it_needs_is_there(compose: dict[str, Any]) -> None:
    for name in ("api", "device-worker", "cpu-worker", "upkeep"):
        needs = {key: value["condition"] for key, value in compose["services"][name]["depends_on"].items()}
        assert needs == {
            "migrate": "service_completed_successfully",
            "bucket": "service_completed_successfully",
            "valkey": "service_healthy",
        }, name


def test_whatever_stays_up_restarts_is_checked_and_is_given_time_to_end(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        if name in ("migrate", "bucket"):
            assert service["restart"] == "no"
            continue
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"], name
        assert service["stop_grace_period"] == "1m0s", name


def test_our_containers_are_not_privileged_and_write_to_their_volumes_alone(compose: dict[str, Any]) -> None:
    for name in OURS:
        service = compose["services"][name]
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name
        assert "no-new-privileges:true" in service["security_opt"], name


def test_a_dataset_of_the_largest_size_fits_its_worker(compose: dict[str, Any]) -> None:
    """Its child's memory and that of the worker itself in memory, archive and pack on a volume: /tmp is memory, too."""
    service = compose["services"]["cpu-worker"]
    assert int(service["mem_limit"]) >= Limits().memory_bytes + 1024**3
    assert service["environment"]["DIFFFIT_DATA_DIR"] == "/data"
    assert {(volume["type"], volume["target"]) for volume in service["volumes"]} == {("volume", "/data")}


def test_the_object_store_takes_no_room_before_it_needs_it(compose: dict[str, Any]) -> None:
    """Its image's entry point says `-master.volumePreallocate -master.volumeSizeLimitMB=1024` before our words."""
    command = compose["services"]["objects"]["command"]
    assert {"-master.volumePreallocate=false", "-master.volumeSizeLimitMB=256"} <= set(command)


def test_the_object_stores_flags_are_known_to_it(compose: dict[str, Any]) -> None:
    shown = run("weed", "help", "server")
    known = set(re.findall(r"^  -([\w.]+)", shown.stdout + shown.stderr, re.MULTILINE))
    verb, *flags = compose["services"]["objects"]["command"]
    assert verb == "server"
    assert {flag.lstrip("-").split("=")[0] for flag in flags} <= known


def test_only_the_api_is_published_and_to_this_host_alone(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    (port,) = published.pop("api")
    assert published == {}
    assert (port["host_ip"], port["target"], port["published"]) == ("127.0.0.1", 8321, "8321")


def test_the_broker_keeps_its_queue_and_never_evicts(compose: dict[str, Any]) -> None:
    words = " ".join(compose["services"]["valkey"]["command"])
    assert "--appendonly yes" in words
    assert "--maxmemory-policy noeviction" in words


def test_every_variable_of_compose_is_in_env_example_and_each_secret_is_marked() -> None:
    used = dict(re.findall(r"\$\{([A-Z0-9_]+):-([^}]*)\}", COMPOSE.read_text()))
    shown = dict(re.findall(r"^(?:# )?([A-Z0-9_]+)=(.*)$", env_example(), re.MULTILINE))
    assert used == {name: shown[name] for name in used}
    for name, default in used.items():
        if "PASSWORD" in name or "SECRET" in name:
            assert default == "only-for-development"


def test_the_api_image_is_built_without_torch() -> None:
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    by_name = {stage.split("\n", 1)[0].split(" AS ")[1]: stage for stage in stages}
    assert "[worker]" not in by_name["dependencies"] + by_name["runtime"] + by_name["api"]
    assert "--from=dependencies" in by_name["api"]
    assert "[worker]" in by_name["worker-dependencies"]
    assert re.search(r"^USER \d+$", by_name["runtime"], re.MULTILINE)


def test_the_image_holds_what_the_dockerfile_copies() -> None:
    copied = set(re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    names = {name for line in copied for name in line.split()}
    let_in = set(re.findall(r"^!([^/\n]+)/?$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert names == let_in
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_images_and_compose_run_the_same_commands(compose: dict[str, Any]) -> None:
    commands = [
        json.loads(line) for line in re.findall(r"^CMD (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    ]
    assert commands == [compose["services"][name]["command"] for name in ("api", "device-worker")]
