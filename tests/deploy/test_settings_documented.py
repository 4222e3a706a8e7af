import os
from pathlib import Path

import pytest

from core.settings import Settings
from tests.deploy.env_example import ROOT, env_example, variable, with_table

REGENERATE = "python -m tests.deploy.env_example writes it anew"


def test_env_example_lists_every_setting_with_its_default_and_description() -> None:
    assert (ROOT / ".env.example").read_text() == env_example(), REGENERATE


def test_the_operators_page_lists_every_setting() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    assert page == with_table(page), REGENERATE


def test_every_setting_says_what_it_is_in_a_sentence() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, f"{name} has no description"
        assert field.description.endswith("."), f"{name}: {field.description}"


def test_a_copied_example_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = Settings(_env_file=None)  # pyright: ignore[reportCallIssue]
    (tmp_path / ".env").write_text(env_example())
    assert Settings() == plain  # pyright: ignore[reportCallIssue]


def test_an_example_with_every_line_in_force_is_the_default_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values are written as the settings read them."""
    monkeypatch.chdir(tmp_path)
    plain = Settings(_env_file=None)  # pyright: ignore[reportCallIssue]
    shown = [line.removeprefix("# ") for line in env_example().splitlines() if line.startswith("# DIFFFIT_")]
    (tmp_path / ".env").write_text("\n".join(shown))
    read = Settings()  # pyright: ignore[reportCallIssue]
    assert read.model_copy(update={"bases": plain.bases}) == plain
    assert [os.path.basename(base) for base in read.bases] == [os.path.basename(base) for base in plain.bases]
    assert {line.split("=")[0] for line in shown} <= {variable(name) for name in Settings.model_fields}


@pytest.mark.parametrize("name", ["database_url", "s3_secret_access_key", "broker_url"])
def test_a_secret_is_not_shown_when_settings_are(tmp_path: Path, name: str) -> None:
    settings = Settings(_env_file=None, data_dir=tmp_path, **{name: "hunter2"})  # pyright: ignore
    assert "hunter2" not in f"{settings!r} {settings} {settings.model_dump()}"


def test_a_wrong_value_is_named_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFFIT_PORT", "hunter2")
    with pytest.raises(ValueError, match="port") as refused:
        Settings(_env_file=None, data_dir=tmp_path)  # pyright: ignore[reportCallIssue]
    assert "hunter2" not in str(refused.value)
