"""Scores by lm-eval's own vLLM backend, in another environment: vLLM's pins are not ours."""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedex_scale.config.words import named
from fedex_scale.engine import models
from fedex_scale.files.adapters import Adapter
from fedex_scale.reporting.serving import VLLM_RANKS, rank_limit
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError
from fedex_scale.scoring import evaluation
from fedex_scale.scoring.post_hoc import Subject

NEEDS = ("vllm", "lm_eval", "fedex_scale", "math_verify", "pydantic", "datasets")
_ASK = f"import importlib.util as u; print(*(m for m in {NEEDS} if u.find_spec(m) is None))"
_MOST = 2**32  # bytes of a file of samples


def score(subject: Subject, out: Path, python: str) -> dict[str, Any]:
    """Score the model, write results.json and samples.jsonl, and return lm-eval's results.

    Args:
        python: of the environment that has vLLM, lm-eval and this package.

    Raises:
        UserError: what that environment lacks, what vLLM cannot serve, or that lm-eval failed.
    """
    evaluation.check_tasks(subject.section, models.positions(subject.model))
    _check_environment(python)
    with tempfile.TemporaryDirectory() as scratch:
        asked = command(subject, python, Path(scratch))
        print(shlex.join(asked), flush=True)
        done = subprocess.run(asked, check=False)
        if done.returncode:
            raise UserError(
                f"--backend vllm: lm-eval ended with {done.returncode} and says why above; correct "
                "that, or leave --backend out"
            )
        results = _read(Path(scratch) / "told")
    evaluation.write_results(dict(results), out)
    return results


def command(subject: Subject, python: str, scratch: Path) -> list[str]:
    """Return lm-eval's command, which writes what comes out to `scratch`/told.

    Raises:
        UserError: an adapter of more columns than vLLM serves, or a setting that it cannot take.
    """
    section, model = subject.section, subject.model
    own = section.include_path
    ours = [name for name in section.tasks if evaluation.is_ours(name)]
    if own and ours:
        raise UserError(
            f"--backend vllm: expected tasks of {named(own)} or of this project, got both; score "
            "them one after the other"
        )
    told = {"data": section.data, "data_dir": section.data_dir}
    options = {
        "--include_path": own or str(evaluation.TASKS_DIR),
        "--limit": section.limit,
        "--num_fewshot": section.num_fewshot,
        "--metadata": json.dumps({key: value for key, value in told.items() if value}),
        "--batch_size": "auto",
        "--output_path": str(scratch / "told"),
    }
    given = [
        word for key, value in options.items() if value is not None for word in (key, str(value))
    ]
    asked = [python, "-m", "lm_eval", "run", "--model", "vllm", "--log_samples", *given]
    if model.trust_remote_code:
        asked.append("--trust_remote_code")
    return [*asked, "--tasks", *section.tasks, "--model_args", *_model_args(subject)]


def _model_args(subject: Subject) -> Iterator[str]:
    model = subject.model
    if model.quantization != "none":
        raise UserError(
            f"--backend vllm: expected a base that is not packed, got {model.quantization}; leave "
            "--backend out"
        )
    given = {"pretrained": model.path, "revision": model.revision}
    if model.dtype != "auto":
        given["dtype"] = model.dtype
    if models.base_config(model).model_type.startswith("gemma"):
        given["add_bos_token"] = "True"
    if subject.adapter is not None:
        rank = Adapter(subject.adapter).rank
        limit = rank_limit(rank)
        if limit is None:
            raise UserError(
                f"--backend vllm: expected an adapter of at most {VLLM_RANKS[-1]} columns, got "
                f"{rank}; fedex-scale export RUN --merged --dtype float32, and score that model"
            )
        given |= {"lora_local_path": str(subject.adapter), "max_lora_rank": str(limit)}
    for name, value in given.items():
        if value is not None:
            if set(value) & set(",="):
                raise UserError(
                    f"--backend vllm: {name}: expected no comma or =, which lm-eval takes for its "
                    f"own, got {named(value)}; rename it"
                )
            yield f"{name}={value}"


def _check_environment(python: str) -> None:
    try:
        done = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=False)
        lacks = done.stdout.split() if not done.returncode else ["a Python that starts"]
    except OSError:
        lacks = ["a Python that starts"]
    if lacks:
        raise UserError(
            f"--python: {named(python)} lacks {', '.join(lacks)}; in an environment of its own, "
            "pip install vllm 'lm-eval[math]' pydantic math-verify, and pip install --no-deps "
            "fedex_scale"
        )


def _read(folder: Path) -> dict[str, Any]:
    """Return what lm-eval wrote, in the form that it has in this process."""
    remedy = "score once more"
    (file,) = folder.rglob("results_*.json")
    results = door.read_json(file, remedy, most=_MOST)
    results["samples"] = {}
    for path in sorted(folder.rglob("samples_*.jsonl")):
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        rows = [door.parse_json(line, finite=False) for line in door.read_lines(path)]
        for row in rows:
            row["arguments"] = [list(x.values()) for x in row["arguments"].values()]
        results["samples"][task] = rows
    return results
