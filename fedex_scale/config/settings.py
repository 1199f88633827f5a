"""All settings of a run: its place, its scoring, and every section together."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedex_scale.config.federation import (
    AggregateSection,
    FederationSection,
    MethodConfig,
    PartitionConfig,
    SiteSection,
)
from fedex_scale.config.learning import (
    DataConfig,
    EngineSection,
    LoraSection,
    ModelSection,
    TrainSection,
)
from fedex_scale.config.section import AsTuple, Count, Names, Section
from fedex_scale.config.task import TaskSection
from fedex_scale.config.words import named, shown


class RunSection(Section, title="run"):
    """The run itself: its name, its place, its checkpoints."""

    name: str = "run"
    """Name of the run; its directory is `dir/name`."""
    dir: str = "runs"
    """Where run directories are made."""
    seed: Annotated[int, Field(ge=0, le=10**18)] = 0
    """Everything random is drawn from (seed, round, client) and nothing else."""
    overwrite: bool = False
    """Delete an existing run directory of this name first."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the newest checkpoint of this name, if there is one; as --resume does."""
    keep: Count = 3
    """Checkpoints to keep."""
    save_steps: Count | None = 50
    """Steps of a client between checkpoints; none: only when a client or a round is done."""
    trackers: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...], AsTuple
    ] = ()
    """Any of tensorboard (in the run, tensorboard/), wandb, trackio, mlflow: a series per client,
    the config and, where the tool keeps files (wandb, mlflow), the report."""
    profile_steps: Annotated[tuple[Count, ...], AsTuple] = ()
    """Steps of which to write a torch profiler trace, counted from 1 as the program starts."""

    def problems(self) -> Iterator[str]:
        odd = "/" in self.name or not self.name.isprintable()
        if self.name in ("", ".", "..") or odd:
            yield f"run.name: expected a plain name, got {shown(self.name)}; try my_run"
        if not self.dir:
            yield "run.dir: expected a directory, got ''; try runs"
        for tracker in self.trackers:
            if importlib.util.find_spec(tracker) is None:
                yield f"run.trackers: {tracker} is not installed; pip install {tracker}"

    @property
    def path(self) -> Path:
        return Path(self.dir) / self.name


class EvaluationSection(Section, title="evaluation"):
    """What is scored, and when."""

    tasks: Names = ()
    """lm-eval tasks and groups: this project's (docs/evaluation.md) or stock; none: no scoring."""
    data: dict[str, str | dict[str, str]] | None = None
    """Task name -> local .json or .jsonl file to score on, in place of the hub's data; of a stock
    task also {test: FILE, train: FILE}, as its own splits are called."""
    data_dir: str | None = None
    """Where test sets lie as in docs/evaluation.md; none: the variable FEDEX_SCALE_DATA."""
    limit: Count | None = None
    """Score the first so many examples of each task; none: all."""
    before: bool = True
    """Score before the first round, too."""
    every_rounds: Count | None = None
    """Score after every so many rounds; none: after the last only."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples in a stock task's prompt; none: as the task has it."""
    batch_size: Count | Literal["auto"] = 16
    """Prompts answered at once, and fewer where a GPU's memory runs out; auto: up to 256 on one."""
    include_path: str | None = None
    """Directory with lm-eval tasks of one's own, which may run code."""
    generate: str | None = None
    """Text file with a prompt a line, answered before and after: answers.md in the run."""

    def problems(self) -> Iterator[str]:
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            yield f"evaluation.data_dir: no directory {named(self.data_dir)}; correct the path"

    def due(self, round: int, rounds: int) -> bool:
        """Return whether the model is looked at after `round` of `rounds` (0: before the first)."""
        if round == 0:
            return self.before
        return round == rounds or bool(self.every_rounds and round % self.every_rounds == 0)


