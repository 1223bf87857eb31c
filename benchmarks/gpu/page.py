"""The results as one HTML file that asks nothing of any other place."""

from html import escape
from typing import Any, Dict, List, Sequence, Tuple

from benchmarks.gpu.run import Part
from benchmarks.gpu.tables import TABLES, cells, heading, verdicts

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
.wrong { background: #fde3e3 } .label { background: #fff3cd; padding: .6rem 1rem } pre { overflow-x: auto; font-size: 13px }
"""
EXPLANATIONS = {
    "ceilings": "The rate of a large copy (bytes read and written) and of a large square product. Shares below are of these.",
    "agreement": "Results and every gradient against the reference in float64. A difference is given as a part of the bound "
    "that the arithmetic allows, so 1 and less agrees. Each result is made twice and must be the same bit by bit.",
    "towers": "A step is the batch's layout, forward and backward, without dropout. MFU counts the model's products against "
    "the data sheet; the next column against the product measured here in that precision. The last share counts the bytes "
    "that products must move at the least.",
    "references": "The same work by the plain code under torch.compile, in turns with the project's own.",
    "steps": "Trainer's step with the sparse_dist pipeline, in one process. Waits are places where PyTorch made the host wait "
    "for the GPU. The exchange is what ran on other streams than the busiest one.",
}
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2")
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 320, 70, 40


def page(parts: Sequence[Part], machine: Dict[str, Any], quick: bool, command: str) -> str:
    """Makes the page."""
    label, found = escape(heading(machine, quick)), verdicts(parts)
    listed = "".join(f"<li>{escape(line)}</li>" for line in found) or "<li>Everything was run, and nothing is wrong.</li>"
    body = [f"<h1>fuxi_torchrec on {escape(machine.get('name', 'an unknown device'))}</h1>"]
    body.append(f'<p class="label">{label}</p><p>Command: <code>{escape(command)}</code></p>')
    body.append(f"<h2>What is wrong, and what was not run?</h2><ul>{listed}</ul>")
    body += [_section(part) for part in parts]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fuxi_torchrec on a '
        f"{'GPU' if machine.get('device') == 'cuda' else 'CPU'}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _section(part: Part) -> str:
    title, columns = TABLES[part.name]
    pieces = [f"<h2>{escape(title)}</h2><p>{escape(EXPLANATIONS[part.name])}</p>"]
    if part.reason:
        pieces.append(f"<p>{escape(part.reason)}</p>")
    if part.name == "towers":
        pieces += [_plot(part.rows, precision) for precision in ("fp32", "bf16")]
    if part.rows:
        head = "".join(f"<th>{escape(name)}</th>" for _, name in columns)
        rows = "".join(map(_table_row, part.rows, cells(part)))
        pieces.append(f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>')
    for one in part.failed:
        summary = f"{escape(one['case'])}: {escape(one['error'])}"
        pieces.append(f"<details><summary>{summary}</summary><pre>{escape(one['traceback'])}</pre></details>")
    return "".join(pieces)


def _table_row(row: Dict[str, Any], texts: Sequence[str]) -> str:
    marked = ' class="wrong"' if row.get("is_wrong") else ""
    return f"<tr{marked}>" + "".join(f"<td>{escape(text)}</td>" for text in texts) + "</tr>"


def _plot(rows: Sequence[Dict[str, Any]], precision: str) -> str:
    """Tokens a second by length, a line an encoder."""
    lines: Dict[str, List[Tuple[int, float]]] = {}
    for row in rows:
        if row.get("precision") == precision and "encoder" in row:
            lines.setdefault(row["encoder"], []).append((row["length"], row["tokens"] / row["seconds"]))
    if not lines:
        return ""
    lengths = sorted({length for points in lines.values() for length, _ in points})
    top = max(rate for points in lines.values() for _, rate in points)
    step = (WIDTH - LEFT - 150) / max(1, len(lengths) - 1)
    at = {length: LEFT + 10 + step * i for i, length in enumerate(lengths)}
    floor = HEIGHT - BOTTOM
    drawn = [f'<line x1="{LEFT}" y1="{floor}" x2="{WIDTH - 140}" y2="{floor}" stroke="#999"/>']
    for length, x in at.items():
        drawn.append(f'<text x="{x:.0f}" y="{floor + 20}" text-anchor="middle">{length:,}</text>')
    for part in (0.0, 0.5, 1.0):
        y = floor - part * (floor - 20) + 5
        drawn.append(f'<text x="{LEFT - 6}" y="{y:.0f}" text-anchor="end">{part * top:,.0f}</text>')
    for i, (name, points) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        places = [(at[n], floor - rate / top * (floor - 20)) for n, rate in sorted(points)]
        drawn.append(f'<polyline fill="none" stroke="{colour}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        drawn.append(f'<text x="{WIDTH - 130}" y="{30 + 18 * i}" fill="{colour}">{escape(name)}</text>')
    caption = f"Tokens a second by the longest user's events, {precision}"
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" font-size="12" role="img">{"".join(drawn)}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{picture}</figure>"
