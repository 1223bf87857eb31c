"""The shown tables from what was measured: columns, rates, shares of the ceilings, and words. Imports no torch."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

from benchmarks.gpu.run import Part

Row = Dict[str, Any]
_RATES = (("case", ""), ("milliseconds", "ms"), ("tokens_per_second", "tokens/s"), ("mfu", "MFU"))
TABLES: Dict[str, Tuple[str, Tuple[Tuple[str, str], ...]]] = {
    "ceilings": (
        "What can this device do at most?",
        (("case", ""), ("rate", "measured"), ("of_sheet", "of the data sheet")),
    ),
    "agreement": (
        "Do the Triton kernels agree with the references?",
        (
            ("case", ""),
            ("agrees", "agrees"),
            ("of_bound", "largest difference / its bound"),
            ("worst", "where"),
            ("repeats", "twice the same"),
        ),
    ),
    "towers": (
        "How quick are towers and losses, forward and backward?",
        (
            *_RATES,
            ("of_product", "of the product's rate"),
            ("of_copy", "of the copy's rate, at least"),
            ("peak", "peak memory"),
        ),
    ),
    "references": (
        "How much quicker than torch.compile of the reference?",
        (
            ("case", ""),
            ("milliseconds", "ms"),
            ("reference_milliseconds", "the reference's ms"),
            ("times_quicker", "times quicker"),
        ),
    ),
    "steps": (
        "Does a whole training step wait for anything?",
        (
            *_RATES,
            ("peak", "peak memory"),
            ("waits", "waits of the host"),
            ("overlap", "exchange beside computation"),
            ("backend", "process group"),
        ),
    ),
}
"""Part -> the question that its table answers, and the table's columns: a row's key and the heading."""


def complete(parts: Sequence[Part]) -> None:
    """Adds the shown columns to the rows, in place."""
    by_name = {part.name: part for part in parts}
    ceilings = {row["case"]: row for row in by_name["ceilings"].rows} if "ceilings" in by_name else {}
    for part in parts:
        for row in part.rows:
            _complete(row, ceilings)


def _complete(row: Row, ceilings: Dict[str, Row]) -> None:
    seconds = row.get("seconds")
    if seconds is None:
        return
    row["milliseconds"] = f"{1000 * seconds:,.3f}"
    product, copy = ceilings.get(f"product {row.get('precision')}", {}), ceilings.get("copy", {})
    if "tokens" in row:
        row["tokens_per_second"] = f"{row['tokens'] / seconds:,.0f}"
    if "flops" in row:
        row["mfu_of"] = _share(row["flops"] / seconds, product.get("sheet_flops_per_second"))
        row["mfu"] = _percent(row["mfu_of"])
        row["of_product"] = _percent(_share(row["flops"] / seconds, product.get("flops_per_second")))
    if "least_bytes" in row:
        row["of_copy"] = _percent(_share(row["least_bytes"] / seconds, copy.get("bytes_per_second")))
    if row.get("peak_bytes") is not None:
        row["peak"] = f"{row['peak_bytes'] / 2**20:,.0f} MiB"
    if "reference_seconds" in row:
        reference = row["reference_seconds"]
        row["reference_milliseconds"] = "out of memory" if reference is None else f"{1000 * reference:,.3f}"
        row["times_quicker"] = "–" if reference is None else f"{reference / seconds:.2f}"
    if "waits_in_trace" in row:
        found = row.get("synchronisations")
        row["waits"] = "no GPU" if found is None else ", ".join(f"{x['times']} at {x['where']}" for x in found) or "none"
        row["overlap"] = _percent(row.get("overlap_of")) if row.get("exchange") else "no GPU's streams in the trace"


def _share(rate: float, ceiling: Optional[float]) -> Optional[float]:
    return None if ceiling is None else rate / ceiling


def _percent(share: Optional[float]) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def verdicts(parts: Sequence[Part]) -> List[str]:
    """Says in a line each what is wrong or was not run."""
    lines = []
    for part in parts:
        if part.reason:
            lines.append(f"{part.name}: {part.reason}")
        lines += [f"{part.name}: {row['case']}: disagrees" for row in part.rows if row.get("is_wrong")]
        if part.reason and part.failed:
            continue
        lines += [f"{part.name}: {one['case']}: failed: {one['error']}" for one in part.failed]
        if part.not_run:
            lines.append(f"{part.name}: not run, there was no time left: {'; '.join(part.not_run)}")
    return lines


def is_well(parts: Sequence[Part]) -> bool:
    """Tells whether nothing failed and nothing disagrees. What was not run is neither."""
    return not any(part.failed or any(row.get("is_wrong") for row in part.rows) for part in parts)


def heading(machine: Row, quick: bool) -> str:
    """Says in a line what the numbers were taken on."""
    name, torch = machine.get("name", "unknown device"), machine.get("torch", "?")
    if machine.get("device") == "cuda":
        memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
        shown = f"{name}, {memory}, compute capability {machine['capability']}; torch {torch}, CUDA {machine['cuda']}"
    elif machine.get("device") is None:
        return "nothing was measured: no part could begin"
    else:
        shown = f"{name}: a CPU's numbers, with Triton's interpreter. They say nothing about a GPU. torch {torch}"
    return f"{shown}, Triton {machine.get('triton')}" + (". Tiny sizes: the times say nothing" if quick else "")


def text(parts: Sequence[Part], machine: Row, quick: bool) -> str:
    """Lays the tables out for a terminal."""
    lines = [heading(machine, quick)]
    for part in parts:
        title, columns = TABLES[part.name]
        lines += ["", f"{title} ({part.name}, {part.seconds:.0f} s)"]
        if part.rows:
            lines += _aligned([[head for _, head in columns], *cells(part)])
    return "\n".join([*lines, "", *(verdicts(parts) or ["everything was run, and nothing is wrong"])])


def cells(part: Part) -> List[List[str]]:
    """Lists the texts of a part's rows, by column."""
    return [[str(row.get(key, "")) for key, _ in TABLES[part.name][1]] for row in part.rows]


def _aligned(rows: Sequence[Sequence[str]]) -> List[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    first = [f"{row[0]:<{widths[0]}}" for row in rows]
    others = ["".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:])) for row in rows]
    return [f"  {a}{b}" for a, b in zip(first, others)]
