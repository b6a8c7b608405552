"""`toy train`: validate everything, claim the run's directory, build, pack, launch, stream, sum up."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toy import config, recipes
from toy.cli.common import bytes_text, json_option, progress_bar, say
from toy.config import KNOBS, Given, Loaded
from toy.errors import ToyError, os_errors, shown

if TYPE_CHECKING:
    from toy.cli.inputs import Inputs
    from toy.runs import Claim

FORMAT = "toy/train-v1"

#: The flags that are a knob's everyday name.
KNOB_FLAGS = {
    "--recipe": "run.recipe",
    "--arch": "run.arch",
    "--device": "run.device",
    "--steps": "train.steps",
    "--seed": "run.seed",
    "--threads": "run.threads",
    "--corpus": "data.corpus",
    "--images": "data.images",
    "--init": "model.init",
    "--rank": "lora.rank",
    "--resume": "checkpoint.resume",
    "--stop-after": "run.stop_after",
    "--name": "run.name",
}

#: Steps that --profile (log.profile) looks at.
PROFILED = 20


def knob_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for flag, key in reversed(KNOB_FLAGS.items()):
        knob = KNOBS[key]
        metavar = "PATH" if knob.path else "TIME" if knob.duration else "|".join(knob.choices) or None
        homes = f" ({', '.join(recipes.RECIPE_FLAGS[flag])})" if flag in recipes.RECIPE_FLAGS else ""
        doc = knob.doc.rstrip(".") + f"{homes}."
        text = knob.type is str or knob.duration
        function = click.option(flag, type=str if text else knob.type, metavar=metavar, help=doc)(function)
    return function


@click.command()
@click.argument("recipe_word", metavar="[RECIPE]", required=False)
@knob_options
@click.option("--model", metavar="GGUF", help="GGUF, run or name to start from (warm-start: donor, lora: base).")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file, or a run's config.json.")
@click.option("--preset", help="Shipped values to start from: " + ", ".join(config.preset_names()) + ".")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any knob: --set train.batch=8.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the run, instead of runs/<run_id>.")
@click.option("--dry-run", is_flag=True, help="Say what it would need and write; write nothing.")
@click.option("--profile", is_flag=True, help=f"Say what the time of {PROFILED} steps goes to, by operation.")
@click.option("--no-sample", is_flag=True, help="No sample of text at the end.")
@json_option
def command(
    recipe_word: str | None,
    config_file: Path | None,
    preset: str | None,
    sets: tuple[str, ...],
    out: Path | None,
    dry_run: bool,
    profile: bool,
    no_sample: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train a model; leaves a run bundle and a GGUF.

    \b
    toy train
    toy train --preset nanogpt-char --corpus tinyshakespeare.txt
    toy train warm-start --model runs/latest --corpus book.txt
    toy train lora --model MODEL.gguf --corpus answers.jsonl --rank 16
    toy train vit-tiny --images photos/
    toy train --resume runs/latest --steps 2000

    `toy config show --doc` lists every knob. Ctrl-C saves a checkpoint and stops.
    """
    if profile:
        sets = (f"log.profile={PROFILED}", *sets)
    job = prepare_job(recipe_word, flags, config_file, preset, sets, out)
    if dry_run:
        from toy.cli.plan import show_plan

        show_plan(job, as_json)
        return
    run_job(job, as_json=as_json, sample=not no_sample)


@dataclass
class Job:
    """A run that was asked for and found good, before anything was made."""

    loaded: Loaded
    row: recipes.Row
    project: Path | None
    out: Path | None  # --out, absolute
    cache: Path  # of packed data
    inputs: Inputs
    resumed_from: dict[str, Any] | None = None  # run_id, step

    @property
    def config(self) -> config.Config:
        return self.loaded.config

    @property
    def runs(self) -> Path:
        from toy.runs import runs_dir

        return runs_dir(self.project)


# --- before anything is made ----------------------------------------------------------------------------------------


