"""What a person sees while a run goes on, and the same events as lines of JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedex_scale.runtime import distributed, door
from fedex_scale.runtime.display import PLAIN_LINE_EVERY_S, duration, make_display, scoring
from fedex_scale.runtime.scores import best_round, score_text
from fedex_scale.runtime.text import cell, readable
from fedex_scale.runtime.trackers import Trackers


class Monitor:
    """Shows a run's events on rank 0: a live display on a terminal, plain lines elsewhere.

    Every event is a line of `metrics.jsonl` and goes to the trackers; other ranks stay silent.

    Args:
        plan: the clients of each round, and how many optimizer steps each has.
    """

    def __init__(
        self, metrics: Path, *, plan: Sequence[Mapping[int, int]], trackers: Trackers
    ) -> None:
        self.console = Console(highlight=False, quiet=not distributed.is_main())
        self._file = metrics.open("a", encoding="utf-8") if distributed.is_main() else None
        self._trackers = trackers
        self._plan, self._tokens = plan, 0
        self._total = sum(sum(clients.values()) for clients in plan)
        self._before = _read_events(metrics)
        if distributed.is_main():
            trackers.begin(self._before)
        self._done = self._resumed = sum(x["event"] == "step" for x in self._before)
        self._start = self._last_line = time.perf_counter()
        self._training_s = 0.0
        self._last_event = self._start
        self._progress = make_display(self.console)
        self._task = self._progress.add_task("starting", total=self._total, unit="steps", state="")
        self._progress.update(self._task, completed=self._done)
        self._scores: dict[str, dict[int, float]] = {}  # by round
        self._cap_told, self._shown = False, ""
        for fields in self._before:
            if fields["event"] == "eval":
                self._add_scores(fields)

    def __enter__(self) -> Monitor:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._file is not None:
            self._file.close()

    def log(self, event: str, **fields: Any) -> None:
        """Record one event: step, client, failure, round, eval or phases."""
        if self._file is None:
            return
        seconds = round(time.perf_counter() - self._start + self._seconds_before(), 3)
        self._file.write(json.dumps({"event": event, "seconds": seconds, **fields}) + "\n")
        self._file.flush()
        show = {
            "step": self._step,
            "client": self._client,
            "round": self._round,
            "failure": self._failure,
            "eval": self._eval,
            "held_out": self._held_out,
        }
        show.get(event, lambda fields: None)(fields)
        if event == "step":
            took = time.perf_counter() - self._last_event
            fields["tokens_per_s"] = fields["tokens"] / took
        self._trackers.log(event, fields)
        self._last_event = time.perf_counter()

    def scoring(self, round: int) -> AbstractContextManager[Callable[[str, int, int], None]]:
        """Show how far the scoring after a round has come; gives what is to be told of it."""
        return scoring(self._progress, _when(round), self.say)

    def say(self, text: str) -> None:
        """Print a line above the display."""
        self.console.print(readable(text), markup=False, soft_wrap=True)

    def close(self, written: Mapping[str, Path]) -> None:
        """Show what came out: scores before and after, and where the files are."""
        if self._scores:
            self.console.print(self._table())
        for name, path in written.items():
            self.say(f"{name}: {path}")

    def _table(self) -> Table:
        """Return the scores before and after; of several rounds also the best, by its round."""
        several = any(len(values.keys() - {0}) > 1 for values in self._scores.values())
        table = Table(box=None, pad_edge=False, title="scores", title_justify="left")
        for column in (
            "",
            "before",
            "last round" if several else "after",
            *["best round"] * several,
        ):
            table.add_column(column, justify="left" if not column else "right")
        for name, values in self._scores.items():
            first = score_text(name, values[0]) if 0 in values and len(values) > 1 else "-"
            row = [cell(name), first, score_text(name, values[max(values)])]
            if several:
                best = best_round(name, {k: v for k, v in values.items() if k})
                row.append(f"{score_text(name, values[best])} ({best})")
            table.add_row(*row)
        return table

    def _step(self, fields: dict[str, Any]) -> None:
        now = time.perf_counter()
        self._done += 1
        self._tokens += fields["tokens"]
        self._training_s += now - self._last_event
        rate = self._tokens / self._training_s
        left = (self._total - self._done) * self._training_s / (self._done - self._resumed)
        where = self._where(fields["round"], fields["client"])
        state = f"loss {fields['loss']:.3f}, {rate:,.0f} tokens/s, {duration(left)} left"
        new = where != self._shown  # seen at once: a small client may end before the next refresh
        self._shown = where
        self._progress.update(
            self._task, completed=self._done, description=where, state=state, refresh=new
        )
        if self._progress.disable and now - self._last_line > PLAIN_LINE_EVERY_S:
            self._last_line = now
            self.say(f"{where}, step {fields['step']}/{fields['steps']}: {state}")

    def _where(self, round: int, client: int) -> str:
        """Return the place in the run: round 2 of 5, client 7 (3 of 4)."""
        clients = list(self._plan[round - 1])
        number = clients.index(client) + 1
        return f"round {round} of {len(self._plan)}, client {client} ({number} of {len(clients)})"

    def _client(self, fields: dict[str, Any]) -> None:
        self._after(fields)
        self.say(
            "round {round}, client {client}: {num_examples} examples, {num_steps} steps, "
            "loss {first_loss:.3f} to {last_loss:.3f} in ".format(**fields)
            + duration(fields["seconds"])
        )

    def _after(self, fields: dict[str, Any]) -> None:
        """Show what follows a client: nothing new until the last one of its round is done."""
        if fields["client"] == list(self._plan[fields["round"] - 1])[-1]:
            where = f"round {fields['round']} of {len(self._plan)}: aggregating"
            self._progress.update(self._task, description=where, state="")

    def _failure(self, fields: dict[str, Any]) -> None:
        self._after(fields)
        self.say(f"warning: {fields['reason']} ({fields['action']})")

    def _round(self, fields: dict[str, Any]) -> None:
        done = f"round {fields['round']} of {len(self._plan)} done"
        self._progress.update(self._task, description=done)
        line = f"round {fields['round']} aggregated"
        if fields["residual_norm"]:
            share = fields["residual_norm"] / fields["ideal_norm"]
            line += f": residual {share:.2%} of the update, kept {fields['kept']:.4%} of it"
            if fields["round"] > 1 and fields.get("kept_of_all") is not None:
                line += f", {fields['kept_of_all']:.4%} of all rounds'"
        else:
            line += ": nothing to add to the base"
        self.say(line)
        cap = None if self._cap_told else fields.get("cap")
        self._cap_told |= cap is not None
        for warning in filter(None, (fields["warning"], cap, *fields["notes"])):
            self.say(f"warning: {warning}")

    def _eval(self, fields: dict[str, Any]) -> None:
        scores = self._add_scores(fields)
        listed = ", ".join(f"{name} {score_text(name, value)}" for name, value in scores.items())
        self.say(f"{_when(fields['round'])}: {listed} ({duration(fields['took_s'])})")

    def _held_out(self, fields: dict[str, Any]) -> None:
        self.say(
            "{when}: held-out loss {loss:.4f}, perplexity {perplexity:.2f} ({examples} examples, "
            "{took})".format(**fields, when=_when(fields["round"]), took=duration(fields["took_s"]))
        )

    def _add_scores(self, fields: Mapping[str, Any]) -> dict[str, float]:
        scores = {k: v for k, v in fields.items() if "/" in k}
        for name, value in scores.items():
            self._scores.setdefault(name, {})[fields["round"]] = value
        return scores

    def _seconds_before(self) -> float:
        """Return the time that the run took before it was interrupted."""
        return self._before[-1]["seconds"] if self._before else 0.0


def _when(round: int) -> str:
    return f"after round {round}" if round else "before training"


def _read_events(metrics: Path) -> list[dict[str, Any]]:
    """Return the events of a run that goes on; none for a new one."""
    if not metrics.exists():
        return []
    return [door.parse_json(line, finite=False) for line in door.read_lines(metrics)]
