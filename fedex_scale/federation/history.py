"""What the rounds before left on disk of each layer: residuals, side adapter, norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from fedex_scale.aggregation.side import Past
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.kinds import LayerEntry
from fedex_scale.files.run_dir import REPORT_FILE, RunDir
from fedex_scale.methods.algebra import LowRank, Pair, Pieces, stack
from fedex_scale.runtime.errors import UserError

Again = Callable[[int, str], Iterable[LowRank]]
"""Computes a round's residual of a layer once more, from its clients' adapters."""


class History:
    """Rounds 1 to `last` of a run; files are opened as they are asked for, a layer at a time.

    Args:
        again: for rounds whose residual was too large to be kept; None where it is not asked for.
    """

    def __init__(self, run: RunDir, last: int, again: Again | None = None) -> None:
        self._run, self._last, self._again = run, last, again
        self._reports: dict[int, dict[str, LayerEntry]] = {}
        self._adapters: dict[tuple[str, int], Adapter | None] = {}

    def past(self, layer: str, device: torch.device) -> Past:
        """Return what is known of a layer, its factors on the given device."""
        if not self._last:
            return Past()
        entry = self._report(self._last, layer)
        return Past(
            residuals=Pieces(lambda: self._residuals(layer, device)),
            seen=[LowRank(*(x.to(device) for x in part)) for part in self._parts(layer)],
            sum_norm=entry.sum_norm,
            unseen_norm=entry.unseen_norm,
        )

    def side(self, layer: str) -> Pair:
        """Return a layer's side adapter as the forward pass holds it; at least one column."""
        whole = stack(*(self._parts(layer) or [self._part(self._last, layer)]))
        return Pair(whole.V_PI, whole.U_OP)

    def side_rank(self, layer: str) -> int:
        """Return how many columns `side` has."""
        return max(1, self._report(self._last, layer).side_rank)

    def _report(self, number: int, layer: str) -> LayerEntry:
        if number not in self._reports:
            layers = self._run.round(number).layers
            self._reports[number] = {entry.layer: entry for entry in layers}
        if layer not in self._reports[number]:
            file = self._run.server(number) / REPORT_FILE
            raise UserError(f"{file}: expected layer {layer}, got none; restore this file")
        return self._reports[number][layer]

    def _residuals(self, layer: str, device: torch.device) -> Iterator[LowRank]:
        for number in range(1, self._last + 1):
            adapter = self._open("residual", number)
            if adapter is not None:
                pair = adapter.pair(layer)
                yield LowRank(pair.B_OR.to(device), pair.A_RI.to(device))
            elif self._again is not None:
                for piece in self._again(number, layer):
                    yield LowRank(*(factor.to(device) for factor in piece))

    def _parts(self, layer: str) -> list[LowRank]:
        """Return what the rounds gave the side adapter since it began, in their order."""
        parts = []
        for number in range(self._last, 0, -1):
            entry = self._report(number, layer)
            part = self._part(number, layer) if entry.side_rank else None
            if part is not None and part.U_OP.any():
                parts.append(part)
            if entry.side_starts:
                break
        return parts[::-1]

    def _part(self, number: int, layer: str) -> LowRank | None:
        adapter = self._open("side", number)
        if adapter is None:
            return None
        pair = adapter.pair(layer).float()
        return LowRank(pair.B_OR, pair.A_RI)

    def _open(self, name: str, number: int) -> Adapter | None:
        if (name, number) not in self._adapters:
            path = self._run.server(number) / name
            self._adapters[name, number] = Adapter(path) if path.is_dir() else None
        return self._adapters[name, number]
