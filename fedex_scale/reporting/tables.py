"""The notes and tables of a report, from runs' records."""

from __future__ import annotations

from collections.abc import Sequence

from fedex_scale.aggregation.communication import millions, size
from fedex_scale.reporting import headers
from fedex_scale.reporting.chart import Record
from fedex_scale.reporting.deviations import depth, observations, projection
from fedex_scale.reporting.settings import facts
from fedex_scale.reporting.training import scores_at, short
from fedex_scale.reporting.words import Table, count, duration, percent, score_of, table
from fedex_scale.runtime.scores import score_text

SECTIONS = (
    ("glance", "At a glance", ""),
    ("scores", "Scores", ""),
    (
        "samples",
        "Answers",
        "The same questions before training and after, chosen to show each kind of change.",
    ),
    ("loss", "Training", ""),
    (
        "deviation",
        "Deviation",
        "Averaging A and B is not averaging B A. What it loses, the residual, was measured in "
        "every round and layer, whatever the method did with it.",
    ),
    ("kept", "Kept", "How much of what was to be added to the model its forward pass sees."),
    ("communication", "Communication", ""),
    ("time", "Time and memory", ""),
    ("run", "What was run", ""),
)


LISTED = 8  # clients with a column each


def notes(run: Record, *, name: bool) -> list[str]:
    """Return what a reader must not miss: unfinished, failed clients, warnings of the rounds."""
    who = f"{run['name']}: " if name else ""
    found = []
    if not run["finished"]:
        done = f"{run['rounds_done']} of {count(run['rounds_planned'], 'round')}"
        found.append(f"{who}This run has not finished: {done} done. Shown is what there is.")
    for failure in run["failures"]:
        found.append(f"{who}{failure['reason']} ({failure['action']})")
    for layer in run["rounds"]:
        if layer["kept"] < 0.5:
            found.append(
                f"{who}round {layer['round']}: only {layer['kept']:.1%} of the residual reached "
                "the forward pass; use fold: side, or a float32 base"
            )
    return found


def tiles(run: Record) -> list[tuple[str, str]]:
    """Return the few figures to see at a glance, each with what it is."""
    shown = []
    before, after = scores_at(run, 0, before=True), scores_at(run, -1)
    for name, score in list(after.items())[:3]:
        first = f"{score_text(name, before[name]['value'])} → " if name in before else ""
        shown.append((first + score_of(score), short(name)))
    looks = run.get("held_out") or []
    if looks:
        first = f"{looks[0]['loss']:.3f} → " if len(looks) > 1 else ""
        shown.append((f"{first}{looks[-1]['loss']:.3f}", "loss on held-out examples"))
    if run["rounds"]:
        last = run["rounds"][-1]
        total = last["deviation"]["total"]
        if total:
            label = "of the last round's change is what averaging the factors loses"
            shown.append((percent(total["relative"]), label))
        if last["residual_norm"]:
            share, of_what = last.get("kept_of_all"), "all rounds' residuals"
            if share is None:
                share, of_what = last["kept"], "the last round's residual"
            shown.append((percent(share), f"of {of_what} in the forward pass"))
    if run["communication"]:
        own = run["communication"][0]
        shown.append((size(own["up_bytes"]), "sent by a client in a round"))
        shown.append((size(own["down_bytes"]), "received by a client in a round"))
    seconds = sum(client["seconds"] for client in run["clients"])
    if seconds:
        rate = sum(client["num_tokens"] for client in run["clients"]) / seconds
        shown.append((f"{rate:,.0f}", "tokens/s in training"))
    wall = sum(lap["wall_s"] for lap in run["phases"]) or run["seconds"]
    return [*shown, (duration(wall), "wall time")]


