"""Tables on the terminal, JSON, plots, and the pages made of committed results (`--report`)."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench import ROOT, operations
from bench.accuracy import Error, measure
from bench.gpu_check import revision, slug
from bench.run import Row
from fusedtricks.__main__ import cpu_model, environment

RESULTS = ROOT / "bench" / "results"
NOT_MEASURED = "not yet measured on a GPU"
# Wide tables stay whole in a log file.
console = Console(width=None if sys.stdout.isatty() else 200)


def progress(total: int, what: str) -> Progress:
    """A bar on stderr, for people: silent in a pipe and in continuous integration."""
    quiet = not sys.stderr.isatty() or bool(os.environ.get("CI"))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet)
    bar.add_task(what, total=total)
    return bar


# ---- terminal --------------------------------------------------------------------------------------------------------


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    value, unit = (value * 1e6, "us") if value < 1e-3 else (value * 1e3, "ms")
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def nbytes(value: int) -> str:
    return f"{value / 1e6:.3g} MB" if value >= 1e6 else f"{value / 1e3:.3g} kB"


def size(value: Sequence[int]) -> str:
    return "x".join(map(str, value))


def others(rows: Iterable[Row]) -> list[str]:
    """Peers and further back ends of ours: whatever has a column of its own."""
    known = {"torch", "compile", "copy"}
    return list(dict.fromkeys(n for row in rows for n in row.times if n not in known and n != row.ours))


def columns(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The throughput table of one operation, for the terminal and for the docs."""
    extra, gpu = others(rows), any(row.device != "cpu" for row in rows)
    head = ["direction", "size", "dtype", "back end", "ours", "torch", "compile", *extra, "vs torch", "vs compile"]
    head += ["bytes", "GB/s", "of copy", *(["host per call", "torch's host"] if gpu else [])]
    body = []
    for r in rows:
        ours = r.times[r.ours]
        named = [seconds(r.times[n].median if n in r.times else None) for n in (r.ours, "torch", "compile", *extra)]
        cells = [r.mode, size(r.size), r.dtype, r.ours, *named, ratio(r.speedup("torch")), ratio(r.speedup("compile"))]
        cells += [nbytes(r.bytes), f"{r.bytes / ours.median / 1e9:.3g}", f"{r.of_copy(r.ours):.0%}"]
        body.append(cells + ([seconds(ours.host), seconds(r.times["torch"].host)] if gpu else []))
    return head, body


def accuracy_columns(rows: Sequence[Error]) -> tuple[list[str], list[list[str]]]:
    """One line for each input: the error of each result, ours beside the others'."""
    who = list(dict.fromkeys(name for row in rows for name in row.errors))
    results = list(dict.fromkeys(row.result for row in rows))
    lines: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        lines.setdefault((row.dtype, row.input), {})[row.result] = row.errors
    head = ["dtype", "input", *(f"{result} {name}" for result in results for name in who)]
    body = []
    for key, line in lines.items():
        cells = [(line.get(result, {}), name) for result in results for name in who]
        body.append([*key, *(error(errors[name]) if name in errors else "-" for errors, name in cells)])
    return head, body