def prepare_job(
    recipe_word: str | None,
    flags: dict[str, Any],
    config_file: Path | None,
    preset: str | None,
    sets: tuple[str, ...],
    out: Path | None,
) -> Job:
    """Everything that can be refused, refused: words, flags, configuration, base, data, paths, memory, disk."""
    from toy import corpora
    from toy.cli.inputs import INPUTS
    from toy.runs import check_out, check_template, check_writable, find_project

    if recipe_word is not None:
        if flags["recipe"] not in (None, recipe_word):
            message = f"two recipes: {recipe_word} and --recipe {flags['recipe']}"
            raise ToyError("bad_flag", message, "name one")
        flags["recipe"] = recipe_word
    project = find_project()
    given = {
        key: Given(value, flag, quoted=KNOBS[key].type is str, base=Path.cwd())
        for flag, key in KNOB_FLAGS.items()
        if (value := flags[flag.strip("-").replace("-", "_")]) is not None
    }
    if flags["resume"] is not None:
        checkpoint = find_whole(flags["resume"], project)
        given["checkpoint.resume"] = Given(str(checkpoint), "--resume", quoted=True)
        if config_file is None and (checkpoint.parent.parent / "config.json").is_file():
            config_file = checkpoint.parent.parent / "config.json"  # what is resumed keeps its own configuration
    layers = config.gather(project=project, config_file=config_file, preset=preset, sets=sets, flags=given)
    check_flags(layers, flags)
    if flags["model"] is not None:
        layers.given[recipes.WITH_BASE[layers.recipe]] = Given(flags["model"], "--model", quoted=True, base=Path.cwd())
    loaded = config.build(layers)
    cfg = loaded.config
    recipes.check_words(cfg.run.recipe, cfg.run.arch, cfg.run.device, loaded.origins, flag_keys(given))
    resumed_from = check_resume(cfg, loaded, project)
    if cfg.run.device == recipes.AUTO:
        cfg.run.device, reason = recipes.auto_device(cfg.run.recipe, cfg.train.dtype)
        say(f"note: device {cfg.run.device}{f' ({reason})' if reason else ''}")
    cache = corpora.default_cache_dir(project)
    # a donor brings its architecture: whether there is a runner is asked of what is known then
    early = recipes.any_row(cfg.run.recipe, cfg.run.arch, cfg.run.device, loaded.origins["run.arch"] != "default")
    inputs = INPUTS[cfg.run.recipe](loaded, early, project, cache)
    inputs.settle()
    row = inputs.row = recipes.select(cfg.run.recipe, cfg.run.arch, cfg.run.device)
    if loaded.origins["train.dtype"] == "default" and cfg.train.dtype != (dtype := recipes.default_dtype(row)):
        cfg.train.dtype = dtype
        say(f"note: train.dtype is {dtype}, {row.device}'s default")
    recipes.check_knobs(row, cfg.train.dtype, loaded.origins["train.dtype"])
    if cfg.log.profile and row.device != "cpu":
        message = (
            f"log.profile = {cfg.log.profile} ({loaded.origins['log.profile']}) takes the times of the cpu's operations"
        )
        raise ToyError("not_available", message, f"leave it out, or profile with --device cpu instead of {row.device}")
    check_template(loaded.run_id_template, loaded.template_origin)
    if out is not None:
        out = Path(os.path.abspath(out.expanduser()))
        check_out(out)
    job = Job(loaded, row, project, out, cache, inputs, resumed_from)
    if out is None:
        check_writable(job.runs)
    config.check(cfg, loaded.origins)
    inputs.check()
    guess, _ = inputs.guess()
    config.check(guess, loaded.origins)
    check_room(job, guess)
    return job


def flag_keys(given: dict[str, Given]) -> list[str]:
    return [key for key in given if key.startswith("run.")]