def scores(records: Sequence[Record]) -> list[Table]:
    """Return every task's score before, and after each run, with standard errors."""
    before = scores_at(records[0], 0, before=True)
    after = [scores_at(run, -1) for run in records]
    names = list(dict.fromkeys(name for found in (*after, before) for name in found))
    if not names:
        return []
    best = records[0]["best"] if len(records) == 1 else {}
    heads = [run["name"] for run in records] if len(records) > 1 else ["after"]
    heads, caption = heads + ["best round"] * bool(best), "± one standard error."
    if best:
        caption += " The best round is chosen on these same examples; after is the last one."
    rows = []
    for name in names:
        known = [found[name] for found in (before, *after) if name in found]
        examples = str(known[0]["examples"] or "")
        row = [short(name), examples, *(score_of(x.get(name)) for x in (before, *after))]
        if best:
            own = best.get(name)
            row.append(f"{score_text(name, own['value'])} ({own['round']})" if own else "-")
        rows.append(row)
    about = headers.SCORES | dict.fromkeys(heads, headers.SCORES["after"])
    about["best round"] = "The best score after any round, and which."
    head = ["task", "examples", "before", *heads]
    return [table(head, rows, caption=caption, about=about)]


def held_out(records: Sequence[Record]) -> list[Table]:
    """Return the loss on held-out examples over the rounds, of all clients and of each."""
    found = []
    for run in records:
        looks = run.get("held_out") or []
        if not looks:
            continue
        names = list(looks[0]["clients"])[:LISTED]
        names = names if len(names) > 1 else []
        rows = [
            [
                str(look["round"]) if look["round"] else "before",
                f"{look['loss']:.4f}",
                f"{look['perplexity']:.2f}",
                *(f"{look['clients'][name]:.4f}" for name in names),
            ]
            for look in looks
        ]
        whose = f"{run['name']}: mean" if len(records) > 1 else "Mean"
        about = (
            f"{whose} loss over the tokens of {looks[0]['examples']:,} held-out examples, which "
            "nobody trained on; perplexity is its exponential."
        )
        found.append(table(["round", "held-out loss", "perplexity", *names], rows, caption=about))
    return found


def samples(records: Sequence[Record]) -> list[Record]:
    """Return questions with their answers before and after, each with its verdict."""
    shown = []
    for run in records:
        for sample in run["samples"]:
            answers = [
                {"when": when, "text": sample[key]["text"].strip() or "(nothing)", **verdict}
                for when, key in (("before", "before"), ("after", "after"))
                if sample[key]
                for verdict in (_VERDICTS[sample[key]["right"]],)
            ]
            named = f"{run['name']}: " if len(records) > 1 else ""
            shown.append({**sample, "title": f"{named}{short(sample['task'])}", "answers": answers})
    return shown if len(records) == 1 else [x for run in records for x in _first_of(run, shown)]


_VERDICTS = {
    True: {"verdict": "right", "mark": "right"},
    False: {"verdict": "wrong", "mark": "wrong"},
    None: {"verdict": "", "mark": ""},
}


def _first_of(run: Record, shown: Sequence[Record]) -> list[Record]:
    return [x for x in shown if x["title"].startswith(f"{run['name']}: ")][:1]


def clients(records: Sequence[Record]) -> list[Table]:
    """Return what each client of a run's last round did; of a hundred, the first ones."""
    found = []
    for run in records:
        last = max((client["round"] for client in run["clients"]), default=0)
        done = [client for client in run["clients"] if client["round"] == last]
        rows = [
            [
                str(client["client"]),
                f"{client['num_examples']:,}",
                f"{client['num_steps']:,}",
                f"{client['first_loss']:.3f} → {client['last_loss']:.3f}",
                f"{client['num_tokens'] / client['seconds']:,.0f}" if client["seconds"] else "-",
                duration(client["seconds"]),
            ]
            for client in done[:20]
        ]
        about = f"{run['name']}, round" if len(records) > 1 else "Round"
        about += f" {last}" + f": the first 20 of {len(done)} clients" * (len(done) > 20)
        if rows:
            shown = table(list(headers.CLIENTS), rows, caption=about, about=headers.CLIENTS)
            found.append(shown | {"wide": False})
    return found


