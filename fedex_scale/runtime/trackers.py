"""A run's numbers in experiment trackers (TensorBoard, W&B, trackio, MLflow), by accelerate's."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedex_scale.runtime.errors import UserError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "fedex-scale"


class Trackers:
    """Any number of trackers of one run; used on the main process, and idle where none is open.

    A client's series (`client-0003/loss`) lie on the axis of its optimizer steps over all rounds,
    the others (`rounds/kept`, `scores/TASK/METRIC`) on the axis of rounds.
    """

    def __init__(self, names: tuple[str, ...], path: Path) -> None:
        self._names, self._path = names, path
        self._config: dict[str, Any] = {}
        self._open: list[GeneralTracker] = []
        self._steps: defaultdict[int, dict[int, int]] = defaultdict(dict)  # client: round: steps
        self._groups: set[str] = set()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for tracker in self._open:
            if tracker.name == "wandb":
                tracker.tracker.finish(exit_code=int(error is not None))
            else:
                tracker.finish()
        self._open.clear()

    def open(self, config: Mapping[str, Any]) -> None:
        """Start what needs no run directory, and see that the rest can be started.

        Args:
            config: the run's settings by section, which each tracker keeps.

        Raises:
            UserError: a tracker cannot be started.
        """
        self._config = _flat(config)
        for name in self._names:
            try:
                if name == "tensorboard":
                    importlib.import_module("torch.utils.tensorboard")
                else:
                    key = "run_name" if name == "mlflow" else "name"
                    self._start(name, PROJECT, **{key: self._path.name})
            except Exception as error:  # whatever a service or its client may raise
                raise UserError(
                    f"run.trackers: expected {name} to start, got {type(error).__name__}: "
                    f"{error!s:.300}; put that right, or leave {name} out"
                ) from error

    def begin(self, before: Iterable[Mapping[str, Any]]) -> None:
        """Start what writes to the run directory; `before` has the events of a run that goes on."""
        if "tensorboard" in self._names:
            self._start("tensorboard", "tensorboard", logging_dir=self._path)
        for event in before:
            if event["event"] == "step":
                self._axis(event)

    def log(self, event: str, fields: Mapping[str, Any]) -> None:
        """Take a step, a round, or an eval; other events have no axis of their own."""
        numbers = {
            key: value
            for key, value in fields.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if event == "step":
            kept = {
                k: v for k, v in numbers.items() if k not in ("round", "client", "step", "steps")
            }
            self._send(f"client-{fields['client']:04d}", kept, self._axis(fields))
        elif event == "round":
            kept = {k: v for k, v in numbers.items() if k != "round"}
            self._send("rounds", kept, fields["round"])
        elif event == "eval":
            self._send("scores", {k: v for k, v in numbers.items() if "/" in k}, fields["round"])
        elif event == "held_out":
            each = {f"{name}/loss": loss for name, loss in fields["clients"].items()}
            kept = {k: fields[k] for k in ("loss", "perplexity")}
            self._send("held_out", kept | each, fields["round"])

    @property
    def keep_files(self) -> bool:
        """Whether `keep` has somebody to give a file to."""
        return any(tracker.name in ("wandb", "mlflow") for tracker in self._open)

    def keep(self, file: Path) -> None:
        """Give a file to the trackers that keep such: W&B and MLflow, as an artifact."""
        for tracker in self._open:
            if tracker.name == "wandb":
                import wandb

                artifact = wandb.Artifact(f"report-{self._path.name}", type="report")
                artifact.add_file(str(file))
                tracker.tracker.log_artifact(artifact)
            elif tracker.name == "mlflow":
                import mlflow

                mlflow.log_artifact(str(file))

    def _start(self, name: str, project: str, /, **options: Any) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # the trackers ask it whether this is the main process
        tracker = LOGGER_TYPE_TO_CLASS[name](project, **options)
        tracker.start()
        self._open.append(tracker)
        tracker.store_init_configuration(self._config)

    def _axis(self, fields: Mapping[str, Any]) -> int:
        """Return the client's steps so far; a round that is trained again counts once."""
        steps = self._steps[fields["client"]]
        steps[fields["round"]] = fields["step"]
        return sum(steps.values())

    def _send(self, group: str, numbers: Mapping[str, float], at: int) -> None:
        values = {f"{group}/{key}": value for key, value in numbers.items()}
        for tracker in self._open:
            if tracker.name != "wandb":
                tracker.log(values, step=at)
                continue
            # W&B's own step is one for all series and must not go back, so ours goes along.
            axis = f"{group}/step"
            if group not in self._groups:
                self._groups.add(group)
                tracker.tracker.define_metric(f"{group}/*", step_metric=axis)
            tracker.log({axis: at, **values})


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, bool)) else str(value)
    return flat
