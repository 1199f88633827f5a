"""The live score, `fedex-scale evaluate` and plain lm-eval agree, example for example."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launching import ROOT, start
from rows import write_data
from safetensors.torch import load_file

from fedex_scale.reporting.serving import rank_limit
from fedex_scale.runtime.distributed import free_port
from fedex_scale.runtime.errors import UserError
from fedex_scale.scoring.post_hoc import find_subject, table

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
TASKS = ["fedex_word_problems", "fedex_boolq"]
Samples = dict[tuple[str, int], tuple]


def call(*arguments: object, data_dir: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of this environment in the project's directory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**environment, "FEDEX_SCALE_DATA": str(data_dir)},
        cwd=ROOT,
    )


def ours(directory: Path) -> Samples:
    """Read our samples: what was asked, written, read and judged, by task and example."""
    return {
        (row["task"], row["doc_id"]): (row["prompt"], row["output"], row["answer"], row["verdict"])
        for row in map(json.loads, (directory / "samples.jsonl").open())
    }


def by_lm_eval(directory: Path) -> Samples:
    """Read the same out of lm-eval's own files."""
    found = {}
    for file in directory.rglob("samples_*.jsonl"):
        task = next(task for task in TASKS if file.name.startswith(f"samples_{task}_"))
        for row in map(json.loads, file.open()):
            prompt = row["arguments"]["gen_args_0"]["arg_0"]
            verdict = {metric: row[metric] for metric in row["metrics"]}
            found[task, row["doc_id"]] = (
                prompt,
                [output for outputs in row["resps"] for output in outputs],
                row["filtered_resps"],
                verdict,
            )
    return found


def scores_of(results: dict) -> dict:
    """Return the numbers of lm-eval's results."""
    return {
        (task, metric): value
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, (int, float))
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("rows") / "data")


@pytest.fixture(scope="module")
def run(tiny_config: Path, data_dir: Path) -> Path:
    """A run whose folds changed the base, scored live after each round."""
    return train(tiny_config, data_dir, "scored", f"evaluation.tasks={json.dumps(TASKS)}")


