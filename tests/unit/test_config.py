"""YAML and overrides become a checked config; every mistake is named, all of them at once."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
import yaml

from fedex_scale.config import Config, load_config, to_dict
from fedex_scale.errors import UserError

MINIMAL = {"model": {"path": "some/model"}, "data": {"path": "rows.jsonl"}}


@pytest.fixture
def load(tmp_path: Path):
    def load(*overrides: str, text: str | None = None, **sections: object) -> Config:
        path = tmp_path / "run.yaml"
        tree = {**MINIMAL, **sections}
        path.write_text(yaml.safe_dump(tree) if text is None else text, encoding="utf-8")
        return load_config(path, overrides)

    return load


def test_defaults_are_the_papers_recipe(load) -> None:
    config = load()
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (32, 16, 0)
    assert (config.train.learning_rate, config.train.warmup_ratio) == (5e-4, 0.02)
    assert (config.train.local_epochs, config.train.batch_size) == (1, 32)
    assert (config.federation.rounds, config.partition.num_clients) == (1, 3)
    assert (config.method.name, config.federation.init, config.aggregate.fold) == (
        "fedex",
        "shared",
        "side",
    )


@pytest.mark.parametrize("text", ["5e-4", "5.0e-4", "0.0005", "'5e-4'"])
def test_numbers_are_numbers_however_yaml_reads_them(load, text: str) -> None:
    assert load(f"train.learning_rate={text}").train.learning_rate == 5e-4
    yaml_text = yaml.safe_dump(MINIMAL) + f"train: {{learning_rate: {text}}}\n"
    assert load(text=yaml_text).train.learning_rate == 5e-4


def test_a_whole_number_serves_as_a_number(load) -> None:
    config = load("lora.alpha=8")
    assert config.lora.alpha == 8.0
    assert isinstance(config.lora.alpha, float)


def test_overrides_win_and_the_last_one_counts(load) -> None:
    config = load("lora.rank=4", "lora.rank=5", "run.name=b", run={"name": "a", "seed": 3})
    assert (config.lora.rank, config.run.name, config.run.seed) == (5, "b", 3)


def test_overrides_hold_lists_mappings_nothing_and_text(load) -> None:
    config = load(
        "lora.target_modules=[q_proj, v_proj]",
        "evaluation.tasks=[a, b]",
        "evaluation.data={a: x.jsonl}",
        "train.max_steps=3",
        "train.max_steps=null",
        "model.path=a=b",
    )
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.evaluation.tasks == ("a", "b")
    assert config.evaluation.data == {"a": "x.jsonl"}
    assert config.train.max_steps is None
    assert config.model.path == "a=b"


def test_an_override_reaches_a_section_that_the_file_leaves_empty(load) -> None:
    assert load("train.batch_size=7", train=None).train.batch_size == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnak=4", "lora.rnak: unknown key; did you mean rank?"),
        ("trian.batch_size=4", "trian: unknown key; did you mean train?"),
        ("lora.xyzzy=4", "lora.xyzzy: unknown key; known are rank, alpha"),
        ("lora.rank", "override: expected section.key=value, got 'lora.rank'"),
        ("lora.rank.deep=1", "override: rank in 'lora.rank.deep=1' is a value and not a section"),
    ],
)
def test_unknown_keys_name_the_nearest(load, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(override, lora={"rank": 8})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank=4.5", "lora.rank: expected a whole number, got 4.5"),
        ("lora.rank=true", "lora.rank: expected a whole number, got True"),
        ("lora.rank=", "lora.rank: expected a whole number, got None"),
        ("lora.alpha=big", "lora.alpha: expected a number, got 'big'"),
        ("lora.alpha=true", "lora.alpha: expected a number, got True"),
        ("run.name=5", "run.name: expected text, got 5"),
        ("run.overwrite=1", "run.overwrite: expected true or false, got 1"),
        ("train.max_steps=all", "train.max_steps: expected a whole number or nothing, got 'all'"),
        ("run.trackers=wandb", "run.trackers: expected a list of text, got 'wandb'"),
        ("run.profile_steps=3", "run.profile_steps: expected a list of whole numbers, got 3"),
        ("evaluation.tasks=[5]", "evaluation.tasks: expected a list of text, got [5]"),
        ("lora.target_modules=[1, 2]", "lora.target_modules: expected text or a list of text"),
        ("aggregate.fold=up", "aggregate.fold: expected one of side, carry, round, got 'up'"),
        ("method.name=fedx", "method.name: expected one of fedit, fedex"),
        ("lora=7", "lora: expected a section with keys, got 7"),
    ],
)
def test_wrong_types_say_what_was_expected(load, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.name=a/b", "run.name: expected a plain name"),
        ("run.name=..", "run.name: expected a plain name"),
        ("run.name=.", "run.name: expected a plain name"),
        ("run.name=''", "run.name: expected a plain name"),
        ("run.trackers=[mlflow]", "run.trackers: expected any of tensorboard, wandb, trackio"),
        ("run.profile_steps=[3, 0]", "run.profile_steps: expected numbers from 1, got [3, 0]"),
        ("lora.rank=0", "lora.rank: expected at least 1, got 0"),
        ("lora.alpha=0", "lora.alpha: expected a positive number"),
        ("lora.alpha=nan", "lora.alpha: expected a positive number"),
        ("lora.dropout=1", "lora.dropout: expected 0 to below 1"),
        ("lora.target_modules=[]", "lora.target_modules: expected names, got none"),
        ("data.max_length=0", "data.max_length: expected at least 1"),
        ("partition.num_clients=0", "partition.num_clients: expected at least 1"),
        ("federation.rounds=0", "federation.rounds: expected at least 1"),
        ("federation.client_fraction=0", "federation.client_fraction: expected a number above 0"),
        ("federation.client_fraction=1.5", "federation.client_fraction: expected a number above 0"),
        ("method.svd_rank=0", "method.svd_rank: expected at least 1"),
        ("aggregate.side_rank=0", "aggregate.side_rank: expected at least 1"),
        ("train.batch_size=0", "train.batch_size: expected at least 1"),
        ("train.micro_batch_size=0", "train.micro_batch_size: expected at least 1"),
        ("train.local_epochs=0", "train.local_epochs: expected at least 1"),
        ("train.max_steps=0", "train.max_steps: expected at least 1 or none"),
        ("train.warmup_ratio=1", "train.warmup_ratio: expected 0 to below 1"),
        ("train.learning_rate=0", "train.learning_rate: expected above 0"),
        ("train.learning_rate=nan", "train.learning_rate: expected above 0"),
        ("evaluation.limit=0", "evaluation.limit: expected at least 1 or none"),
        ("evaluation.batch_size=0", "evaluation.batch_size: expected at least 1"),
    ],
)
def test_values_that_cannot_be_are_refused(load, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(override)
    assert message in str(caught.value)


def test_all_problems_are_named_at_once(load) -> None:
    with pytest.raises(UserError) as caught:
        load(
            "lora.rnak=4",
            "train.batch_size=many",
            "aggregate.fold=up",
            "federation.rounds=0",
            "federation.bogus=0",
            model={"dtype": "float8"},
        )
    message = str(caught.value)
    for part in (
        "lora.rnak: unknown key",
        "train.batch_size: expected a whole number",
        "aggregate.fold: expected one of",
        "federation.bogus: unknown key",
        "model.dtype: expected one of auto, float32, bfloat16",
    ):
        assert part in message


def test_a_model_needs_a_path_or_a_config(load) -> None:
    with pytest.raises(UserError, match=r"model\.path: missing; add it to the config"):
        load(model={"dtype": "float32"})


def test_missing_sections_are_named() -> None:
    with pytest.raises(UserError) as caught:
        load_config("/dev/null")
    assert str(caught.value) == (
        "model: missing; add it to the config; data: missing; add it to the config"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method.name=centralized", "federation.client_fraction=0.5"],
            "federation.client_fraction: centralized has one client",
        ),
        (["method.name=ffa", "federation.init=per_client"], "federation.init: ffa shares one"),
        (["model.quantization=nf4", "aggregate.fold=carry"], "aggregate.fold: a nf4 base cannot"),
        (["method.assign=svd", "method.name=fedit"], "method.assign: svd needs method.name fedex"),
        (["method.svd_rank=3", "method.name=flora"], "method.svd_rank: needs method.name fedex"),
        (["data.schema=columns"], "data.prompt_column, data.response_column: expected both"),
        (["partition.kind=natural"], "partition.column: natural splits by a column, got none"),
    ],
)
def test_combinations_that_cannot_work_are_refused(load, overrides, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(*overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "run.yaml: not valid YAML"),
        ("- 1\n- 2\n", "run.yaml: expected sections (run, model, ...), got list"),
        ("run: 3\n", "run: expected a section with keys, got 3"),
    ],
)
def test_files_that_are_no_config(load, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(text=text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none.yaml", "."])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="--config: cannot read"):
        load_config(tmp_path / name)


def test_the_resolved_config_loads_again_as_itself(load, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as if it were installed
    config = load(
        "lora.target_modules=[q_proj]",
        "lora.alpha=8",
        "train.learning_rate=1e-5",
        "run.trackers=[tensorboard]",
        "evaluation.data={a: b}",
        "evaluation.tasks=[a]",
        "method.svd_rank=2",
        "partition.column=type",
    )
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    assert load_config(path) == config
    assert to_dict(load_config(path)) == to_dict(config)


def test_every_setting_is_explained_where_it_is_defined() -> None:
    """A string stands under each field of each section, as the style of the configs has it."""
    import ast
    import inspect

    for field in dataclasses.fields(Config):
        section = typing.get_type_hints(Config)[field.name]
        body = ast.parse(inspect.getsource(section)).body[0].body
        for statement, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                explained = isinstance(following, ast.Expr)
                assert explained, f"{field.name}.{statement.target.id}"
