"""The report of a comparison as one HTML file: it opens from disk, without a network, and asks for nothing outside.

core/page.html is the page with gaps. Whatever fills them may be a stranger's (samples, paths, settings): all of it is
escaped, and the page's own rules allow no script but the one it came with.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.files import write_text
from core.metrics import Record, loss_range, series, val_gap

COLORS = 4
MOST_POINTS = 2000  # in a curve of training losses; more are averaged


def write_page(path: Path, title: str, facts: str, command: str, runs: Mapping[str, list[Record]], comparable: bool,
               table: Sequence[Sequence[str]], samples: Mapping[str, str],
               settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the page. runs, samples, settings: by the labels of the runs; table: rows of cells, the titles first."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    gaps = {"title": text(title), "facts": text(facts), "command": text(command), "table": table_of(table),
            "samples": "\n".join(f"<section><h3>{text(label)}</h3><pre>{text(sample)}</pre></section>"
                                 for label, sample in samples.items()),
            "settings": settings_table(settings),
            "data": json.dumps(charts(runs, comparable), allow_nan=False).replace("<", "\\u003c"),
            **{f"{name}_hash": hash_of(page, name) for name in ("style", "script")}}
    write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda gap: gaps[gap[1]], page))


def clean(value: object) -> str:
    """As text that UTF-8 and HTML can hold: no halves of characters, no control characters."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value))


def text(value: object) -> str:
    return html.escape(clean(value))


def hash_of(page: str, element: str) -> str:
    """Of the content of the page's own <element>, as Content-Security-Policy names it."""
    content = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)[0]
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def table_of(rows: Sequence[Sequence[str]], marked: Sequence[bool] = ()) -> str:
    lines = ["<table><thead><tr>" + "".join(f"<th>{text(cell)}</th>" for cell in rows[0]) + "</tr></thead><tbody>"]
    for number, row in enumerate(rows[1:]):
        lines.append('<tr class="differs">' if marked and marked[number] else "<tr>")
        lines += [f'<td class="text" title="{text(cell)}">{text(cell)}</td>' for cell in row] + ["</tr>"]
    return "\n".join([*lines, "</tbody></table>"])


def settings_table(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a setting, marked where the runs differ."""
    keys = list(dict.fromkeys(key for run in settings.values() for key in run))
    rows = [[key, *(str(run.get(key, "-")) for run in settings.values())] for key in keys]
    return table_of([["", *settings], *rows], [len(set(row[1:])) > 1 for row in rows])


def charts(runs: Mapping[str, list[Record]], comparable: bool) -> list[dict[str, Any]]:
    """What the page's script draws: the losses and, for two runs of the same tokens, their gap."""
    low, high = loss_range(runs)
    losses = []
    for number, (label, records) in enumerate(runs.items()):
        for kind, thin in (("training", True), ("validation", False)):
            steps, values = series(records, "train_loss" if thin else "val_loss")
            if thin:
                steps, values = thinned(steps, values)
            if steps:
                losses.append({"label": clean(f"{label} {kind}"), "color": number % COLORS, "thin": thin,
                               "steps": steps, "values": values})
    found = [{"title": "loss, nats per token", "height": "tall", "low": low, "high": high, "series": losses}]
    if len(runs) == 2 and comparable:
        first, second = runs
        steps, gaps = val_gap(*runs.values())
        shown = gaps[1:] or gaps or [0.0]  # the first one, of untrained weights, says nothing
        room = 0.1 * (max(*shown, 0.0) - min(*shown, 0.0)) or 0.01
        found.append({"title": clean(f"gap: {second} validation - {first} validation"), "height": "low",
                      "low": min(*shown, 0.0) - room, "high": max(*shown, 0.0) + room,
                      "series": [{"label": "gap", "color": 1, "thin": False, "steps": steps, "values": gaps}]})
    return found


def thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """At most MOST_POINTS points, each the mean of as many neighbours, at the last one's step."""
    each = -(-len(steps) // MOST_POINTS) or 1
    groups = [range(i, min(i + each, len(steps))) for i in range(0, len(steps), each)]
    return [steps[group[-1]] for group in groups], [sum(values[i] for i in group) / len(group) for group in groups]
