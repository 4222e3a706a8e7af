from pathlib import Path

import pytest

from client.config import find_config
from client.errors import ClientError


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    (tmp_path / "api_key").write_text("dfk_from_file\n")
    return tmp_path


def test_the_key_file_of_a_local_service_is_found(data_dir: Path) -> None:
    config = find_config({"DIFFFIT_DATA_DIR": str(data_dir)})
    assert (config.url, config.api_key) == ("http://127.0.0.1:8321", "dfk_from_file")
    assert config.source == str(data_dir / "api_key")


def test_the_environment_goes_before_the_file(data_dir: Path) -> None:
    environment = {"DIFFFIT_API_KEY": "dfk_from_env", "DIFFFIT_URL": "https://example.org/"}
    config = find_config(environment, data_dir)
    assert (config.url, config.api_key, config.source) == ("https://example.org/", "dfk_from_env", "DIFFFIT_API_KEY")


def test_the_services_own_port_setting_leads_to_it(data_dir: Path) -> None:
    assert find_config({"DIFFFIT_PORT": "9000"}, data_dir).url == "http://127.0.0.1:9000"


def test_the_address_that_the_service_wrote_down_leads_to_it(data_dir: Path) -> None:
    (data_dir / "url").write_text("http://127.0.0.1:9001\n")
    assert find_config({}, data_dir).url == "http://127.0.0.1:9001"
    assert find_config({"DIFFFIT_PORT": "9000"}, data_dir).url == "http://127.0.0.1:9000"
    (data_dir / "url").write_text("http://[::1]:8321\n")
    assert find_config({}, data_dir).url == "http://[::1]:8321"


def test_a_missing_key_is_said_only_when_it_is_needed(tmp_path: Path) -> None:
    config = find_config({}, tmp_path)
    assert config.api_key is None
    with pytest.raises(ClientError, match=r"no API key: set DIFFFIT_API_KEY, or start a service with `difffit up`"):
        config.required_key()


@pytest.mark.parametrize("url", ["ftp://example.org", "127.0.0.1:8321", "http://", "http://host:port"])
def test_an_address_that_is_none_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="DIFFFIT_URL"):
        find_config({"DIFFFIT_URL": url}, tmp_path)


def test_a_bad_address_is_said_to_be_of_where_it_came_from(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"^DIFFFIT_PORT makes 'http://127.0.0.1:http': it must be an address like"):
        find_config({"DIFFFIT_PORT": "http"}, tmp_path)
    (tmp_path / "url").write_text("http://::1:8321\n")
    with pytest.raises(ClientError, match=f"^{tmp_path}/url says 'http://::1:8321': it must be an address like"):
        find_config({}, tmp_path)


def test_a_key_file_that_is_a_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "api_key").mkdir()
    with pytest.raises(ClientError, match="cannot read the key file"):
        find_config({}, tmp_path)