def train(
    config: Path, data_dir: Path, name: str, *overrides: str, launcher: tuple[str, ...] = ()
) -> Path:
    done = start(
        [sys.executable, *launcher],
        config,
        f"run.name={name}",
        "aggregate.fold=carry",
        "evaluation.data=null",
        f"evaluation.data_dir={data_dir}",
        "evaluation.every_rounds=1",
        "train.learning_rate=0.03",
        *overrides,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(yaml.safe_load(config.read_text())["run"]["dir"]) / name


def test_three_ways_to_score_agree(run: Path, data_dir: Path, tmp_path: Path) -> None:
    live = score_again(run, data_dir, tmp_path)
    assert len(live) == 5 + 1
    assert live != ours(run / "evaluations" / "round-0000")


@pytest.mark.parametrize("engine", ["plain", "zero3"])
def test_three_ways_to_score_a_side_adapter_in_bf16_agree(
    engine: str, tiny_config: Path, tiny_llama: Path, data_dir: Path, tmp_path: Path
) -> None:
    """A side adapter of two rounds: bf16 while clients train, and scored as it is handed over."""
    settings, launcher = ["aggregate.fold=side", "model.dtype=bfloat16"], ()
    if engine == "zero3":
        settings.append("engine.deepspeed=ds_configs/zero3.json")
        port = f"--master-port={free_port()}"
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", port)
    tasks = f"evaluation.tasks={json.dumps(TASKS)}"
    run = train(tiny_config, data_dir, f"bf16-{engine}", tasks, *settings, launcher=launcher)
    assert not (run / "final" / "base").exists()
    live = score_again(run, data_dir, tmp_path, base=tiny_llama, dtype="bfloat16")
    assert len(live) == 5 + 1


@pytest.mark.skipif(not MODEL.is_dir(), reason="no model; `make model` fetches it")
def test_three_ways_to_score_a_pretrained_model_agree(
    tiny_config: Path, data_dir: Path, tmp_path: Path
) -> None:
    run = train(
        tiny_config,
        data_dir,
        "pretrained",
        f"evaluation.tasks={json.dumps(TASKS)}",
        f"model.path={MODEL}",
        "federation.rounds=1",
        "evaluation.before=false",
        "train.max_steps=3",
        "train.learning_rate=0.003",
    )
    live = score_again(run, data_dir, tmp_path)
    assert len({output[0] for _, output, *_ in live.values()}) > 1


def score_again(
    run: Path, data_dir: Path, tmp_path: Path, *, base: Path | None = None, dtype: str = "auto"
) -> Samples:
    """Score a finished run with both commands, compare with its live score, and return that."""
    base = base or run / "final" / "base"
    assert base.is_dir()
    done = call("fedex_scale.cli", "evaluate", run, "--out", tmp_path / "ours", data_dir=data_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    model = f"pretrained={base},peft={run}/final/adapter,dtype={dtype}"
    tasks = ["--include_path", "eval/tasks", "--tasks", ",".join(TASKS)]
    options = ["--device", "cpu", "--batch_size", 4, "--log_samples"]
    command = ["lm_eval", "--model", "hf", "--model_args", model, *tasks, *options]
    done = call(*command, "--output_path", tmp_path / "plain", data_dir=data_dir)
    assert done.returncode == 0, done.stderr[-3000:]

    last = max((run / "evaluations").iterdir())
    live = ours(last)
    assert ours(tmp_path / "ours") == live
    assert by_lm_eval(tmp_path / "plain") == live
    (plain,) = (tmp_path / "plain").rglob("results_*.json")
    files = [last / "results.json", tmp_path / "ours" / "results.json", plain]
    numbers = [scores_of(json.loads(file.read_text())) for file in files]
    assert numbers[0] == numbers[1] == numbers[2]
    assert ("fedex_boolq", "exact_match,none") in numbers[0]
    return live


def test_scoring_in_between_changes_nothing(run: Path, tiny_config: Path, data_dir: Path) -> None:
    silent = train(
        tiny_config, data_dir, "silent", "evaluation.tasks=[]", "evaluation.data_dir=null"
    )
    for name in ("final/adapter", "final/exact_adapter", "clients/round-0002/client-0002"):
        file = f"{name}/adapter_model.safetensors"
        scored, alone = load_file(run / file), load_file(silent / file)
        assert scored.keys() == alone.keys()
        assert all(scored[key].equal(alone[key]) for key in alone)
    for file in sorted((run / "final" / "base").glob("*.safetensors")):
        assert file.read_bytes() == (silent / "final" / "base" / file.name).read_bytes()


def test_a_stock_task_with_examples_needs_no_hub(
    tiny_llama: Path, data_dir: Path, tmp_path: Path
) -> None:
    scored = ["evaluate", tiny_llama, "--suite", "gsm8k", "--suite", "fedex_gsm8k"]
    options = ["--num-fewshot", 2, "--limit", 2, "--out", tmp_path / "out"]
    done = call("fedex_scale.cli", *scored, *options, data_dir=data_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    prompts = {task: prompt for (task, _), (prompt, *_) in ours(tmp_path / "out").items()}
    assert prompts["gsm8k"].count("Question: Ann has") == 2
    assert prompts["fedex_gsm8k"].count("### Instruction:") == 1


def test_what_cannot_be_scored_is_told_in_one_line(
    run: Path, data_dir: Path, tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    incomplete = tmp_path / "incomplete"
    shutil.copytree(run, incomplete)
    shutil.rmtree(incomplete / "final" / "base")
    done = call("fedex_scale.cli", "evaluate", incomplete, data_dir=data_dir)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "its folds changed the base, and" in done.stderr
    assert done.stderr.count("\n") == 1

    final, exact = run / "final" / "adapter", run / "final" / "exact_adapter"
    asked = {"tasks": ("fedex_boolq",)}
    for model, adapter, options, message in (
        (tiny_llama, final, asked, "as its run changed the base"),
        (tiny_gpt2, exact, asked, "expects a weight of shape"),
        (tiny_llama, None, {}, "--suite: expected at least one task"),
        (
            run,
            None,
            {"limit": 0},
            r"evaluation\.limit: expected a whole number from 1 to 1,000,000,000",
        ),
    ):
        with pytest.raises(UserError, match=message):
            find_subject(str(model), adapter, options)


def test_the_exact_adapter_of_a_run_goes_with_the_untouched_base(
    run: Path, tiny_llama: Path
) -> None:
    exact = run / "final" / "exact_adapter"
    assert find_subject(str(run), exact, {}).model.path == str(tiny_llama)
    assert find_subject(str(run), None, {}).model.path == str(run / "final" / "base")


def test_the_paper_s_row_stands_beside_a_score() -> None:
    metrics = {
        "exact_match,paper": 0.5,
        "exact_match_stderr,paper": 0.01,
        "exact_match,correct": 0.4,
    }
    results = {"results": {"fedex_gsm8k": metrics}, "n-samples": {"fedex_gsm8k": {"effective": 9}}}
    shown = table(results, ("mistralai/Mistral-7B-v0.1", "fedex"))
    cells = [list(map(str, column.cells)) for column in shown.columns]
    assert cells == [
        ["fedex_gsm8k/exact_match/paper", "fedex_gsm8k/exact_match/correct"],
        ["9", "9"],
        ["50.00%", "40.00%"],
        ["1.00%", ""],
        ["62.62%", ""],
    ]
    assert len(table(results, ("mistralai/Mistral-7B-v0.1", "flora")).columns) == 4


def by_vllm(run: Path, data_dir: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """Score with lm-eval's vLLM backend; transformers answer, in vLLM's place."""
    told = data_dir.parent / "told.json"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "fake_vllm")))
    return subprocess.run(
        [sys.executable, "-m", "fedex_scale.cli", "evaluate", run, "--backend", "vllm", *options],
        capture_output=True,
        text=True,
        timeout=600,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": paths,
            "FEDEX_SCALE_DATA": str(data_dir),
            "FAKE_VLLM_TOLD": str(told),
        },
        cwd=data_dir.parent,
    )


def test_vllm_is_asked_as_we_are(run: Path, data_dir: Path, tmp_path: Path) -> None:
    own = call("fedex_scale.cli", "evaluate", run, "--out", tmp_path / "hf", data_dir=data_dir)
    assert own.returncode == 0, own.stderr[-3000:]
    done = by_vllm(run, data_dir, "--out", tmp_path / "vllm")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{sys.executable} -m lm_eval run --model vllm" in done.stdout
    assert ours(tmp_path / "vllm") == ours(tmp_path / "hf")
    results = [json.loads((tmp_path / x / "results.json").read_text()) for x in ("vllm", "hf")]
    assert scores_of(results[0]) == scores_of(results[1])
    settings = json.loads((data_dir.parent / "told.json").read_text())
    rank = json.loads((run / "final/adapter/adapter_config.json").read_text())["r"]
    assert settings["enable_lora"]
    assert settings["max_lora_rank"] == rank_limit(rank)


def test_what_vllm_cannot_do_is_one_line(run: Path, data_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    for python in (bare, tmp_path / "none"):
        done = by_vllm(run, data_dir, "--python", python, "--out", tmp_path / "out")
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: --python: {python} lacks ")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