class Config(Section):
    """A resolved run. Each field is one section of the YAML."""

    run: RunSection = Field(default_factory=RunSection)
    model: ModelSection
    lora: LoraSection = Field(default_factory=LoraSection)
    task: TaskSection = Field(default_factory=TaskSection)
    data: DataConfig
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    federation: FederationSection = Field(default_factory=FederationSection)
    method: MethodConfig = Field(default_factory=MethodConfig)
    aggregate: AggregateSection = Field(default_factory=AggregateSection)
    train: TrainSection = Field(default_factory=TrainSection)
    engine: EngineSection = Field(default_factory=EngineSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    site: SiteSection = Field(default_factory=SiteSection)

    @model_validator(mode="before")
    @classmethod
    def _sites_are_data(cls, values: Any) -> Any:
        """Let the section on data be left out where the clients' files are named."""
        partition = values.get("partition") if isinstance(values, dict) else None
        if isinstance(partition, dict) and partition.get("files"):
            return {"data": {}, **values}
        return values

    def problems(self) -> Iterator[str]:
        if bool(self.data.path) == bool(self.partition.files):
            given = "left out with partition.files" if self.data.path else "a file or a hub id"
            yield f"data.path: expected {given}, got {shown(self.data.path)}; correct it"
        if self.partition.files and self.data.num_examples is not None:
            yield (
                "data.num_examples: takes rows of all data, and partition.files has each client's "
                f"own, got {self.data.num_examples}; leave it out"
            )
        if self.method.name == "centralized" and self.federation.client_fraction < 1:
            yield "federation.client_fraction: centralized has one client; leave it at 1"
        if self.method.name == "ffa" and self.federation.init == "per_client":
            yield "federation.init: ffa shares one frozen A; use init: shared"
        if self.method.name == "full" and self.model.quantization != "none":
            yield (
                f"model.quantization: full trains every weight, got {self.model.quantization}; use "
                "none"
            )
        if self.method.assign == "keep":
            yield (
                "method.assign: keep gives each client a base of its own, which one engine cannot "
                "hold; use average, or fedex-scale aggregate --assign keep on a round's clients"
            )
        if self.task.kind not in ("instruct", "generate"):
            if self.train.packing:
                yield f"train.packing: {self.task.kind} reads one example a row; leave it out"
            if self.evaluation.tasks:
                yield (
                    f"evaluation.tasks: lm-eval scores models that write, and {self.task.kind} has "
                    "a head; use task.test or task.holdout"
                )
        if self.task.kind == "generate" and self.data.schema != "columns":
            yield (
                "data.schema: task.kind generate needs columns, with data.prompt_column and "
                f"data.response_column, got {self.data.schema}; set all three"
            )
        yield from self._robust_problems()
        yield from self._token_problems()
        fixed, clients = len(self.federation.fixed_examples), self.partition.num_clients
        drawn = self.federation.num_drawn(clients)
        if self.partition.is_counted and self.federation.min_clients > drawn:
            yield (
                f"federation.min_clients: expected at most {drawn}, as many as train in a round, "
                f"got {self.federation.min_clients}; lower it, or raise partition.num_clients"
            )
        if fixed not in (0, clients):
            yield (
                f"federation.fixed_examples: expected a number for each of {clients} clients "
                f"(partition.num_clients), got {fixed}"
            )
        if self.model.quantization != "none" and self.aggregate.fold != "side":
            yield (
                f"aggregate.fold: a {self.model.quantization} base cannot take a residual, "
                f"got fold: {self.aggregate.fold}; use fold: side"
            )

    def _token_problems(self) -> Iterator[str]:
        tokens, longest = self.train.micro_batch_tokens, self.data.max_length
        if tokens is not None and self.task.kind == "images":
            yield (
                f"train.micro_batch_tokens: images have none, got {tokens}; set "
                "train.micro_batch_size"
            )
        elif isinstance(tokens, int) and tokens < longest:
            yield (
                f"train.micro_batch_tokens: expected at least one example of data.max_length "
                f"({longest}), got {tokens}; raise it, or lower data.max_length"
            )

    def _robust_problems(self) -> Iterator[str]:
        robust, section = self.aggregate.robust, self.federation
        drawn = section.num_drawn(self.partition.num_clients)
        if self.site.number is not None:  # the server's to know
            return
        if robust != "none" and (self.method.name == "centralized" or drawn < 3):
            drawn = 1 if self.method.name == "centralized" else drawn
            yield (
                f"aggregate.robust: {robust} tells one client from most, of three or more a round, "
                f"got {drawn}; use none"
            )
        if robust == "clip" and section.init == "per_client":
            yield (
                "aggregate.robust: clip measures changes of the server's adapter, and with "
                "federation.init per_client none begins with it; use trimmed, or init: shared"
            )
