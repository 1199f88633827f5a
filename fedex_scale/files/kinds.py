"""What the JSON files hold that the package reads: a model each, as data with bounds.

A file that is not what its kind says is refused on one line. What a kind does not name may be
there and is handed on as it is, where it is handed on at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from fedex_scale.config.section import AsTuple
from fedex_scale.files.checked import (
    MAX_CLIENTS,
    MAX_LAYERS,
    Alpha,
    Count,
    Index,
    Kind,
    Name,
    Names,
    Norm,
    Number,
    Rank,
    Round,
    Text,
    check,
)
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError


class AdapterConfig(Kind):
    """adapter_config.json, as far as it decides what is read, or what PEFT makes of it."""

    peft_type: Name
    r: Rank
    lora_alpha: Alpha
    task_type: Name | None = None
    base_model_name_or_path: Name | None = None
    revision: Name | None = None
    rank_pattern: Annotated[dict[Name, Rank], Field(max_length=MAX_LAYERS)] | None = None
    alpha_pattern: Annotated[dict[Name, Alpha], Field(max_length=MAX_LAYERS)] | None = None
    target_modules: Name | Names | None = None
    exclude_modules: Name | Names | None = None
    modules_to_save: Names | None = None
    layers_to_transform: Index | list[Index] | None = None
    layers_pattern: Name | Names | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    inference_mode: bool | None = None


class WeightIndex(Kind):
    """model.safetensors.index.json."""

    weight_map: Annotated[dict[Name, Name], Field(min_length=1, max_length=MAX_LAYERS)]


class ClientFile(Kind):
    """client.json: how a client's training went."""

    round: Round
    client: Index
    num_examples: Annotated[int, Field(ge=1, lt=2**53)]
    num_steps: Count
    num_tokens: Count
    first_loss: Number
    last_loss: Number
    seconds: Norm


class LayerEntry(Kind):
    """What a round did to a layer."""

    layer: Name
    kept: Number
    ideal_norm: Norm
    residual_norm: Norm
    missed_norm: Norm = 0.0
    sum_norm: Norm | None = None
    unseen_norm: Norm | None = None
    side_rank: Count = 0
    side_starts: bool = False


class RoundFile(Kind):
    """aggregate.json: what a round did, in all and by layer."""

    clients: Annotated[list[Index], Field(max_length=MAX_CLIENTS)]
    weights: Annotated[list[Norm], Field(max_length=MAX_CLIENTS)]
    skipped: list[Index] = Field(default=[])
    rejected: list[Index] = Field(default=[])
    update_norms: list[Norm] = Field(default=[])
    kept: Number
    kept_of_all: Number | None = None
    ideal_norm: Norm
    residual_norm: Norm
    base_changed: bool
    largest_layer: Name
    layers: Annotated[list[LayerEntry], Field(max_length=MAX_LAYERS)]  # none: all is averaged whole


class PartitionEntry(Kind):
    client: Count | None = None
    name: Name | None = None
    num_examples: Count
    counts: dict[str, Count] | None = None


class PartitionFile(Kind):
    """partition.json: who has which data."""

    clients: Annotated[list[PartitionEntry], Field(min_length=1, max_length=MAX_CLIENTS)]


class DeviationEntry(Kind):
    """What averaging lost in a layer, or in all of them."""

    layer: Name = ""
    num_entries: Count
    residual_norm: Norm
    averaged_norm: Norm
    ideal_norm: Norm
    cosine: Number
    change_norm: Norm
    spread_norm: Norm
    effective_rank: Norm
    singular_values: Annotated[list[Norm], Field(max_length=2**16)]
    scaled: Norm
    norm_ratio: Norm
    relative: Norm
    drift: Norm


class DeviationFile(Kind):
    """deviation.json."""

    note: Text | None
    total: DeviationEntry | None
    layers: Annotated[list[DeviationEntry], Field(max_length=MAX_LAYERS)]


