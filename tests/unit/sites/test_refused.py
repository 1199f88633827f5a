"""What does not fit is named on one line, and the federation goes on without it where it can."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sites import write_federation
from tiny import make_llama, near, save_adapter

from fedex_scale import cli
from fedex_scale.files.adapters import Adapter
from fedex_scale.runtime.errors import UserError
from fedex_scale.sites.sent import digest_of
from fedex_scale.sites.server_round import server_round

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a federation whose first round is open."""
    folder = write_federation(tiny_llama, tmp_path_factory.mktemp("refused"))
    server_round(folder / "run", folder / "server.yaml", say=lambda line: None)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """Return a copy of it, where two sound results of three have arrived."""
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    for client in (0, 1):
        arrive(run, client)
    return run


def arrive(run: Path, client: int) -> Path:
    """Put a result where the server looks for it, as if it had been trained."""
    from fedex_scale.sites.sent import read_sent

    sent, start = read_sent(run / "sent" / "round-0001")
    server = Adapter(run / "sent" / "round-0001" / "adapter")
    pairs = near({x: server.pair(x) for x in server.layers}, spread=0.02, seed=client)
    out = save_adapter(run / "arrived" / "round-0001" / f"from-{client}", pairs, alpha=sent.alpha)
    told = {"format": 1, "start": start, "round": 1, "client": client, "num_examples": 10}
    told |= {"num_steps": 1, "num_tokens": 99, "first_loss": 2.0, "last_loss": 1.0, "seconds": 1.0}
    (out / "client.json").write_text(json.dumps(told))
    return out


def tell(out: Path, **changes: object) -> None:
    path = out / "client.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(out: Path, how: Callable[[dict[str, torch.Tensor]], dict]) -> None:
    tensors = how(load_file(out / WEIGHTS))
    save_file({name: x.contiguous() for name, x in tensors.items()}, out / WEIGHTS)


def settings(out: Path, **changes: object) -> None:
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def first(tensors: dict[str, torch.Tensor], new: Callable[[torch.Tensor], torch.Tensor]) -> dict:
    name = next(iter(tensors))
    return tensors | {name: new(tensors[name])}


def linked(out: Path) -> None:
    (out / WEIGHTS).rename(out.parent / ".elsewhere")
    (out / WEIGHTS).symlink_to(out.parent / ".elsewhere")


BAD = {
    "NaN": lambda out: change(out, lambda x: first(x, lambda t: t * float("nan"))),
    "Inf": lambda out: change(out, lambda x: first(x, lambda t: t / 0)),
    "too large": lambda out: change(out, lambda x: first(x, lambda t: t * 0 + 3e38)),
    "whole numbers": lambda out: change(out, lambda x: {k: v.int() for k, v in x.items()}),
    "a layer less": lambda out: change(out, lambda x: dict(list(x.items())[2:])),
    "a layer more": lambda out: change(
        out, lambda x: x | {k.replace("layers.0", "layers.7"): v.clone() for k, v in x.items()}
    ),
    "another shape": lambda out: change(out, lambda x: first(x, lambda t: t[:, :-1])),
    "a whole weight": lambda out: change(
        out, lambda x: x | {"base_model.model.lm_head.weight": torch.ones(2, 2)}
    ),
    "a higher rank": lambda out: (
        settings(out, r=8),
        change(
            out,
            lambda x: {k: torch.cat([v, v], dim=0 if "lora_A" in k else 1) for k, v in x.items()},
        ),
    ),
    "DoRA": lambda out: settings(out, use_dora=True),
    "cut short": lambda out: (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:-7]),
    "no weights": lambda out: (out / WEIGHTS).unlink(),
    "a link": linked,
    "no client.json": lambda out: (out / "client.json").unlink(),
    "client.json is no JSON": lambda out: (out / "client.json").write_text("{"),
    "client.json is deep": lambda out: (out / "client.json").write_text("[" * 99_999),
    "a wrong round": lambda out: tell(out, round=2),
    "another start": lambda out: tell(out, start="0" * 64),
    "a number that another has": lambda out: tell(out, client=1),
    "a number beyond the sites": lambda out: tell(out, client=3),
    "a number that is none": lambda out: tell(out, client=True),
    "no examples": lambda out: tell(out, num_examples=0),
    "half an example": lambda out: tell(out, num_examples=0.5),
    "a key that nobody knows": lambda out: tell(out, weight=1e9),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_result_is_left_out_by_name(bad: str, run: Path, folder: Path) -> None:
    BAD[bad](arrive(run, 2))
    lines: list[str] = []
    server_round(run, say=lines.append)
    (line,) = [line for line in lines if line.startswith("refused: ")]
    assert "from-2" in line
    assert "\n" not in line
    assert "2 of 3 sites" in lines[1]
    told = json.loads((run / "server" / "round-0001" / "aggregate.json").read_text())
    assert (told["clients"], told["weights"], told["skipped"]) == ([0, 1], [0.5, 0.5], [2])
    assert (run / "sent" / "round-0002" / "server.json").is_file()
    assert not list((run / "clients" / "round-0001").glob(".*"))


