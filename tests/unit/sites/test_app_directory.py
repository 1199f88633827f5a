"""What `fedex-scale federate init` and `federate keys` write, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from sites import write_federation

from fedex_scale.cli import main
from fedex_scale.config.load import load_config


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["federate", *map(str, arguments)])
    return ended.value.code or 0, capsys.readouterr().err


@pytest.fixture
def options(tiny_llama: Path, tmp_path: Path) -> dict[str, object]:
    folder = write_federation(tiny_llama, tmp_path)
    (tmp_path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----")
    return {
        "--config": folder / "server.yaml",
        "--run": tmp_path / "run",
        "--address": "server.example:9093",
        "--certificate": tmp_path / "ca.pem",
    }


@pytest.mark.parametrize(("key", "value"), [("--address", "nonsense"), ("--certificate", "no.pem")])
def test_a_place_that_cannot_be_is_named(
    key: str, value: str, options: dict, tmp_path: Path, capsys
) -> None:
    given = [str(x) for item in (options | {key: value}).items() for x in item]
    code, error = told(capsys, "init", tmp_path / "app", *given)
    assert (code, error.count("error: ")) == (2, 1)
    assert f"error: {key}: expected" in error
    assert not (tmp_path / "app").exists()


def test_a_host_that_is_none_is_named(tmp_path: Path, capsys) -> None:
    code, error = told(
        capsys, "keys", tmp_path / "k", "--sites", 1, "--host", "bad host,IP:1.2.3.4"
    )
    assert (code, error.count("error: --host: expected a name")) == (2, 1)
    assert not (tmp_path / "k").exists()


@pytest.mark.parametrize(
    ("tasks", "holdout", "at_sites"),
    [([], "auto", "auto"), (["fedex_gsm8k"], "auto", 0), (["fedex_gsm8k"], 0.2, 0.2)],
)
def test_sites_hold_out_what_a_simulation_would(
    tasks: list[str], holdout: object, at_sites: object, options: dict, tmp_path: Path, capsys
) -> None:
    file = options["--config"]
    tree = yaml.safe_load(file.read_text())
    told_too = {"data": {"path": "x", "holdout": holdout}, "evaluation": {"tasks": tasks}}
    file.write_text(yaml.safe_dump(tree | told_too))
    code, error = told(
        capsys, "init", tmp_path / "app", *[str(x) for item in options.items() for x in item]
    )
    assert code == 0, error
    assert load_config(tmp_path / "app" / "site.yaml").data.holdout == at_sites