def deviation(records: Sequence[Record]) -> list[Table]:
    """Return what each round's averaging would have lost, over all layers."""
    rows, several = [], len(records) > 1
    for run in records:
        for round in run["rounds"]:
            total, note = round["deviation"]["total"], round["deviation"]["note"]
            values = [note or "", *[""] * 5]
            if total:
                values = [
                    percent(total["relative"]),
                    f"{total['scaled']:.2e}",
                    f"{total['cosine']:.6f}",
                    f"{total['norm_ratio']:.4f}",
                    percent(total["drift"]),
                    f"{total['effective_rank']:.1f}",
                ]
            rows.append([*[run["name"]] * several, str(round["round"]), *values])
    about, head = headers.DEVIATION, [*["run"] * several, *headers.DEVIATION]
    return [table(head, rows, caption="All layers together.", about=about)] if rows else []


def observed(records: Sequence[Record]) -> list[Table]:
    """Return quotients of deviations that answer what the paper observed of its models."""
    found = {run["name"]: observations(run) for run in records}
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    rows = []
    for name in names:
        expected, holds = headers.EXPECTED[name]
        cells = [
            f"{values[name]:.2f}, {'as found' if holds(values[name]) else 'not as found'}"
            if name in values
            else "-"
            for values in found.values()
        ]
        rows.append([name, expected, *cells])
    heads = list(found) if len(records) > 1 else ["quotient"]
    about = headers.OBSERVED | dict.fromkeys(heads, headers.OBSERVED["quotient"])
    caption = "Does what the paper observed hold here?"
    return [table(["", "the paper", *heads], rows, caption=caption, about=about)] if rows else []


def kept(records: Sequence[Record]) -> list[Table]:
    rows = []
    for run in records:
        for round in run["rounds"]:
            name = [run["name"]] if len(records) > 1 else []
            added = round["residual_norm"]
            share = percent(added / round["ideal_norm"]) if round["ideal_norm"] else "-"
            largest = round["largest_layer"]
            where = f"{projection(largest)} of layer {depth(largest)}"
            of_all = round.get("kept_of_all")
            together = "-" if of_all is None else f"{of_all:.4%}"
            values = [f"{round['kept']:.4%}", together, where] if added else ["-", together, "-"]
            rows.append([*name, str(round["round"]), share if added else "nothing", *values])
    head = [*["run"] * (len(records) > 1), *headers.KEPT]
    return [table(head, rows, about=headers.KEPT)] if rows else []


def communication(records: Sequence[Record]) -> list[Table]:
    """Return what a client sends and receives; the same table is shown once."""
    found: list[Table] = []
    for run in records:
        rows = [
            [
                ("this run: " if i == 0 else "") + row["label"],
                str(row["update_rank"] or "-"),
                f"{millions(row['up'])}, {size(row['up_bytes'])}",
                f"{millions(row['down'])}, {size(row['down_bytes'])}",
                size(row["total_bytes"] - row["initial"] * row["initial_dtype_bytes"]),
                size(row["initial"] * row["initial_dtype_bytes"]) if row["initial"] else "unknown",
            ]
            for i, row in enumerate(run["communication"])
            if row["initial"] or row["method"] != "full"
        ]
        about = (
            "arameters and bytes; FedEx's residual has rank (K-1) R, where the paper counts K R."
        )
        about = f"{run['name']}: p{about}" if len(records) > 1 else f"P{about}"
        if rows:
            head = list(headers.COMMUNICATION)
            found.append(table(head, rows, caption=about, about=headers.COMMUNICATION))
    return found


def glance(records: Sequence[Record]) -> list[Table]:
    """Return where several runs differ, and what came of it, a column a run."""
    if len(records) < 2:
        return []
    rows = [row for row in facts(records)["rows"] if len(set(row[1:])) > 1]
    results = [{label: value for value, label in tiles(run)} for run in records]
    labels = list(dict.fromkeys(label for found in results for label in found))
    rows += [[label, *(found.get(label, "-") for found in results)] for label in labels]
    return [table(["", *(run["name"] for run in records)], rows) | {"facts": True, "wide": True}]