def check_flags(layers: config.Layers, flags: dict[str, Any]) -> None:
    """Words and flags, before any value is read: a flag of another recipe is that, whatever stands after it."""
    recipe = layers.given.get("run.recipe")
    if recipe is not None and layers.recipe not in recipes.RECIPES:
        words = {"run.recipe": recipe.origin}
        recipes.check_words(layers.recipe, "llama", "cpu", words, ["run.recipe"] if recipe.is_flag else [])
    recipes.check_flags(layers.recipe, [f"--{name}" for name, value in flags.items() if value is not None])


def find_whole(word: str, project: Path | None) -> Path:
    """The checkpoint that a run, its id, or a checkpoint's own directory stands for."""
    from toy.runs import find_checkpoint

    path = Path(word).expanduser()
    if path.is_dir() and path.parent.name == "checkpoints" and not (path / "DONE").exists():
        raise ToyError(
            "bad_file",
            f"{shown(path)} is no whole checkpoint: it has no DONE",
            "name its run: the last whole one is taken",
        )
    return find_checkpoint(word, project)


def check_resume(cfg: config.Config, loaded: Loaded, project: Path | None) -> dict[str, Any] | None:
    """Make checkpoint.resume the path of a whole checkpoint that this run can go on from; which run and step it is."""
    from toy.runs import read_json

    if not cfg.checkpoint.resume:
        return None
    path = find_whole(cfg.checkpoint.resume, project)
    run = path.parent.parent
    before = read_json(run / "config.json").get("run", {})
    for key in ("recipe", "arch"):
        mine, origin = getattr(cfg.run, key), loaded.origins[f"run.{key}"]
        if before.get(key) not in (None, mine):
            raise ToyError(
                "resume_mismatch",
                f"{shown(path)} is of a run with run.{key} = {before[key]}, not {mine} ({origin})",
                f"leave --{key} out: what is resumed keeps its own",
            )
    step = path.name.removeprefix("step_")
    at = int(step) if step.isdigit() else None
    if at is not None and (at > cfg.train.steps or (at == cfg.train.steps and has_ended(run))):
        raise ToyError(
            "bad_flag",
            f"{shown(path)} is at step {step} already, and train.steps = {cfg.train.steps}"
            f" ({loaded.origins['train.steps']})",
            f"train further with --steps {2 * at}, say",
        )
    cfg.checkpoint.resume = str(path)
    return {"run_id": run.name, "step": at}


def has_ended(run: Path) -> bool:
    """Whether a run came to its own end, evaluation and all, and was not cut off at its last step."""
    from toy.runs import events

    ends = [event for event in events.read(run) if event["kind"] == "run_end"]
    return bool(ends) and ends[-1].get("reason") in ("done", "early_stop")


def native_plan(cfg: config.Config, corpus_tokens: int = 0, base: Path | None = None) -> dict[str, Any]:
    """The memory of a resolved configuration, from the allocated graph. Raises ToyError (oom, bad_config).

    Exact on the cpu; for another device it is the device's graph as the cpu would lay it out.
    """
    try:
        from toy import _native
    except ImportError as error:
        raise ToyError(
            "build_failed", "toy's native module is not built", "install toy: pip install . (or make setup)"
        ) from error
    try:
        plan: dict[str, Any] = _native.plan(config.to_kv(cfg), corpus_tokens, str(base or ""))
    except (ValueError, RuntimeError, MemoryError) as error:
        message, _, hint = str(error).partition("\n")
        kind = "bad_config" if isinstance(error, ValueError) else "oom"
        if kind == "bad_config" and base is not None and str(base) in message:
            kind, message = "bad_file", message.replace(str(base), shown(base))
        hint = hint or "make the model, the batch or the context smaller"
        raise ToyError(kind, message or "this machine's memory is not enough", hint) from error
    return plan


