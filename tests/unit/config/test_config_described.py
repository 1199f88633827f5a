"""What is told of the settings is what they are: page, schema, template, command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from fedex_scale.config import describe
from fedex_scale.config.load import load_config
from fedex_scale.config.section import key_schemas, to_dict
from fedex_scale.config.settings import Config
from fedex_scale.runtime.errors import UserError

ROOT = Path(__file__).parents[3]
KEYS = [
    f"{name}.{key}"
    for name, field in Config.model_fields.items()
    for key in key_schemas(field.annotation)
]


@pytest.mark.parametrize(
    ("path", "written"), [(describe.PAGE, describe.page), (describe.SCHEMA, describe.schema)]
)
def test_what_is_generated_is_not_stale(path: Path, written) -> None:
    remedy = "run `python -m fedex_scale.config.describe`"
    assert path.read_text(encoding="utf-8") == written(), remedy


def test_every_key_is_on_the_page_in_the_template_and_told_of_alone() -> None:
    page, template = describe.page(), describe.template()
    for name in KEYS:
        section, _, key = name.partition(".")
        rows = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        (row,) = [row for row in rows.splitlines() if row.startswith(f"| `{key}` |")]
        told = describe.explain(name)
        assert told.startswith(f"{name}: ")
        sentence = told.partition("\n")[2]
        assert sentence.replace("|", r"\|") in row
        assert sentence in " ".join(line.strip().lstrip("# ") for line in template.splitlines())
        assert told in describe.explain(section)


def test_the_template_holds_every_default_and_loads(tmp_path: Path) -> None:
    path, plain = tmp_path / "run.yaml", tmp_path / "plain.yaml"
    path.write_text(describe.template(), encoding="utf-8")
    plain.write_text("", encoding="utf-8")
    asked = ["model.path=m", "data.path=d"]
    assert load_config(path, asked) == load_config(plain, asked)
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert [f"{name}.{key}" for name, section in tree.items() for key in section] == KEYS
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value) == "model.path: missing; add it to the config"


@pytest.mark.parametrize(
    ("override", "fits"),
    [
        ("lora.rank=8", True),
        ("lora.rank=0", False),
        ("lora.rank=8.5", False),
        ("lora.rnak=8", False),
        ("lora.target_modules=[q_proj]", True),
        ("lora.target_modules=[]", False),
        ("method.name=fedx", False),
        ("train.max_steps=null", True),
        ("train.max_steps=none", True),
        ("train.batch_size=none", False),
        ("train.batch_size=1000000001", False),
        ("run.seed=1" + 18 * "0" + "1", False),
        ("federation.client_fraction=1.5", False),
        ("evaluation.batch_size=auto", True),
        ("evaluation.batch_size=some", False),
        ("run.trackers=[wandb]", True),
        ("run.trackers=[comet]", False),
        ("unknown.key=1", False),
    ],
)
def test_the_schema_says_what_the_settings_say(
    override: str, fits: bool, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as if it were installed
    name, _, value = override.partition("=")
    section, _, key = name.partition(".")
    tree = {"model": {"path": "m"}, "data": {"path": "d"}, section: {key: yaml.safe_load(value)}}
    schema = json.loads(describe.SCHEMA.read_text(encoding="utf-8"))
    assert jsonschema.Draft202012Validator(schema).is_valid(tree) == fits
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    if fits:
        jsonschema.validate(to_dict(load_config(path)), schema)
    else:
        with pytest.raises(UserError, match=rf"^{section}"):
            load_config(path)


@pytest.mark.parametrize(
    "tree",
    [
        {"model": {"path": "m"}, "data": {"path": "d"}, "train": None},
        {"model": {"path": "m"}, "partition": {"kind": "sites", "files": ["a.jsonl"]}},
    ],
)
def test_the_schema_takes_empty_sections_and_sites_for_data(tree: dict) -> None:
    jsonschema.validate(tree, json.loads(describe.SCHEMA.read_text(encoding="utf-8")))
    load_config(tree)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("train.paking", "did you mean train.packing?"),
        ("packing", "did you mean train.packing?"),
        ("trian", "did you mean train?"),
        ("xyzzy", "known sections are run, model, lora"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--explain: unknown key {name}; {hint}")):
        describe.explain(name)


def test_the_command_checks_a_file_and_imports_nothing_heavy(tmp_path: Path) -> None:
    good = command("--check", ROOT / "launch" / "quickstart.yaml", "lora.rank=4")
    assert (good.returncode, good.stderr) == (0, "")
    bad = command("--check", ROOT / "launch" / "quickstart.yaml", "lora.rnak=4", "train.packing=3")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == (
        "error: lora.rnak: unknown key; did you mean rank?; "
        "train.packing: expected true or false, got 3; the default is false\n"
    )


def test_the_command_prints_the_template_or_a_key() -> None:
    assert command().stdout == describe.template()
    assert command("--explain", "train.packing").stdout == describe.explain("train.packing") + "\n"
    for wrong in (["lora.rank=4"], ["--explain", "lora.rank", "--check", "x.yaml"]):
        done = command(*wrong)
        assert done.returncode == 2
        assert done.stderr.startswith("error: config: expected --check FILE")


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `fedex-scale config`; it fails where what takes seconds to import is imported."""
    program = """
import sys
from fedex_scale.cli import main
try:
    main(['config', *sys.argv[1:]])
finally:
    assert not {'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules)
"""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