def error(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def show(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    words = {"direction", "size", "dtype", "back end", "input"}
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    for name in head:
        table.add_column(name, justify="left" if name in words else "right", no_wrap=True)
    for line in body:
        table.add_row(*line)
    console.print(table)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def device_name(device: str) -> str:
    if device == "cpu":
        return f"{cpu_model()}, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name()


SYSTEM_HEAP = "the system's: large blocks are returned when freed, and cost page faults when next needed"


def document(
    device: str,
    rows: Sequence[Row] = (),
    accuracy: Sequence[Error] = (),
    system_heap: bool = False,
    seconds: float | None = None,
) -> dict[str, Any]:
    """`seconds`: spent on each contestant and row."""
    return {
        "device": device_name(device),
        "kind": device,
        "revision": revision(),
        "system": f"{platform.system()} {platform.machine()}",
        "environment": environment(),
        "heap": SYSTEM_HEAP if system_heap else "keeps what is freed",
        **({"seconds": seconds} if rows else {}),
        "rows": [row.json() for row in rows],
        "accuracy": [row.json() for row in accuracy],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def record(
    device: str,
    rows: Sequence[Row],
    accuracy: Sequence[Error],
    system_heap: bool = False,
    seconds: float | None = None,
) -> list[Path]:
    """One file for each operation under bench/results/<device>/, which is what --report reads."""
    folder = RESULTS / slug(device_name(device))
    paths = []
    for stem in dict.fromkeys([row.operation for row in (*rows, *accuracy)]):
        for kind, part in (("rows", rows), ("accuracy", accuracy)):
            mine = [row for row in part if row.operation == stem]
            if mine:
                name = ["accuracy"] if kind == "accuracy" else ["system-heap"] if system_heap else []
                paths.append(folder / ".".join([stem, *name, "json"]))
                write_json(paths[-1], document(device, **{kind: mine}, system_heap=system_heap, seconds=seconds))
    return paths


# ---- plot ------------------------------------------------------------------------------------------------------------


def plot(path: Path, rows: Sequence[Row], device: str) -> None:
    """Achieved bandwidth by size: bars for each implementation, a line for the copy, one panel for each table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        panels.setdefault((row.operation, row.dtype), {}).setdefault(row.mode, []).append(row)
    modes = list(dict.fromkeys(row.mode for row in rows))
    figure, axes = plt.subplots(
        len(panels), len(modes), figsize=(6.5 * len(modes), 2.9 * len(panels)), squeeze=False, layout="constrained"
    )
    for line, ((operation, dtype), by_mode) in zip(axes, panels.items(), strict=True):
        for axis, mode in zip(line, modes, strict=True):
            part = by_mode.get(mode, [])
            names = [n for n in dict.fromkeys(name for row in part for name in row.times) if n != "copy"]
            width = 0.8 / max(len(names), 1)
            for i, name in enumerate(names):
                there = [(x, row) for x, row in enumerate(part) if name in row.times]
                speeds = [row.bytes / row.times[name].median / 1e9 for _, row in there]
                label = f"fusedtricks, {name}" if name in ("cpu", "cuda", "triton", "reference") else name
                places = [x + (i - len(names) / 2 + 0.5) * width for x, _ in there]
                axis.bar(places, speeds, width, label=label)
            copies = [row.bytes / row.times["copy"].median / 1e9 for row in part]
            axis.plot(range(len(part)), copies, "k_", markersize=24, label="copy of the same bytes")
            axis.set_xticks(range(len(part)), [size(row.size) for row in part], rotation=30, ha="right", fontsize=8)
            axis.set_title(f"{operation}, {mode}, {dtype}", fontsize=10)
            axis.set_ylabel("GB/s of necessary bytes", fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    where = {"loc": "outside upper center", "ncols": len(handles)}
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=9, title=device, **where)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=72)
    plt.close(figure)


# ---- pages made of committed results ---------------------------------------------------------------------------------


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(line) + " |" for line in body)])


def between_markers(path: Path, name: str, content: str) -> None:
    begin, end = f"<!-- {name}: written by python -m bench --report -->", f"<!-- end of {name} -->"
    text = path.read_text()
    if begin not in text or end not in text:
        raise SystemExit(f"bench: {path.relative_to(ROOT)} has no markers for {name}")
    head, rest = text.split(begin, 1)
    path.write_text(f"{head}{begin}\n\n{content}\n\n{end}{rest.split(end, 1)[1]}")


def committed() -> dict[str, dict[str, dict[str, Any]]]:
    """{device folder: {file name: content}}"""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*/*.json")):
        found.setdefault(path.parent.name, {})[path.name] = json.loads(path.read_text())
    return found


def counterpart(operation: Any) -> str:
    """A module or an optimizer of torch's, or a formula."""
    name = operation.stands_in_for
    return name if " " in name else f"torch.{name}"


def _back_ends(stem: str) -> str:
    files = {
        "reference": f"fusedtricks/ops/{stem}.py",
        "C++": f"csrc/cpu/{stem}.cpp",
        "CUDA": f"csrc/cuda/{stem}.cu",
        "Triton": f"triton_kernels/{stem}.py",
    }
    return ", ".join(f"[{name}]({path})" for name, path in files.items() if (ROOT / path).exists())


def _headline(stem: str, operation: Any, kind: str, found: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = []
    for folder, files in found.items():
        content = files.get(f"{stem}.json")
        if content is None or content["kind"] != kind:
            continue
        rows = [Row.from_json(r) for r in content["rows"]]
        rows = [r for r in rows if r.size == operation.headline and r.dtype == "float32"]
        figures = ", ".join(f"{r.mode} {ratio(r.speedup('torch'))}" for r in rows)
        if figures:
            lines.append(f"{figures} ([{content['device']}](bench/results/{folder}/{stem}.json))")
    return "<br>".join(lines) or (NOT_MEASURED if kind == "cuda" else "not yet measured")


def report() -> None:
    """Write the operation table of README.md and docs/benchmarks.md with its plots from the committed results."""
    found = committed()
    head = ["operation", "stands in for", "back ends", "floor: forward, backward", "against torch on a CPU", "on a GPU"]
    body = []
    for stem, op in operations(processes=True).items():
        figures = [_headline(stem, op, kind, found) for kind in ("cpu", "cuda")]
        body.append([f"`{stem}`", f"`{counterpart(op)}`", _back_ends(stem), ", ".join(op.floors), *figures])
    between_markers(ROOT / "README.md", "operations", markdown(head, body))
    pages = [_device_page(folder, files) for folder, files in found.items()]
    if not any(content["kind"] == "cuda" for files in found.values() for content in files.values()):
        pages.append(f"## GPU\n\nEvery kernel for GPUs is {NOT_MEASURED}.")
    between_markers(ROOT / "docs" / "benchmarks.md", "results", "\n\n".join(pages))


def _device_page(folder: str, files: dict[str, dict[str, Any]]) -> str:
    some = next(iter(files.values()))
    parts = [f"## {some['device']}"]
    for name, content in files.items():
        env = content["environment"]
        if content["rows"]:
            rows = [Row.from_json(r) for r in content["rows"]]
            system = content.get("heap") == SYSTEM_HEAP
            title = "throughput with the system's heap, page faults included" if system else "throughput"
            parts.append(f"### {rows[0].operation}: {title}\n\n{markdown(*columns(rows))}")
            if not system:
                picture = ROOT / "docs" / "benchmarks" / folder / f"{rows[0].operation}.png"
                plot(picture, rows, some["device"])
                parts.append(f"![achieved bandwidth]({picture.relative_to(ROOT / 'docs')})")
        if content["accuracy"]:
            errors = [Error(**r) for r in content["accuracy"]]
            title = f"### {errors[0].operation}: {measure(errors[0].operation)}"
            parts.append(f"{title}\n\n{markdown(*accuracy_columns(errors))}")
        source = f"[{name}](../bench/results/{folder}/{name})"
        spent = f", {content['seconds']:g} s for each figure" if content.get("seconds") else ""
        parts.append(f"{source}: revision {content['revision']}, torch {env['torch']}, triton {env['triton']}{spent}.")
    return "\n\n".join(parts)
