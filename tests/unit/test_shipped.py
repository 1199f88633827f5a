"""Recipes and DeepSpeed files are found by name from anywhere, and files of one's own by path."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedex_scale.cli import main
from fedex_scale.config.load import load_config
from fedex_scale.config.recipes import copy, recipes, text_of
from fedex_scale.config.settings import Config
from fedex_scale.config.shipped import locate, names_of, shipped
from fedex_scale.engine.ds_config import read_settings
from fedex_scale.runtime.errors import UserError

OWN = {"model": {"path": "own"}, "data": {"path": "own.jsonl"}}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_means_what_comes_along_whatever_lies_here(elsewhere: Path) -> None:
    (elsewhere / "quickstart").write_text(yaml.safe_dump(OWN), encoding="utf-8")
    (elsewhere / "zero3").write_text("{}", encoding="utf-8")
    assert load_config("quickstart").run.name == "quickstart"
    assert read_settings("zero3")["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("written", ["./quickstart", "quickstart.yaml", Path("quickstart")])
def test_what_is_written_as_a_path_is_one(written: str | Path, elsewhere: Path) -> None:
    (elsewhere / written).write_text(yaml.safe_dump(OWN), encoding="utf-8")
    assert load_config(written).model.path == "own"


def test_the_command_line_keeps_a_path_a_path(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "quickstart").write_text("own: {}", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["config", "--check", "./quickstart"])
    assert "own: unknown key" in capsys.readouterr().err


def test_a_path_from_before_still_works_in_a_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shipped("ds_configs").parent)
    assert read_settings("ds_configs/zero3.json") == read_settings("zero3")


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        ("ds_configs", "zero3_ofload", "did you mean zero3_offload?"),
        ("ds_configs", "", "choose one of zero0, zero2"),
        ("ds_configs", "none", "choose one of zero0, zero2"),
        ("recipes", "quickstrat", "did you mean quickstart?"),
        ("recipes", "own", "./own"),
        ("recipes", "..", "expected a name"),
    ],
)
def test_a_name_of_none_is_told_the_nearest(kind: str, given: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        locate(kind, given, "key")
    assert told in str(caught.value)


@pytest.mark.parametrize("given", ["launch/quickstart.yaml", Path("quickstart"), "quickstart.yml"])
def test_a_path_to_no_file_is_told_the_name(given: str | Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*; did you mean quickstart\?"):
        load_config(given)


def test_a_deepspeed_name_is_checked_with_the_settings() -> None:
    with pytest.raises(UserError, match=r"^engine\.deepspeed: .* got zero4; did you mean zero3\?"):
        load_config("quickstart", ["engine.deepspeed=zero4"])
    with pytest.raises(UserError, match=r"cannot read ds_configs/zero4\.json .* mean zero3\?"):
        read_settings("ds_configs/zero4.json")


def test_a_deepspeed_file_holds_an_object(elsewhere: Path) -> None:
    (elsewhere / "own.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(UserError, match=r"own\.json: expected an object, got \[1\]"):
        read_settings("own.json")


def test_settings_come_as_a_tree_a_config_or_a_name() -> None:
    tree = {"model": {"path": Path("own")}, "data": {"path": "own.jsonl"}, "lora": None}
    config = load_config(tree)
    assert config == load_config(config) == Config(**OWN)
    changed = load_config(config, {"lora.rank": 4, "lora.target_modules": ["q_proj"]})
    assert changed == load_config(tree, ["lora.rank=4", "lora.target_modules=[q_proj]"])
    assert tree["lora"] is None


@pytest.mark.parametrize(
    ("override", "told"),
    [("lora.rnak", "did you mean rank"), ("lora", "expected a section"), ("model.path.x", "value")],
)
def test_an_override_of_a_mapping_is_checked_like_any(override: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config(OWN, {override: 4})
    assert OWN["model"] == {"path": "own"}


def test_every_recipe_says_what_it_is_for_and_runs_on() -> None:
    assert [recipe.name for recipe in recipes()] == names_of("recipes")
    for recipe in recipes():
        assert recipe.purpose.endswith("."), recipe
        assert any(word in recipe.hardware for word in ("GPU", "CPU")), recipe


def test_a_copy_runs_and_completes_in_an_editor(elsewhere: Path) -> None:
    for name in names_of("recipes"):
        file = copy(name, elsewhere / "my recipes")
        assert load_config(file) == load_config(name)
        lines = file.read_text(encoding="utf-8").splitlines()
        schema = lines[0].partition("$schema=file://")[2]
        assert json.loads(Path(schema).read_text(encoding="utf-8"))["title"]
        assert shlex.split(lines[1]) == ["#", "fedex-scale", "run", "--config", str(file)]
        assert text_of(name).splitlines()[0] == lines[0]


def test_a_copy_never_overwrites(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "quickstart.yaml").write_text("mine", encoding="utf-8")
    (elsewhere / "link").mkdir()
    (elsewhere / "link" / "quickstart.yaml").symlink_to(elsewhere / "nowhere")
    for out in (".", "link", "quickstart.yaml", "/proc/nowhere"):
        with pytest.raises(SystemExit) as ended:
            main(["recipes", "quickstart", "--out", out])
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert (elsewhere / "quickstart.yaml").read_text(encoding="utf-8") == "mine"
    assert not (elsewhere / "nowhere").exists()


def test_an_unknown_recipe_is_told_the_nearest(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--out", "."]):
        for name in ("quickstrat", "../launch/quickstart", "quickstart.yaml"):
            with pytest.raises(SystemExit) as ended:
                main(["recipes", name, *more])
            assert ended.value.code == 2
            assert capsys.readouterr().err.endswith("did you mean quickstart?\n")
    assert list(elsewhere.iterdir()) == []


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, time; began = time.perf_counter(); import fedex_scale; "
        "took = time.perf_counter() - began; known = set(sys.modules); "
        "assert not known & {'torch', 'transformers', 'pydantic', 'yaml', 'typer'}, known; "
        "print(took)"
    )
    command = [sys.executable, "-c", program]
    assert min(float(subprocess.check_output(command)) for _ in range(3)) < 0.2
