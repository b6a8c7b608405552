"""`toy train --dry-run`: what a run would need and write. Writes nothing."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import click

from toy import config, recipes
from toy.cli.common import bytes_text, count_text, duration_text, emit
from toy.errors import shown

if TYPE_CHECKING:
    from toy.cli.train import Job

FORMAT = "toy/plan-v1"
#: Share of this machine's matrix-product speed that a training step reaches, where no earlier run says better.
TYPICAL_SHARE = 0.5
PARTS = ("base", "weights", "gradients", "moments", "compute", "inputs", "work", "corpus", "runtime")


def gemm_rate() -> float:
    """Floating-point operations a second of this machine's matrix product (numpy's BLAS), the best of a few: 0.2 s."""
    import numpy

    n = 768
    a = numpy.ones((n, n), dtype=numpy.float32)
    best = 0.0
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        begun = time.perf_counter()
        a @ a
        best = max(best, 2 * n**3 / (time.perf_counter() - begun))
    return best


def earlier_rate(job: Job) -> tuple[float, str] | None:
    """Operations a second of the last finished run here on this device, and its id."""
    from toy.runs import all_runs, listing, read_json

    for run in reversed(all_runs(job.runs)[-20:]):
        row = listing.summary(run)
        dtype = read_json(run / "config.json").get("train", {}).get("dtype")
        flops = read_json(run / "meta.json").get("flops_per_token")
        is_alike = (row["device"], dtype) == (job.config.run.device, job.config.train.dtype)
        if row["state"] == "done" and is_alike and flops and row["tokens_per_second"]:
            return flops * row["tokens_per_second"], run.name
    return None


def make_plan(job: Job) -> dict[str, Any]:
    """The document of `toy train --dry-run`."""
    from toy.builds import is_built
    from toy.cli.train import disk_bytes, native_plan

    resolved, n_tokens = job.inputs.guess(exact=True)
    config.check(resolved, job.loaded.origins)
    plan = native_plan(resolved, n_tokens, job.inputs.base)
    work = plan["flops_per_token"] * plan["tokens_per_step"] * resolved.train.steps
    earlier = earlier_rate(job)
    if earlier is not None:
        rate, basis = earlier[0], f"the speed of {earlier[1]}"
    else:
        rate = gemm_rate() * TYPICAL_SHARE
        basis = f"half of this machine's matrix-product speed, {2 * rate / 1e9:.0f} GFLOP/s"
    run = job.out or job.runs / job.loaded.run_id_template
    files = ["config.json", "config.kv", "meta.json", "events.jsonl", "losses.txt", "loss.svg"]
    files += ["checkpoints/step_<N>/", "checkpoints/latest", f"weights/{recipes.gguf_name(resolved.run.recipe)}"]
    return {
        "recipe": resolved.run.recipe,
        "arch": resolved.run.arch,
        "device": resolved.run.device,
        "dtype": resolved.train.dtype,
        "runner": job.row.target,
        "built": is_built([job.row.target], resolved.run.build),
        "parameters": plan["parameters"],
        "total_parameters": plan.get("total_parameters", plan["parameters"]),
        "vocab_size": resolved.model.vocab_size,
        "memory": {part: plan[part] for part in PARTS if part in plan} | {"total": plan["total"]},
        "disk_bytes": disk_bytes(plan, resolved),
        "tokens_per_step": plan["tokens_per_step"],
        "items_per_step": resolved.train.batch if resolved.run.arch == "vit" else plan["tokens_per_step"],
        "steps": resolved.train.steps,
        "tokens": plan["tokens_per_step"] * resolved.train.steps,
        "flops_per_token": plan["flops_per_token"],
        "seconds": work / rate if rate else None,
        "seconds_basis": basis,
        "run_dir": str(run),
        "files": [os.path.join(run, name) for name in files],
        "packed_tokens": str(job.cache),
        "config": config.to_json(resolved),
    }


def show_plan(job: Job, as_json: bool) -> None:
    plan = make_plan(job)
    if as_json:
        emit(FORMAT, plan)
        return
    memory, model = plan["memory"], plan["config"]["model"]
    adapts, sees = plan["recipe"] == "lora", plan["arch"] == "vit"
    unit = "images" if sees else "tokens"
    what, size = ("classes         ", model["n_class"]) if sees else ("vocabulary      ", model["vocab_size"])
    lines = [
        f"{plan['recipe']} {plan['arch']} on {plan['device']} in {plan['dtype']}, runner {plan['runner']}"
        + ("" if plan["built"] else " (to be built first)"),
        f"parameters      {plan['parameters']:>15,}  {count_text(plan['parameters'])}",
        *([f"with the base   {plan['total_parameters']:>15,}  {count_text(plan['total_parameters'])}"] * adapts),
        f"{what}{size:>15,}",
        "memory, bytes",
    ]
    parts = [part for part in (*PARTS, "total") if memory.get(part)]
    lines += [f"  {part:<13} {memory[part]:>15,}  {bytes_text(memory[part])}" for part in parts]
    lines += [
        f"disk, at most   {plan['disk_bytes']:>15,}  {bytes_text(plan['disk_bytes'])}",
        f"{unit} a step   {plan['items_per_step']:>15,}",
        f"{unit}          {plan['items_per_step'] * plan['steps']:>15,}  in {plan['steps']:,} steps",
        f"estimated time  {duration_text(plan['seconds']):>15}  from {plan['seconds_basis']}",
        "would write",
        *(f"  {shown(file)}" for file in plan["files"]),
        f"  {shown(plan['packed_tokens'])}/  (packed {unit}, unless they are there)",
        "nothing was written",
    ]
    click.echo("\n".join(lines))
