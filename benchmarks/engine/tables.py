"""The results of `cepo bench` as tables."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from cepo.eval.report.tables import ConsoleTable

RATIOS = ("speedup", "speedup_by_rows", "speedup_by_flops")
_MEASURES = ("case", "error", "seconds", "rollouts/s", "VJPs/s", "token rows/s", "peak MiB", "TFLOP", "of matmul")
_COLUMNS = (*_MEASURES, "× reference", "by rows", "by FLOPs")
_MAIN = ("case", "error", "seconds", "rollouts/s", "VJPs/s", "peak MiB", "× reference")
_WIDTH = 200  # of bench.txt
Row = Mapping[str, Any]


def results_tables(rows: Sequence[Row], *, whole: bool = False) -> list[ConsoleTable]:
    """Return a table per model and workload of the rows of all sections except the scaling.

    Args:
        rows: the recorded rows.
        whole: whether to return all columns, as in bench.txt, instead of the main ones.
    """
    tables: dict[str, list[list[str]]] = {}
    for row in rows:
        if row["section"] == "scaling":
            continue
        shapes = row["shapes"]
        opening = f"the first {shapes['opening']}" if shapes["opening"] else "none"
        static = f"; {shapes['prompts']} prompts, {opening} static" if row["section"] == "static" else ""
        lengths = " ".join(f"{name} {shapes[name]}" for name in ("G", "Lz", "Lx", "Ly", "K"))
        cells = _cells(row)
        members = tables.setdefault(f"{row['model']} {row['dtype']}, {lengths}{static}", [])
        members.append([cells[name] for name in (cells if whole else _MAIN)])
    header = _COLUMNS if whole else _MAIN
    return [ConsoleTable(header, members, title) for title, members in tables.items()]


def results_text(size: str, rows: Sequence[Row]) -> str:
    """Return the tables as text, preceded by the machine, the versions and the tolerances."""
    first = rows[0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("driver", "torch", "triton", "transformers", "python"))
    lines = [
        f"{first['device']}, {first['threads']} threads, {versions}, commit {first['commit']}, seed {first['seed']}"
    ]
    compared = {"peers": "Jacobians", "effects": "effects and paths", "loss": "losses and their gradients"}
    first_rows = {(row["model"], row["section"]): row for row in reversed(rows) if row["section"] in compared}
    for row in reversed(first_rows.values()):
        rate = max(other["matmul_flops_per_s"] for other in rows if other["model"] == row["model"])
        lines.append(
            f"{row['model']}: matrix products of its MLP run at {rate / 1e12:.3g} TFLOP/s; "
            f"an error of {compared[row['section']]} up to {row['tolerance']:.1e} passes"
            + (f" (the oracle's own in {row['dtype']}: {row['oracle_error']:.1e})" if row["oracle_error"] else "")
        )
    stream = io.StringIO()
    title = f"cepo bench, {size}: seconds only where the values agree with the oracle"
    Console(file=stream, width=_WIDTH).print(title, *results_tables(rows, whole=True), sep="\n", highlight=False)
    return "\n".join(lines) + "\n" + stream.getvalue()


def _cells(row: Row) -> dict[str, str]:
    """Return every column of a row, with the status in place of the seconds if it was not timed."""
    error = "" if row["error"] is None else f"{row['error']:.0e}"
    if row["seconds"] is None:
        return dict.fromkeys(_COLUMNS, "") | {"case": row["case"], "error": error, "seconds": row["status"]}
    everything = row["shapes"]["G"] * row["shapes"]["prompts"]
    partly = row["measured_rollouts"] < everything
    note = f" (scaled from {row['measured_rollouts']} of {everything} rollouts)" if partly else ""
    halved = row["batch"] is not None and row["batch"] < row["measured_rollouts"]
    note += f" (batches of {row['batch']})" if halved else ""
    values = (
        row["case"] + note,
        error,
        f"{row['seconds']:.3g}",
        f"{row['rollouts_per_s']:.3g}",
        "" if row.get("vjps_per_s") is None else f"{row['vjps_per_s']:.3g}",  # older rows have none
        f"{row['rows_per_s']:,.0f}",
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}",
        f"{row['flops'] / 1e12:.3g}",
        f"{row['matmul_fraction']:.0%}",
        *("" if row[name] is None else f"{row[name]:.2f}" for name in RATIOS),
    )
    return dict(zip(_COLUMNS, values, strict=True))
