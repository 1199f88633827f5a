"""The model card, final/README.md, in the format of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedex_scale.config.learning import DataConfig
from fedex_scale.data.prompts import BARE_PROMPT, schema_of
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.run_dir import RunDir
from fedex_scale.reporting import record, serving
from fedex_scale.reporting.words import rows_told
from fedex_scale.runtime.outputs import write_file
from fedex_scale.runtime.scores import score_text

CARD_FILE = "README.md"
TEMPLATE_FILE = "chat_template.jinja"
# By what PEFT calls the kind of task.
CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    None: "AutoModelForImageClassification",
}
PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    None: "image-classification",
}
FOLDERS = {
    "exact_adapter": "one PEFT adapter with every round's residual, for the untouched base",
    "adapter": "the server's last adapter, for the untouched base",
    "base": "the base model as the folds changed it, which `adapter` belongs to",
}


def write(run: RunDir) -> Path:
    """Write the card of a run whose other final files are there, and its chat template, if it is
    not the model's own."""
    template = record.gather(run)["partition"].get("chat_template")
    if template:
        write_file(run.final / TEMPLATE_FILE, template)
    path = run.final / CARD_FILE
    write_file(path, text(run))
    return path


def text(run: RunDir, *, base: str | None = None, adapter: str | None = None) -> str:
    """Return the card of a run.

    Args:
        base: hub id of the base, where the run had it from a directory.
        adapter: hub id under which the adapter for the untouched base will lie; none: the card is
            for the run's own directory.
    """
    tree = record.gather(run)
    config = tree["config"]
    there = [name for name in FOLDERS if (run.final / name).is_dir()]
    chosen = there[0]
    changed = "base" in there
    folders = dict(FOLDERS) | (
        {"adapter": "the server's last adapter, for `base`"} if changed else {}
    )
    opened = Adapter(run.final / chosen)
    rank, kind = opened.rank, opened.config["task_type"]
    data, targets = config["data"], config["lora"]["target_modules"]
    given = base or config["model"]["path"]
    base, template = base_name(given), tree["partition"].get("chat_template")
    files = [(name, folders[name]) for name in there]
    if adapter is not None:
        files = [("adapter_model.safetensors", folders[chosen]), ("report.html", "all of the run")]
    load_base = "base" if changed and chosen == "adapter" else base
    load_adapter, served = adapter or chosen, config["method"]["name"]
    fields = {
        "metadata": metadata(tree, base, PIPELINES[kind]).to_yaml(),
        "model_class": CLASSES[kind],
        "has_head": bool(opened.full_weights),
        "name": title(tree, base),
        "base": base,
        "local_base": base != given,
        "method": config["method"]["name"],
        "clients": config["partition"]["num_clients"],
        "rounds": tree["rounds_done"],
        "epochs": config["train"]["local_epochs"],
        "data": _data_told(tree),
        "rows": rows_told(tree["partition"]),
        "held_out": tree["held_out"],
        "examples": sum(part["num_examples"] for part in tree["partition"]["clients"]),
        "partition": config["partition"]["kind"],
        "max_length": data["max_length"],
        "lora": config["lora"],
        "targets": targets if isinstance(targets, str) else ", ".join(targets),
        "train": config["train"],
        "seed": config["run"]["seed"],
        "kept": _kept(tree["rounds"]),
        "scores": _scores(tree),
        "files": files,
        "hub_id": adapter,
        "load_base": load_base,
        "load_adapter": load_adapter,
        "adapter_rank": rank,
        "vllm": serving.vllm(load_base, load_adapter, rank, served),
        "merging": serving.merging("RUN", config["model"], opened),
        "prompt": prompt_of(tree),
        "chat_template": TEMPLATE_FILE if template else None,
    }
    pages = Environment(
        loader=PackageLoader("fedex_scale", "reporting"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return pages.get_template("card.md.j2").render(fields)


def prompt_of(tree: Mapping[str, Any]) -> str | None:
    """Return the prompt around an instruction of the training data; None where there is none."""
    if tree["config"].get("task", {}).get("kind", "instruct") != "instruct":
        return None
    data = DataConfig(**tree["config"]["data"])
    name = tree["partition"].get("schema", data.schema)
    if name == "auto":  # a server that never saw the sites' rows
        return None
    schema = schema_of(data, name)
    bare = schema.as_chat or schema.instruction is None or schema.prompt == BARE_PROMPT
    return None if bare else schema.prompt


def metadata(tree: Mapping[str, Any], base: str, pipeline: str) -> ModelCardData:
    """Return the hub's metadata: what it was made from, by what, and how it scores."""
    config = tree["config"]
    source = config["data"]["path"]
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type=score["task"],
            dataset_name=score["task"],
            metric_type=score["metric"].partition("/")[0],
            metric_name=score["metric"],
            metric_value=score["value"],
        )
        for score in _last(tree)
    ]
    return ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag=pipeline,
        datasets=[source] if _is_hub_id(source) else None,
        tags=["lora", "federated-learning", "fedex_scale", config["method"]["name"]],
        model_name=title(tree, base) if results else None,
        eval_results=results or None,
    )


def title(tree: Mapping[str, Any], base: str) -> str:
    return f"{Path(base).name}-{tree['config']['method']['name']}"


def base_name(path: str) -> str:
    """Return the model's hub id; of a local directory, its name."""
    return path if _is_hub_id(path) else Path(path).name


def _data_told(tree: Mapping[str, Any]) -> str:
    """Return the hub's name of the data, a file's own name, or those of the sites."""
    path = tree["config"]["data"]["path"]
    if path:
        return path if _is_hub_id(path) else Path(path).name
    parts = tree["partition"]["clients"]
    names = [part.get("name") or f"client {k}" for k, part in enumerate(parts)]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _is_hub_id(path: str) -> bool:
    """Return whether this is OWNER/NAME rather than a local file or directory."""
    return path.count("/") == 1 and not path.startswith(("/", ".")) and not Path(path).exists()


def _last(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [score for score in tree["scores"] if score["round"] == tree["rounds_done"]]


def _scores(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    before = {(x["task"], x["metric"]): x for x in tree["scores"] if x["round"] == 0}
    return [
        {
            "task": score["task"],
            "metric": score["metric"],
            "examples": score["examples"],
            "before": _percent(before.get((score["task"], score["metric"]))),
            "after": _percent(score),
        }
        for score in _last(tree)
    ]


def _kept(rounds: Sequence[Mapping[str, Any]]) -> str | None:
    """Return how much of the residuals the forward pass sees; None where there are none."""
    rounds = [round for round in rounds if round["residual_norm"]]
    if not rounds:
        return None
    listed = ", ".join(f"{round['kept']:.2%}" for round in rounds)
    of_all = rounds[-1].get("kept_of_all")
    return listed + (f"; of all rounds together {of_all:.2%}" if of_all is not None else "")


def _percent(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    error = f" ± {100 * score['stderr']:.1f}" if score["stderr"] is not None else ""
    return f"{score_text(score['metric'], score['value'])}{error}"