class Event(Kind):
    """A line of metrics.jsonl; a loss that is no number any more is what it tells of."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=True, frozen=True)

    event: Name
    seconds: Norm


class Lap(Kind):
    seconds: Norm
    peak_bytes: Count
    peak_device_bytes: Count = 0


class Step(Event):
    round: Round
    client: Index
    step: Count
    steps: Count
    loss: float
    lr: float
    tokens: Count


class Client(Event, ClientFile):
    pass


class Failure(Event):
    round: Round
    client: Index | None  # none of a result whose sender is not known
    reason: Text
    action: Name


class Phases(Event):
    round: Round | None
    wall_s: Norm
    phases: Annotated[dict[Name, Lap], Field(max_length=100)]


EVENTS: dict[str, type[Event]] = {
    "step": Step,
    "client": Client,
    "failure": Failure,
    "phases": Phases,
}


class Facts(Kind):
    """What report.json tells of the machine and the model."""

    versions: dict[Name, Name] = Field(default={})
    machine: Name = ""
    base_parameters: Count = 0
    dtype: Name = ""
    ranks: Count = 1
    device: Name = ""


class ReportFile(Kind):
    """report.json, of which just the facts are read again."""

    facts: Facts = Facts()


class ResultsFile(Kind):
    """results.json in lm-eval's format, as far as scores are drawn from it."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=True, frozen=True)

    results: Annotated[dict[Name, dict[Name, Any]], Field(max_length=1_000)]
    n_samples: dict[Name, dict[Name, Any]] = Field(default={}, alias="n-samples")


class SampleLine(Kind):
    """A line of samples.jsonl, as far as it is compared."""

    task: Name
    filter: Name
    doc_id: Count
    doc_hash: Name
    verdict: dict[Name, Any]


class Offload(Kind):
    device: Name = "none"


class ZeroSection(Kind):
    stage: Annotated[int, Field(ge=0, le=3)] = 0
    offload_param: Offload | None = None
    offload_optimizer: Offload | None = None
    zero_hpz_partition_size: int = 1
    mics_shard_size: int = -1


class DeepSpeedFile(Kind):
    """DeepSpeed's JSON, as far as this program decides by it."""

    zero_optimization: ZeroSection = ZeroSection()


class ServerPlace(Kind):
    round: Round
    has_side: bool
    base_changed: bool


class RunningClient(Kind):
    client: Index
    attempt: Annotated[int, Field(ge=0, le=1)]
    step: Count
    num_tokens: Count
    first_loss: Number
    last_loss: Number
    seconds: Norm


class RunPlace(Kind):
    """How far a run has come."""

    state: ServerPlace
    evaluated: bool
    done: list[Index]
    skipped: list[Index]
    running: RunningClient | None
    finished: bool


FileEntries = dict[
    Name, Annotated[tuple[Count, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]], AsTuple]
]


class Manifest(Kind):
    """A checkpoint's manifest.json."""

    format: int
    number: Count | None = None
    place: RunPlace
    world_size: Annotated[int, Field(ge=1, lt=2**20)]
    metrics_bytes: Count
    metrics_sha256: Name
    boundary_bytes: Count
    config: dict[str, dict[str, Any]]
    base: FileEntries
    files: FileEntries
    sha256: Name


def events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a run's metrics.jsonl, none where there is none.

    A last line that was cut off is left out.

    Raises:
        UserError: another line is no event.
    """
    found: list[dict[str, Any]] = []
    problem = None
    try:
        for number, line in enumerate(door.read_lines(path, inside=path.parent), start=1):
            if problem is not None:
                raise UserError(problem)
            where, remedy = f"{path}: line {number}", "restore this file of the run"
            try:
                tree = door.parse_json(line, finite=False)
            except ValueError as error:
                problem = f"{where} is not JSON ({error}); {remedy}"
                continue
            name = tree.get("event") if isinstance(tree, dict) else None
            kind = EVENTS.get(name, Event) if isinstance(name, str) else Event
            check(kind, tree, where, remedy)
            found.append(tree)
    except FileNotFoundError:
        pass
    return found
