"""YAML and overrides become a checked config; every mistake is named, all of them at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedex_scale.config.load import load_config
from fedex_scale.config.section import key_schemas, replace, to_dict
from fedex_scale.config.settings import Config
from fedex_scale.config.words import expected
from fedex_scale.runtime.errors import UserError

KEYS = [
    f"{name}.{key}"
    for name, field in Config.model_fields.items()
    for key in key_schemas(field.annotation)
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 40)
    | st.integers(min_value=10**300)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["1", "5e-4", "inf", "nan", "auto", "none", "fedex", "all-linear"])
)
MINIMAL = {"model": {"path": "some/model"}, "data": {"path": "rows.jsonl"}}
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(SCALARS, SCALARS, max_size=2)


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


@pytest.mark.parametrize("word", ["none", "None", "null"])
def test_none_is_nothing_where_a_key_may_be_null(load, word: str) -> None:
    overrides = ["engine.deepspeed=zero2", "data.num_examples=3", "model.quantization=nf4"]
    overrides += [f"engine.deepspeed={word}", f"data.num_examples={word}"]
    config = load(*overrides, "model.quantization=none", "data.template=none")
    assert (config.engine.deepspeed, config.data.num_examples) == (None, None)
    assert (config.model.quantization, config.data.template) == ("none", "none")
    with pytest.raises(UserError, match="batch_size: expected a whole number from 1 to"):
        load(f"train.batch_size={word}")


def test_a_path_is_emptied_by_an_override(load) -> None:
    config = load("model.path=", "model.config=smollm2-135m", "model.random=true")
    assert config.model.path == "smollm2-135m"
    with pytest.raises(UserError, match=r"^model\.path: missing; add it"):
        load("model.path=")


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
        ("lora.rank=4.5", "a whole number from 1 to 65,536, got 4.5; the default is 32"),
        ("lora.rank=true", "a whole number from 1 to 65,536, got true"),
        ("lora.rank=", "a whole number from 1 to 65,536, got null"),
        ("lora.alpha=big", "a number from 1e-12 to 1,000,000,000, got 'big'"),
        ("lora.alpha=true", "a number from 1e-12 to 1,000,000,000, got true"),
        ("run.name=5", "text, got 5"),
        ("run.overwrite=1", "true or false, got 1"),
        ("train.max_steps=all", "a whole number from 1 to 1,000,000,000 or null, got 'all'"),
        ("run.trackers=wandb", "a list of any of tensorboard, wandb, trackio"),
        ("run.profile_steps=3", "a list of whole numbers from 1 to 1,000,000,000, got 3"),
        ("evaluation.tasks=[5]", "a list of text, got [5]"),
        ("lora.target_modules=[1, 2]", "non-empty text or a non-empty list of text"),
        ("aggregate.fold=up", "one of side, planes, carry, round, got 'up'"),
        ("method.name=fedx", "one of fedit, fedex"),
        ("lora=7", "a section with keys, got 7"),
    ],
)
def test_wrong_types_say_what_was_expected(load, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(override)
    assert f"{override.partition('=')[0]}: expected {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.name=a/b", "a plain name"),
        ("run.name=..", "a plain name"),
        ("run.name=.", "a plain name"),
        ("run.name=''", "a plain name"),
        ("run.trackers=[dvc]", "a list of any of tensorboard, wandb, trackio, mlflow, got ['dvc']"),
        ("run.profile_steps=[3, 0]", "a list of whole numbers from 1 to 1,000,000,000, got [3, 0]"),
        ("lora.rank=0", "a whole number from 1 to 65,536, got 0"),
        ("lora.alpha=0", "a number from 1e-12 to 1,000,000,000"),
        ("lora.alpha=nan", "a number from 1e-12 to 1,000,000,000"),
        ("lora.alpha=.inf", "a number from 1e-12 to 1,000,000,000, got inf"),
        ("lora.alpha=1e999", "a number from 1e-12 to 1,000,000,000, got '1e999'"),
        ("lora.dropout=1", "a number of at least 0 and below 1"),
        ("lora.target_modules=[]", "non-empty text or a non-empty list of text"),
        ("data.max_length=0", "a whole number from 1 to 1,000,000,000"),
        ("partition.num_clients=0", "a whole number from 1 to 1,000,000"),
        ("federation.rounds=0", "a whole number from 1 to 100,000"),
        ("federation.client_fraction=0", "a number above 0"),
        ("federation.client_fraction=1.5", "a number above 0"),
        ("method.svd_rank=0", "a whole number from 1 to 1,000,000,000 or null, got 0"),
        ("aggregate.side_rank=0", "a whole number from 1 to 1,000,000,000"),
        ("train.batch_size=0", "a whole number from 1 to 1,000,000,000"),
        ("train.micro_batch_size=0", "a whole number from 1 to 1,000,000,000"),
        ("train.local_epochs=0", "a whole number from 1 to 1,000,000,000"),
        ("train.max_steps=0", "a whole number from 1 to 1,000,000,000 or null"),
        ("train.warmup_ratio=1", "a number of at least 0 and below 1"),
        ("train.learning_rate=0", "a number above 0"),
        ("train.learning_rate=nan", "a number above 0"),
        ("train.weight_decay=-1", "a number from 0 to 1,000,000,000"),
        ("train.max_grad_norm=nan", "a number from 0 to 1,000,000,000"),
        ("evaluation.data={a: 5}", "a mapping of names to text or a mapping of names to text, or"),
        ("evaluation.limit=0", "a whole number from 1 to 1,000,000,000 or null"),
        ("evaluation.batch_size=0", "a whole number from 1 to 1,000,000,000"),
    ],
)
def test_values_that_cannot_be_are_refused(load, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(override)
    assert f"{override.partition('=')[0]}: expected {message}" in str(caught.value)


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
        "train.batch_size: expected a whole number from 1 to 1,000,000,000, got 'many'",
        "federation.rounds: expected a whole number from 1 to 100,000, got 0",
        "aggregate.fold: expected one of",
        "federation.bogus: unknown key",
        "model.dtype: expected one of auto, float32, bfloat16",
    ):
        assert part in message


def test_a_model_needs_a_path_or_a_config(load) -> None:
    with pytest.raises(UserError, match=r"model\.path: missing; add it to the config"):
        load(model={"dtype": "float32"})


def test_missing_sections_are_named(load) -> None:
    with pytest.raises(UserError) as caught:
        load(text="")
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


def test_a_saved_config_is_plain_data_in_the_form_it_always_had(load) -> None:
    saved = to_dict(load("run.profile_steps=[3]", "lora.alpha=8", "train.max_grad_norm=2"))
    assert list(saved) == (
        "run model lora task data partition federation method aggregate train engine evaluation "
        "site".split()
    )
    assert saved["lora"] == {
        "rank": 32,
        "alpha": 8.0,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "use_rslora": False,
    }
    assert list(saved["evaluation"].items())[:2] == [("tasks", []), ("data", None)]
    assert saved["run"]["profile_steps"] == [3]
    assert saved["train"]["max_grad_norm"] == 2.0
    kinds = {type(value) for section in saved.values() for value in section.values()}
    assert kinds <= {str, int, float, bool, list, dict, type(None)}


def test_a_model_without_weights_is_known_by_its_config(load) -> None:
    config = load(model={"config": "mistral-7b", "random": True})
    assert to_dict(config)["model"]["path"] == config.model.path == "mistral-7b"


def test_a_changed_copy_is_checked_like_a_new_config(load) -> None:
    config = load()
    other = replace(config, lora=replace(config.lora, rank=8))
    assert (config.lora.rank, other.lora.rank, other.train) == (32, 8, config.train)
    with pytest.raises(UserError, match=r"^lora\.rank: expected a whole number from 1 to 65,536"):
        replace(config.lora, rank=0)
    with pytest.raises(UserError, match=r"^lora\.rnak: unknown key; did you mean rank\?$"):
        replace(config.lora, rnak=8)
    carried = replace(config, aggregate=replace(config.aggregate, fold="carry"))
    with pytest.raises(UserError, match=r"^aggregate\.fold: a nf4 base cannot take a residual"):
        replace(carried, model=replace(config.model, quantization="nf4"))


@given(data=st.data())
def test_any_value_is_taken_as_it_is_or_refused_by_its_name(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(KEYS))
    section, _, key = name.partition(".")
    value = data.draw(VALUES)
    tree = {**MINIMAL, section: {**MINIMAL.get(section, {}), key: value}}
    told = None
    try:
        taken = to_dict(Config(**tree))[section][key]
    except UserError as error:
        told = str(error)
    if told is not None:
        assert told.startswith(f"{section}.")
        assert "\n" not in told
        assert "pydantic" not in told
    elif isinstance(value, str) and isinstance(taken, float):
        assert taken == float(value)  # YAML reads 5e-4 as text
    elif type(value) is int and isinstance(taken, float):
        assert taken == float(value)  # a double rounds a whole number of 300 digits
    elif value is None and taken == "":
        assert name in ("model.path", "data.path")
    elif value in ("none", "None") and taken is None:
        assert "null" in expected(key_schemas(Config.model_fields[section].annotation)[key])
    else:
        assert taken == value
        assert isinstance(taken, bool) == isinstance(value, bool)
        assert isinstance(value, int) or not isinstance(taken, int)


def test_settings_do_not_change_once_they_are_checked(load) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load().lora.rank = 8


def test_every_setting_is_explained_where_it_is_defined() -> None:
    for name, field in Config.model_fields.items():
        for key, schema in key_schemas(field.annotation).items():
            assert schema.get("description"), f"{name}.{key}"
