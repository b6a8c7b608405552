"""The table of `toy train --profile`: time by operation, grouped by what it is for, and products beside the roof."""

from __future__ import annotations

from typing import Any

#: Rows under this share of the step are shown together.
SMALL = 0.004


def table(found: dict[str, Any]) -> list[str]:
    """Lines for a terminal: groups, the slowest first, and under each its operations."""
    rows: list[dict[str, Any]] = found["rows"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    roof, digits = found["roof_gflops"], 3 if found["ms_per_step"] < 100 else 1
    cells: list[tuple[str, ...]] = [("", "calls", "ms", "%", "GFLOP/s", "of the roof")]
    for name, members in sorted(groups.items(), key=lambda item: -sum(row["ms"] for row in item[1])):
        together = sum_of(members, roof)
        cells.append((name, *numbers(together, digits)))
        if len(members) == 1 and describe(members[0]) == name:
            continue
        shown = [row for row in members if row["share"] >= SMALL]
        small = [row for row in members if row["share"] < SMALL]
        if len(small) == 1:
            shown, small = members, []
        for row in sorted(shown, key=lambda row: -row["ms"]):
            cells.append((f"  {describe(row)}", *numbers(row, digits)))
        if small and shown:
            cells.append((f"  {len(small)} more", *numbers(sum_of(small, roof), digits)))
    wide = [max(len(line[n]) for line in cells) for n in range(len(cells[0]))]
    lines = []
    for name, *columns in cells:
        right = [text.rjust(width) for text, width in zip(columns, wide[1:], strict=True)]
        lines.append("  ".join([name.ljust(wide[0]), *right]))
    steps, threads = (count(found[key], key) for key in ("steps", "threads"))
    head = [f"profile of {steps}: {found['ms_per_step']:,.{digits}f} ms a step, {threads}"]
    if roof:
        head.append(f"the roof of products in {found['precision']}: {roof:,.0f} GFLOP/s")
    if found["median_ms"] > 1.2 * found["ms_per_step"]:
        head.append(f"with what other programs took, {found['median_ms']:,.{digits}f} ms a step")
    return [*head, *(line.rstrip() for line in lines)]


def sum_of(rows: list[dict[str, Any]], roof: float | None) -> dict[str, Any]:
    """Rows as one; products' speed only where all of it is products."""
    milliseconds = sum(row["ms"] for row in rows)
    found = {"calls": sum(row["calls"] for row in rows), "ms": milliseconds, "share": sum(row["share"] for row in rows)}
    if milliseconds and all(row.get("gflops") for row in rows):
        found["gflops"] = sum(row["gflops"] * row["ms"] for row in rows) / milliseconds
        found["roof_share"] = found["gflops"] / roof if roof else None
    return found


def describe(row: dict[str, Any]) -> str:
    """`MUL_MAT 2048 x 256 x 688`: m k n of C[m,n] = A[m,k] B[k,n]."""
    if "m" not in row:
        return str(row["op"])
    text = f"{row['op']} {row['m']} x {row['k']} x {row['n']}"
    if row["batch"] > 1:
        text += f", {row['batch']} of them"
    return text + (f" ({row['type']})" if row["type"] != "f32" else "")


def count(n: int, noun: str) -> str:
    return f"{n} {noun.removesuffix('s') if n == 1 else noun}"


def numbers(row: dict[str, Any], digits: int) -> tuple[str, ...]:
    calls = row["calls"]
    share = row.get("roof_share")
    return (
        f"{calls:,.0f}" if float(calls).is_integer() else f"{calls:,.1f}",
        f"{row['ms']:,.{digits}f}",
        f"{100 * row['share']:.1f}",
        f"{row['gflops']:,.0f}" if row.get("gflops") else "",
        f"{100 * share:.0f} %" if share else "",
    )