def test_nothing_that_can_be_used_is_an_error_that_changes_nothing(run: Path) -> None:
    for client in (0, 1):
        tell(run / "arrived" / "round-0001" / f"from-{client}", round=7)
    with pytest.raises(UserError, match="got 0"):
        server_round(run, say=lambda line: None)
    assert not (run / "sent" / "round-0002").exists()
    shutil.rmtree(run / "arrived")
    with pytest.raises(UserError, match="got 0"):
        server_round(run, say=lambda line: None)


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that a user must put right, and return its only line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(x) for x in arguments])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.count("error:") == 1, told
    assert "Traceback" not in told
    return told.splitlines()[-1]


@pytest.mark.parametrize("fold", ["carry", "round", "planes"])
def test_a_fold_into_the_base_is_refused_by_name(fold: str, folder: Path, capsys) -> None:
    line = command(
        capsys, "server-round", folder / fold, "--config", folder / "server.yaml",
        f"aggregate.fold={fold}",
    )  # fmt: skip
    assert f"aggregate.fold: expected side, got {fold}" in line
    assert not (folder / fold).exists()


SETTINGS = {
    "method.name=ffa": "method.name: expected fedex",
    "lora.rank=5": "lora.rank: expected at most 4",
    "site.number=3": "site.number: expected a number below 3",
    "site.number=null": "site.number: missing",
    "lora.target_modules=[q_proj]": "expected the server's layers",
    "lora.use_rslora=true": "lora.use_rslora: expected False",
}


@pytest.mark.parametrize("override", SETTINGS)
def test_settings_that_do_not_go_with_the_servers(override: str, folder: Path, capsys) -> None:
    line = client(folder, capsys, override)
    assert SETTINGS[override] in line


def client(folder: Path, capsys, *overrides: str, sent: str = "run/sent/round-0001") -> str:
    out = folder / "out"
    arguments = ("--config", folder / "site-0.yaml", "--server", folder / sent, "--out", out)
    line = command(capsys, "client-round", *arguments, *overrides)
    assert not out.exists()
    assert not list((folder / "sites").rglob("*.safetensors"))
    return line


def test_another_model_is_refused_before_training(folder: Path, tiny_llama: Path, capsys) -> None:
    wide = make_llama(folder / "wide", inner=120)
    assert "whose intermediate_size is 112, got 120" in client(folder, capsys, f"model.path={wide}")
    other = shutil.copytree(tiny_llama, folder / "other")
    for file in other.glob("*.safetensors"):
        save_file({k: v + 1 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    assert "expected the server's weights" in client(folder, capsys, f"model.path={other}")
    words = shutil.copytree(tiny_llama, folder / "words")
    text = (words / "tokenizer.json").read_text()
    tree = json.loads(text)
    vocabulary = tree["model"]["vocab"]
    one, two = [word for word, number in vocabulary.items() if number in (50, 51)]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (words / "tokenizer.json").write_text(json.dumps(tree))
    assert "expected the server's tokenizer" in client(folder, capsys, f"model.path={words}")


def test_a_state_that_is_none_or_was_changed(folder: Path, capsys) -> None:
    assert "found no server.json" in client(folder, capsys, sent="nowhere")
    state = folder / "state"
    shutil.copytree(folder / "run" / "sent" / "round-0001", state)
    with (state / "adapter" / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert "expected the file that server.json names" in client(folder, capsys, sent="state")
    (state / "adapter" / WEIGHTS).unlink()
    assert "expected the file that server.json names" in client(folder, capsys, sent="state")
    told = json.loads((state / "server.json").read_text())
    (state / "server.json").write_text(json.dumps(told | {"round": 0}))
    assert "'round'" in client(folder, capsys, sent="state")
    files = {"../../escape": told["files"].popitem()[1]}
    (state / "server.json").write_text(json.dumps(told | {"files": files}))
    assert "expected the files" in client(folder, capsys, sent="state")


@pytest.mark.parametrize(("number", "words"), [(float("nan"), "got NaN"), (1e30, "within 1e+06")])
def test_a_state_that_no_server_made(number: float, words: str, folder: Path, capsys) -> None:
    """Its digests are right: whoever made it meant it."""
    state = folder / "poisoned"
    shutil.rmtree(state, ignore_errors=True)
    shutil.copytree(folder / "run" / "sent" / "round-0001", state)
    file = state / "adapter" / WEIGHTS
    tensors = load_file(file)
    tensors[min(tensors)].fill_(number)
    save_file(tensors, file)
    told = json.loads((state / "server.json").read_text())
    told["files"][f"adapter/{WEIGHTS}"] = [file.stat().st_size, digest_of(file)]
    (state / "server.json").write_text(json.dumps(told))
    assert words in client(folder, capsys, sent="poisoned")


def test_other_settings_of_a_run_that_was_begun(folder: Path, capsys) -> None:
    config = yaml.safe_load((folder / "server.yaml").read_text())
    (folder / "other.yaml").write_text(yaml.safe_dump(config | {"run": {"seed": 9}}))
    line = command(capsys, "server-round", folder / "run", "--config", folder / "other.yaml")
    assert "was begun with other settings" in line
    assert "--config FILE begins one" in command(capsys, "server-round", folder / "nowhere")