def disk_bytes(plan: dict[str, Any], cfg: config.Config) -> int:
    """The most that the run's directory can come to: checkpoints (weights and moments), one more being written, the
    GGUF, and a line an event."""
    checkpoint: int = plan["weights"] + plan["moments"]
    kept = cfg.checkpoint.keep + int(cfg.checkpoint.keep_best) + 1
    if cfg.checkpoint.keep_every:
        kept += cfg.train.steps // cfg.checkpoint.keep_every
    lines = 300 * (cfg.train.steps // cfg.log.every) + 30 * cfg.train.steps
    return int(kept * checkpoint + plan["weights"] + lines + (4 << 20))


def check_room(job: Job, cfg: config.Config, n_tokens: int = 0) -> dict[str, Any]:
    """Refuse what cannot fit into this machine's memory or onto the disk; else the plan of what it takes."""
    from toy.runs.bundle import memory_bytes

    plan = native_plan(cfg, n_tokens, job.inputs.base)
    memory = memory_bytes()
    if plan["total"] > memory and cfg.run.device == "cpu":  # how much another device has, its runner finds out
        raise ToyError(
            "oom",
            f"this run needs {bytes_text(plan['total'])} of memory, and this machine has {bytes_text(memory)}",
            "lower train.micro_batch (the same update, in more rounds), model.context or model.n_embd",
        )
    there = job.out or job.runs
    while not there.exists():
        there = there.parent
    need, disk = disk_bytes(plan, cfg), shutil.disk_usage(there)
    if disk.total and need > disk.free:
        raise ToyError(
            "disk_full",
            f"this run writes up to {bytes_text(need)}, and {shown(there)} has {bytes_text(disk.free)} left",
            "free some space, keep fewer checkpoints, or choose another disk with --out",
        )
    return plan


# --- making ---------------------------------------------------------------------------------------------------------


def run_job(job: Job, *, as_json: bool, sample: bool) -> None:
    from toy import builds
    from toy.cli.stream import Training
    from toy.runs import claim_id, claim_out

    values = {"arch": job.config.run.arch, "recipe": job.config.run.recipe, "name": job.config.run.name}
    with os_errors("make the run's directory"):
        if job.out is not None:
            claim = claim_out(job.out)
        else:
            claim = claim_id(job.runs, job.loaded.run_id_template, values)
    try:
        try:
            variant = job.config.run.build
            targets = [job.row.target]
            infer = recipes.INFER.get(job.row.arch)
            if infer and variant == "native":
                targets.append(infer)  # the sample at the end, and the `toy infer` that comes next, start at once
            builds.ensure_built(targets, variant)
            sample = sample and infer is not None and builds.is_built([infer])
            cfg, env = fill(job, claim)
        except BaseException:
            claim.abandon()
            raise
        training = Training(job, cfg, claim, as_json=as_json)
        training.go(env)
        training.finish(sample=sample)
    finally:
        claim.close()


def fill(job: Job, claim: Claim) -> tuple[config.Config, dict[str, str]]:
    """Pack the data, resolve the configuration, write the bundle's first files; the runner's environment."""
    from toy import runners
    from toy.runs import bundle

    run = claim.path
    with progress_bar("packing the data") as progress:
        packed = job.inputs.pack(progress)
    resolved = packed.config
    config.check(resolved, job.loaded.origins)
    plan = check_room(job, resolved, packed.n_tokens)
    for note in packed.notes:
        say(f"note: {note}")
    with os_errors("write the run's files"):
        bundle.write_config(run, resolved, job.project)
        meta = bundle.meta(run, job.project, resolved.run.build, packed.datasets, resolved.run.device)
        meta |= {
            "dtype": resolved.train.dtype, "flops_per_token": plan.get("flops_per_token"),
            "resumed_from": job.resumed_from,
        }  # fmt: skip
        bundle.write_meta(run, meta)
    keys = {
        "TOY_RUN_DIR": run,
        "TAO_RUN_DIR": run,
        "TOY_RUN_ID": run.name,
        "RECIPE": resolved.run.recipe,
        "STEPS": resolved.train.steps,
        "SEED": resolved.run.seed,
        "TOY_CONFIG": run / "config.kv",
        "DATASETS": ",".join(f"{role}={sha256}" for role, sha256 in packed.identities.items()),
        **packed.env,
    }
    return resolved, runners.environment(keys, resolved.run.device)
