"""A plan as text: components of the chosen setting, every DeepSpeed file, times and traffic."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table

from fedex_scale.planning.choice import TITLES, Plan
from fedex_scale.planning.machine import Machine
from fedex_scale.planning.plan import PLACES, Estimate

_GB = 1e9


def show(plan: Plan) -> Iterator[RenderableType]:
    """Yield what to print, one thing after another."""
    model, train = plan.config.model, plan.config.train
    how = "with" if model.gradient_checkpointing else "without"
    longest = plan.config.data.max_length
    yield (
        f"{model.path}: {(plan.weights.base + plan.weights.head) / _GB:.2f} billion weights, "
        f"{plan.weights.trained / 1e6:.1f} million trained; micro-batches of "
        f"{train.at_once(longest)} x {longest} tokens, {how} gradient checkpointing; "
        f"{_describe(plan.machine)}"
    )
    yield _components(plan)
    yield _settings(plan)
    yield from _times(plan)
    if plan.side:
        yield plan.side
    sent, received = (plan.traffic.round_bytes(x) for x in (plan.traffic.up, plan.traffic.down))
    yield (
        f"a client would send {_size(sent)} and receive {_size(received)} a round; "
        f"{_size(plan.traffic.total_bytes)} in all, with the model once"
    )
    yield _verdict(plan)


def _describe(machine: Machine) -> str:
    what = "no GPU, ranks:" if machine.is_cpu else f"GPUs of {_size(machine.gpu_memory)}:"
    host = f", {_size(machine.host_memory)} of host RAM" if machine.host_memory else ""
    nvme = f", {_size(machine.nvme)} of NVMe" if machine.nvme else ""
    return f"{what} {machine.gpus}{host}{nvme}"


def _components(plan: Plan) -> Table:
    table = _table(f"{plan.chosen.name}, GB", plan)
    for need in plan.chosen.needs:
        table.add_row(need.name, *(_gb(getattr(need, place)) for place in _places(plan)))
    table.add_section()
    table.add_row("in all", *(_cell(plan.chosen, place) for place in _places(plan)))
    return table


def _settings(plan: Plan) -> Table:
    table = _table("engine.deepspeed, GB", plan)
    table.add_column("s a step", justify="right")
    table.add_column("", no_wrap=True)
    for other in plan.others:
        step = "" if other.step_s is None else f"{other.step_s:.1f}"
        lacking = ", ".join(TITLES[place] for place in other.lacks)
        note = other.refused or (f"does not fit: {lacking}" if lacking else "fits")
        table.add_row(other.name, *(_cell(other, p) for p in _places(plan)), step, note)
    return table


def _times(plan: Plan) -> Iterator[str]:
    train = plan.config.train
    batch = train.batch_size / train.at_once(plan.config.data.max_length)
    yield f"arithmetic: {plan.work.flops * batch / 1e12:,.1f} TFLOP a step"
    if plan.chosen.step_s is None:
        return
    line = f"time, at {plan.machine.tflops:.0f} TFLOP/s a GPU: {_time(plan.chosen.step_s)} a step"
    if plan.steps is None:
        line += "; a round: not known without data.num_examples"
    else:
        client = plan.chosen.step_s * plan.steps
        line += f", {_time(client)} a client ({plan.steps} steps), "
        line += f"{_time(client * plan.clients)} a round; every example of the longest"
    yield line


def _verdict(plan: Plan) -> str:
    if plan.chosen.fits:
        return "fits"
    reason = plan.chosen.refused or "short of " + " and ".join(
        f"{TITLES[place]}" for place in plan.chosen.lacks
    )
    if plan.remedy is None:
        return f"does not fit ({reason}), and no change of settings would do"
    return f"does not fit ({reason}); the cheapest change that does: {plan.remedy}"


def _table(title: str, plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title, no_wrap=True)
    for place in _places(plan):
        table.add_column(TITLES[place], justify="right")
    return table


def _places(plan: Plan) -> list[str]:
    return [p for p in PLACES if any(e.total(p) for e in (plan.chosen, *plan.others))]


def _cell(estimate: Estimate, place: str) -> str:
    return _gb(estimate.total(place)) + ("!" if place in estimate.lacks else "")


def _gb(size: float) -> str:
    return f"{size / _GB:.2f}" if size else "-"


def _size(size: float) -> str:
    return f"{size / _GB:,.1f} GB" if size >= _GB else f"{size / 1e6:,.1f} MB"


def _time(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
