"""`fedex-scale evaluate`: score what a run handed over, or any model, in a process of its own."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from fedex_scale.config.learning import ModelSection
from fedex_scale.config.section import replace
from fedex_scale.config.settings import EvaluationSection
from fedex_scale.config.words import named
from fedex_scale.engine import models
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.basefiles import BaseFiles, base_directory
from fedex_scale.files.run_dir import RunDir
from fedex_scale.methods.algebra import all_finite
from fedex_scale.runtime import distributed
from fedex_scale.runtime.display import make_display, scoring
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.outputs import check_out
from fedex_scale.runtime.text import cell
from fedex_scale.scoring import evaluation

log = logging.getLogger(__name__)

PAPER_SCORES = Path(__file__).with_name("paper_scores.yaml")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to score.

    Fields:
        model: the base, changed or not.
        adapter: a PEFT directory, or none.
        section: what to score it on.
        out: where the results go, if the caller names no other place.
        known_as: the base's name and the method, by which the paper's scores are found.
    """

    model: ModelSection
    adapter: Path | None
    section: EvaluationSection
    out: Path
    known_as: tuple[str, str] | None = None


def find_subject(
    name: str,
    adapter: Path | None,
    asked: Mapping[str, Any],
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """Return what to score: a run's final model, or a model with or without an adapter.

    Args:
        asked: values of `evaluation` to use; of a run, the others are the run's own.
        name, adapter, dtype, trust_remote_code: as for `find_model`.

    Raises:
        UserError: nothing to score it on, or as `find_model` does.
    """
    subject = find_model(name, adapter, asked, dtype=dtype, trust_remote_code=trust_remote_code)
    if not subject.section.tasks:
        what = "" if (Path(name) / "config.yaml").is_file() else f" ({named(name)} is no run)"
        raise UserError(f"--suite: expected at least one task, such as fedex_gsm8k, got none{what}")
    return dataclasses.replace(subject, out=_free(subject.out))


def find_model(
    name: str,
    adapter: Path | None,
    asked: Mapping[str, Any],
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """Return a run's final model, or a model with or without an adapter.

    Args:
        name: a run's directory, a model's directory, or a hub id.
        adapter: in place of the run's final adapter.
        asked: values of `evaluation` to use; of a run, the others are the run's own.
        dtype: to compute in; none: the run's own, or as `model.dtype: auto` chooses.
        trust_remote_code: run Python code that comes with the model. A run's own config cannot
            ask for it: whoever made the run is not who uses it.

    Raises:
        UserError: an unfinished run, one without its changed base, or an adapter for another base.
    """
    if (Path(name) / "config.yaml").is_file():
        subject = _of_run(RunDir(Path(name)), adapter, asked)
    else:
        model, out = ModelSection(path=name), Path("evaluations") / Path(name).name
        section = EvaluationSection(**asked)
        subject = Subject(model=model, adapter=adapter, section=section, out=out)
    subject = dataclasses.replace(subject, model=_trusting(subject.model, name, trust_remote_code))
    if dtype is not None:
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"--dtype: expected float32 or bfloat16, got {dtype}")
        subject = dataclasses.replace(subject, model=replace(subject.model, dtype=dtype))
    if subject.adapter is not None:
        _check_adapter(subject.adapter, subject.model)
    return subject


def score(subject: Subject, out: Path) -> dict[str, Any]:
    """Score the model, write results.json and samples.jsonl, and return lm-eval's results.

    Every rank of a launcher calls this; each holds the whole model and answers its share.
    """
    distributed.on_main(lambda: check_out(out))
    if subject.known_as:  # a run, which somebody else may have made
        _tell_files(subject.section)
    positions = distributed.together(lambda: models.positions(subject.model))
    distributed.together(lambda: evaluation.check_tasks(subject.section, positions))
    tokenizer = distributed.together(lambda: models.load_tokenizer(subject.model))
    model, device = distributed.together(lambda: load(subject)), distributed.device()
    if subject.model.quantization == "none":
        model.to(device)
    distributed.together(lambda: _check_numbers(model, subject))
    display = make_display(Console(highlight=False))
    with display, scoring(display, Path(subject.model.path).name, print) as tell:
        results = evaluation.evaluate(model, tokenizer, subject.section, tell)
    if results:
        parts = {"pretrained": subject.model.path, "peft": subject.adapter}
        given = ",".join(f"{key}={value}" for key, value in parts.items() if value)
        results["config"] |= {"model": "hf", "model_args": given}
    evaluation.write_results(results, out)
    return results


def table(results: Mapping[str, Any], known_as: tuple[str, str] | None) -> Table:
    """Return the scores with their standard errors, beside the paper's where it has them."""
    paper = paper_scores(*known_as) if known_as else {}
    shown = Table(box=None, pad_edge=False)
    shown.add_column("task")
    for column in ("examples", "score", "+-", *(["paper"] if paper else [])):
        shown.add_column(column, justify="right")
    means = evaluation.scores(results)
    for name, value in means.items():
        task, metric, *rule = name.split("/")
        key = f"{metric}_stderr,{rule[0] if rule else 'none'}"
        error = results["results"][task].get(key)
        count = results["n-samples"].get(task, {}).get("effective", "")
        row = [name, str(count), f"{value:.2%}"]
        row.append(f"{error:.2%}" if isinstance(error, float) else "")
        by_paper = metric == "exact_match" and rule in ([], ["paper"])
        row.append(f"{paper[task]:.2f}%" if by_paper and task in paper else "")
        shown.add_row(*map(cell, row[: len(shown.columns)]))
    return shown


def paper_scores(model: str, method: str) -> dict[str, float]:
    """Return the paper's scores of a model, by task and in percent; none where it has none."""
    known = yaml.safe_load(PAPER_SCORES.read_text(encoding="utf-8"))
    return known.get(Path(model).name.lower(), {}).get(method, {})


def _of_run(run: RunDir, adapter: Path | None, asked: Mapping[str, Any]) -> Subject:
    config = run.config()
    final, exact = run.final / "adapter", run.final / "exact_adapter"
    whole = run.final / "model"
    if whole.is_dir():
        model = replace(config.model, path=str(whole), revision=None)
        section = replace(_without_code(config.evaluation, run, asked), **asked)
        out = run.path / "evaluations" / "scored"
        return Subject(model=model, adapter=adapter, section=section, out=out)
    if not final.is_dir():
        raise UserError(f"{run.path}: expected a finished run, found no {final}; let it finish")
    section, model = config.evaluation, config.model
    if asked.get("tasks"):
        kept = {task: file for task, file in (section.data or {}).items() if task in asked["tasks"]}
        section = replace(section, data=kept or None)
    on_untouched = adapter is not None and adapter.resolve() == exact.resolve()
    if not on_untouched and run.base_changed():
        base = run.final / "base"
        if not (base / "config.json").is_file():
            raise UserError(
                f"{run.path}: its folds changed the base, and {base}, which {final} belongs to, "
                "is not there; bring it back, or score --adapter final/exact_adapter"
            )
        model = replace(model, path=str(base), revision=None)
        if config.aggregate.fold == "planes":  # one weight of both, which bfloat16 would round
            model = replace(model, dtype="float32")
    return Subject(
        model=model,
        adapter=adapter or final,
        section=replace(_without_code(section, run, asked), **asked),
        out=run.path / "evaluations" / "scored",
        known_as=(config.model.path, config.method.name),
    )


def _without_code(
    section: EvaluationSection, run: RunDir, asked: Mapping[str, Any]
) -> EvaluationSection:
    """Leave out a run's own directory of tasks: whoever made the run is not who scores it."""
    if section.include_path is not None and "include_path" not in asked and distributed.is_main():
        log.warning(
            "%s: evaluation.include_path of its config.yaml is ignored; pass --include-path to run "
            "the code of its tasks",
            run.path,
        )
    return replace(section, include_path=None)


def _tell_files(section: EvaluationSection) -> None:
    """Tell which files from elsewhere are scored on because a run's config says so."""
    files: list[str] = []
    for own in (section.data or {}).values():
        files += own.values() if isinstance(own, dict) else [own]
    far = [x for x in files if not Path(x).resolve().is_relative_to(Path.cwd())]
    if far and distributed.is_main():
        log.warning("scored on %s, as the run's config.yaml says", ", ".join(map(named, far)))


def _trusting(model: ModelSection, name: str, trusted: bool) -> ModelSection:
    """Return the model with the caller's word on its code, in place of the config's."""
    if model.trust_remote_code and not trusted and distributed.is_main():
        log.warning(
            "%s: model.trust_remote_code of its config.yaml is ignored; pass --trust-remote-code "
            "to run Python code that comes with the model",
            name,
        )
    return replace(model, trust_remote_code=trusted)


def _check_adapter(path: Path, model: ModelSection) -> None:
    """Raise a UserError unless every layer of the adapter fits a weight of the model."""
    adapter = Adapter(path)
    run = RunDir(path.resolve().parent.parent)
    final = run.final / "base"
    elsewhere = Path(model.path).resolve() != final
    if path.resolve() == run.final / "adapter" and run.base_changed() and elsewhere:
        raise UserError(
            f"--adapter: {path} belongs to {final}, as its run changed the base, got "
            f"{model.path}; name that base, or use {run.final / 'exact_adapter'}"
        )
    missed = adapter.not_targeted()
    if missed:
        raise UserError(
            f"--adapter: {path}: expected target_modules to name every layer of its file, as PEFT "
            f"loads no other, got none for {len(missed)} of {len(adapter.layers)}, such as "
            f"{missed[0]}; correct its adapter_config.json"
        )
    base = BaseFiles(base_directory(model.path, model.revision))
    for layer in () if "quantization_config" in base.config else adapter.layers:
        if base.is_tied(layer):
            continue
        name, shape = base.find(layer), adapter.shapes(layer)
        made = None if name else base.loaded_as(layer)
        found = base.shape(name) if name else made and made.shape
        if found not in (shape, shape[::-1]):  # the latter is GPT-2's
            recorded = adapter.config.get("base_model_name_or_path")
            raise UserError(
                f"--adapter: {path}: layer {layer} expects a weight of shape {shape}, got "
                f"{found} in {model.path}; it was trained on {recorded}"
            )


def load(subject: Subject) -> PreTrainedModel | PeftModel:
    """Return the model with its adapter, not merged, as the engine holds it."""
    section = subject.model
    dtype = models.resolve_dtype(section)
    base = models.load_model(section, dtype, distributed.device())
    if subject.adapter is None:
        return base
    config = _plain(Adapter(subject.adapter))
    try:
        return PeftModel.from_pretrained(base, subject.adapter, config=config)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever PEFT makes of names and shapes that the model lacks
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"--adapter: {subject.adapter}: cannot be loaded on {section.path}: {reason}; was it "
            "trained on another base model?"
        ) from None


