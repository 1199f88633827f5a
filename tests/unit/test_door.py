"""Nothing but the door opens files that others can have written."""

from __future__ import annotations

import ast
import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fedex_scale.files import checked, kinds
from fedex_scale.files.patterns import Matcher
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.text import readable

PACKAGE = Path(__file__).parents[2] / "fedex_scale"
READS = {"read_text", "read_bytes", "safe_open", "load_file", "memmap", "fromfile"}
PARSES = {("json", "load"), ("json", "loads"), ("yaml", "safe_load"), ("yaml", "load")}
LOADS = {("torch", "load"), ("pickle", "load"), ("pickle", "loads"), ("np", "load")}
# What is not from outside: files that come along, the kernel's, and what this process wrote.
EXEMPT = {
    "runtime/door.py": "the door",
    "config/yamlfile.py": "parses what the door gave",
    "config/recipes.py": "files that come along",
    "engine/models.py": "files that come along",
    "scoring/post_hoc.py": "files that come along",
    "data/template_trial.py": "/proc",
    "runtime/faults.py": "/proc",
    "runtime/phases.py": "/proc, and a trace that this process wrote",
    "planning/machine.py": "/proc",
    "scoring/evaluation.py": "a setting that this process wrote",
    "sites/base.py": "a setting that this process wrote",
    "tasks/images.py": "decodes what the door gave",
    "data/textfiles.py": "the user's own data, after `check_file`",
    "data/places.py": "the user's own data, looked at line by line within bounds of its own",
    "scoring/asked.py": "the user's own prompts, within bounds of its own",
}
APART = "flower"  # runs where flwr alone is; the commands that it calls have the door


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.stem)
def test_nothing_else_opens_files_from_outside(file: Path) -> None:
    place = file.relative_to(PACKAGE)
    if str(place) not in EXEMPT and place.parts[0] != APART:
        assert list(readings(ast.parse(file.read_text(encoding="utf-8")))) == []


def readings(tree: ast.Module) -> Iterator[str]:
    """Yield each call that reads or parses a file."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        owner = getattr(getattr(called, "value", None), "id", "")
        if owner == "door":
            continue
        modes = [x.value for x in node.args if isinstance(x, ast.Constant)]
        writes = any(isinstance(mode, str) and mode[:1] in "wxa" for mode in modes if mode)
        is_open = name == "open" and owner not in ("webbrowser", "os", "trackers") and not writes
        if name in READS or (owner, name) in PARSES | LOADS or is_open:
            yield f"line {node.lineno}: {owner}.{name}"


def test_what_is_no_regular_file_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "a pipe"), ("zero", "a device"), ("folder", "a directory")):
        with pytest.raises(UserError, match=f"expected a regular file, got {kind}"):
            door.read_bytes(tmp_path / name)


def test_a_link_may_lead_within_its_directory_only(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "secret").write_text("{}")
    (home / "own").write_text("{}")
    (home / "near").symlink_to("own")
    (home / "far").symlink_to("../secret")
    assert door.read_bytes(home / "near", inside=home) == b"{}"
    with pytest.raises(UserError, match="got a link to"):
        door.read_bytes(home / "far", inside=home)


def test_a_hubs_cache_links_to_its_blobs(tmp_path: Path) -> None:
    model = tmp_path / "models--a--b"
    snapshot = model / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs" / "x").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/x")
    assert door.read_bytes(snapshot / "config.json", inside=snapshot) == b"{}"


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        "NaN",
        "[-Infinity]",
        "1e999",
        "1" + "0" * 30,
        "[" * 100 + "]" * 100,
        "[" * 100_000,
        '{"a":' * 50 + "1" + "}" * 50,
        '"\\ud800"',
        "{",
        "",
    ],
)
def test_json_that_is_not_taken(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        door.parse_json(text)


def test_json_that_is_taken() -> None:
    tree = {"a": [1, 2.5, None, True, "x\u00e9"], "b": {"c": {}}}
    assert door.parse_json(json.dumps(tree)) == tree


def test_size_and_lines_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 101)
    assert len(door.read_bytes(tmp_path / "a", most=101)) == 101
    with pytest.raises(UserError, match="expected at most 100 bytes"):
        door.read_bytes(tmp_path / "a", most=100)
    (tmp_path / "b").write_bytes(b"ab\ncd\n" + b"x" * (door.MAX_LINE_BYTES + 2**20))
    lines = door.read_lines(tmp_path / "b")
    assert [next(lines), next(lines)] == [b"ab", b"cd"]
    with pytest.raises(UserError, match="expected lines of at most"):
        next(lines)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a|aa)+b",
        "(.*)*x",
        "(x+x+)+y",
        "(?:.*a){0,30}b",
        "[",
        "(?P<",
        "((((a{99}){99}){99}){99})",
        "(?R)+",
        "(?i)q",
        "(a+)+" * 40,
        "(" * 45 + "a+" + ")+" * 45 + "b",
    ],
)
def test_a_strangers_pattern_is_matched_in_time_or_refused(pattern: str) -> None:
    name, began = "model.layers.0." + "a" * 60 + "x" * 60, time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    matcher = Matcher("adapter_config.json")
    with suppress(UserError):
        matcher.check([pattern])
        for i in range(50):
            matcher.first({pattern: 4}, f"{name}{i}", 8)
    assert time.process_time() - began < 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**18  # 256 MB


def test_patterns_mean_what_they_mean_to_peft() -> None:
    matcher = Matcher("x")
    layer = "model.layers.3.self_attn.q_proj"
    assert matcher.first({"q_proj": 2}, layer, 8) == 2
    assert matcher.first({"k_proj": 2}, layer, 8) == 8
    assert matcher.first({"roj": 2}, layer, 8) == 8
    assert matcher.first({r"layers\.\d{1,2}\.(?:self_attn|mlp)\..*": 2}, layer, 8) == 2
    assert matcher.first({r"layers\.[0-3]\..*": 2}, layer, 8) == 2
    assert matcher.first({"k_proj": 1, "self_attn.q_proj": 2, "q_proj": 3}, layer, 8) == 2
    many = {f"layers.{i}.q_proj": i + 1 for i in range(20_000)}
    assert matcher.first(many, "layers.19999.q_proj", 8) == 20_000
    assert matcher.targets(".*q_proj", [layer]) == [layer]
    assert matcher.targets("q_proj", [layer]) == []
    assert matcher.targets(["q_proj"], [layer]) == [layer]


def test_what_is_shown_is_text() -> None:
    hostile = "a\x1b[31mred\x07\u202ertl\ud800\x9b2J" + "n" * 1_000_000
    shown = readable(hostile)
    assert shown.isprintable()
    assert len(shown) < 5_000
    assert str(UserError(f"{hostile}: wrong")).endswith(": wrong")


def test_a_kind_names_file_and_key(tmp_path: Path) -> None:
    file = tmp_path / "partition.json"
    for text, told in (
        ("[]", "it: expected"),
        ('{"clients": 3}', "clients: expected a list, got 3"),
        ('{"clients": []}', "clients: "),
        (
            '{"clients": [{"num_examples": true}]}',
            "clients.0.num_examples: expected a whole number",
        ),
        ('{"clients": [{"num_examples": -1}]}', "clients.0.num_examples: expected at least 0"),
        ("{}", "expected clients, got none"),
    ):
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            checked.read(kinds.PartitionFile, file)
        assert str(caught.value).startswith(f"{file}: {told}"), caught.value