def _check_numbers(model: nn.Module, subject: Subject) -> None:
    """Raise a UserError where a model holds NaN or Inf, or answers so, which scores as wrong."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not all_finite(weight.detach()):
            part = "lora_" in name or "modules_to_save" in name
            raise UserError(
                f"{subject.adapter if part else subject.model.path}: {name}: expected finite "
                "numbers, got NaN or Inf; bring its files anew"
            )
    with torch.no_grad():
        logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device)).logits
    if not all_finite(logits):
        raise UserError(
            f"{subject.adapter or subject.model.path}: expected a model whose answers are numbers, "
            "got NaN or Inf; bring its files anew"
        )


def _plain(adapter: Adapter) -> LoraConfig:
    """Return an adapter's settings with its layers by name: PEFT matches no pattern of others."""
    rank, alpha = adapter.config["r"], adapter.config["lora_alpha"]
    ranks = {layer: adapter.rank_of(layer) for layer in adapter.layers}
    alphas = {layer: adapter.alpha_of(layer) for layer in adapter.layers}
    kept = ("task_type", "modules_to_save", "use_rslora", "fan_in_fan_out", "ensure_weight_tying")
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(adapter.layers),
        rank_pattern={re.escape(layer): own for layer, own in ranks.items() if own != rank},
        alpha_pattern={re.escape(layer): own for layer, own in alphas.items() if own != alpha},
        **{key: adapter.config[key] for key in kept if adapter.config.get(key) is not None},
    )


def _free(path: Path) -> Path:
    """Return `path`, or the first of path-2, path-3, ... that is not there."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
