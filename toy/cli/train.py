"""`toy train`: validate everything, claim the run's directory, build, pack, launch, stream, sum up."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toy import config, recipes
from toy.cli.common import bytes_text, json_option, say
from toy.config import KNOBS, Given, Loaded
from toy.errors import ToyError, os_errors, shown

if TYPE_CHECKING:
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
    "--resume": "checkpoint.resume",
    "--name": "run.name",
}


def knob_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for flag, key in reversed(KNOB_FLAGS.items()):
        knob = KNOBS[key]
        metavar = "PATH" if knob.path else None
        option = click.option(flag, type=str if knob.type is str else knob.type, metavar=metavar, help=knob.doc)
        function = option(function)
    return function


@click.command()
@click.argument("recipe_word", metavar="[RECIPE]", required=False)
@knob_options
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file, or a run's config.json.")
@click.option("--preset", help="Shipped values to start from: " + ", ".join(config.preset_names()) + ".")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any knob: --set train.batch=8.")
@click.option("--model", metavar="GGUF", help="Base model (warm-start, lora).")
@click.option("--init", metavar="GGUF", help="Initial weights (warm-start).")
@click.option("--rank", type=int, help="Rank of the adapter (lora).")
@click.option("--images", metavar="PATH", help="Folder of images (vit-tiny).")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the run, instead of runs/<run_id>.")
@click.option("--dry-run", is_flag=True, help="Say what it would need and write; write nothing.")
@click.option("--no-sample", is_flag=True, help="No sample of text at the end.")
@json_option
def command(
    recipe_word: str | None,
    config_file: Path | None,
    preset: str | None,
    sets: tuple[str, ...],
    out: Path | None,
    dry_run: bool,
    no_sample: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train a model; leaves a run bundle and a GGUF.

    \b
    toy train
    toy train from-scratch --preset tiny
    toy train --corpus book.txt --set data.tokenizer=chars --steps 500

    `toy config show --doc` lists every knob. Ctrl-C saves a checkpoint and stops.
    """
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
    cache: Path  # of packed tokens
    needs: dict[str, Any] = field(default_factory=dict)  # memory and disk, as far as known before packing

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
    """Everything that can be refused, refused: words, flags, configuration, paths, corpus, memory, disk."""
    from toy import corpora
    from toy.runs import check_out, check_template, check_writable, find_checkpoint, find_project

    if recipe_word is not None:
        if flags["recipe"] not in (None, recipe_word):
            message = f"two recipes: {recipe_word} and --recipe {flags['recipe']}"
            raise ToyError("bad_flag", message, "name one")
        flags["recipe"] = recipe_word
    project = find_project()
    given = {
        key: Given(flags[flag.strip("-")], flag, quoted=True, base=Path.cwd())
        for flag, key in KNOB_FLAGS.items()
        if flags[flag.strip("-")] is not None
    }
    if flags["resume"] is not None:
        checkpoint = find_checkpoint(flags["resume"], project)
        given["checkpoint.resume"] = Given(str(checkpoint), "--resume", quoted=True)
        if config_file is None and (checkpoint.parent.parent / "config.json").is_file():
            config_file = checkpoint.parent.parent / "config.json"  # what is resumed keeps its own configuration
    loaded = config.load(project=project, config_file=config_file, preset=preset, sets=sets, flags=given)
    cfg = loaded.config
    words = (cfg.run.recipe, cfg.run.arch, cfg.run.device)
    recipes.check_words(*words, loaded.origins, [key for key in given if key.startswith("run.")])
    row = recipes.select(*words)
    recipes.check_knobs(row, cfg.train.dtype, loaded.origins["train.dtype"])
    recipes.check_flags(cfg.run.recipe, [f"--{name}" for name, value in flags.items() if value is not None])
    check_template(loaded.run_id_template, loaded.template_origin)
    check_resume(cfg, loaded, project)
    if out is not None:
        out = Path(os.path.abspath(out.expanduser()))
        check_out(out)
    job = Job(loaded, row, project, out, corpora.default_cache_dir(project))
    if out is None:
        check_writable(job.runs)
    corpora.check(cfg.data.corpus, cfg.data.tokenizer, cfg.model.vocab_size, cfg.model.context)
    if cfg.data.val_corpus:
        corpora.check(cfg.data.val_corpus, cfg.data.tokenizer, 0, cfg.model.context)
    check_room(job)
    return job


def check_resume(cfg: config.Config, loaded: Loaded, project: Path | None) -> None:
    """Make checkpoint.resume the path of a whole checkpoint that this run can go on from."""
    from toy.runs import find_checkpoint

    if not cfg.checkpoint.resume:
        return
    path = find_checkpoint(cfg.checkpoint.resume, project)
    step = path.name.removeprefix("step_")
    if step.isdigit() and int(step) >= cfg.train.steps:
        raise ToyError(
            "bad_flag",
            f"{shown(path)} is at step {step} already, and train.steps = {cfg.train.steps}"
            f" ({loaded.origins['train.steps']})",
            f"train further with --steps {2 * int(step)}, say",
        )
    cfg.checkpoint.resume = str(path)


def native_plan(cfg: config.Config, corpus_tokens: int = 0) -> dict[str, Any]:
    """The exact memory of a resolved configuration, from the allocated graph. Raises ToyError (oom, bad_config)."""
    try:
        from toy import _native
    except ImportError as error:
        raise ToyError(
            "build_failed", "toy's native module is not built", "install toy: pip install . (or make setup)"
        ) from error
    try:
        plan: dict[str, Any] = _native.plan(config.to_kv(cfg), corpus_tokens)
    except (ValueError, RuntimeError, MemoryError) as error:
        message, _, hint = str(error).partition("\n")
        kind = "bad_config" if isinstance(error, ValueError) else "oom"
        hint = hint or "make the model, the batch or the context smaller"
        raise ToyError(kind, message or "this machine's memory is not enough", hint) from error
    return plan


def disk_bytes(plan: dict[str, Any], cfg: config.Config) -> int:
    """The most that the run's directory can come to: checkpoints (weights and moments), one more being written, the
    GGUF, and a line an event."""
    checkpoint: int = plan["weights"] + plan["moments"]
    kept = cfg.checkpoint.keep + int(cfg.checkpoint.keep_best) + 1
    lines = 300 * (cfg.train.steps // cfg.log.every) + 30 * cfg.train.steps
    return int(kept * checkpoint + plan["weights"] + lines + (4 << 20))


def guessed_vocab(cfg: config.Config) -> int:
    """A vocabulary size before packing: exact for bytes and bpe, near enough for a check of memory otherwise."""
    return cfg.model.vocab_size or {"bytes": 257, "chars": 256, "bpe": 2048}.get(cfg.data.tokenizer, 32000)


def check_room(job: Job) -> None:
    """Refuse what cannot fit into this machine's memory or onto the disk, as far as is known before packing."""
    from toy.runs.bundle import memory_bytes

    cfg = config.resolve(job.config, vocab_size=guessed_vocab(job.config))
    plan = native_plan(cfg)
    job.needs = plan
    memory = memory_bytes()
    if plan["total"] > memory:
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


# --- making ---------------------------------------------------------------------------------------------------------


def run_job(job: Job, *, as_json: bool, sample: bool) -> None:
    from toy import runners
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
            runners.ensure_built(targets, variant)
            sample = sample and infer is not None and runners.is_built([infer])
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
    """Pack the corpus, resolve the configuration, write the bundle's first files; the runner's environment."""
    from toy import corpora, runners
    from toy.runs import bundle

    cfg, run = job.config, claim.path
    with Packing() as packing:
        prepared = corpora.prepare(
            cfg.data.corpus, cfg.data.tokenizer, cfg.model.vocab_size, job.cache, packing.progress
        )
        validation = None
        if cfg.data.val_corpus:
            validation = corpora.prepare(
                cfg.data.val_corpus, cfg.data.tokenizer, 0, job.cache, packing.progress, like=prepared
            )
            validation.require(cfg.model.context)
    prepared.require(cfg.model.context, 0.0 if validation else cfg.data.val_fraction)
    val_tokens = validation.n_tokens if validation else int(cfg.data.val_fraction * prepared.n_tokens)
    resolved = config.resolve(cfg, vocab_size=prepared.vocab_size, val_tokens=val_tokens)
    config.check(resolved, job.loaded.origins)
    datasets = {"train": dataset(prepared)}
    if validation:
        datasets["validation"] = dataset(validation)
    with os_errors("write the run's files"):
        bundle.write_config(run, resolved, job.project)
        meta = bundle.meta(run, job.project, resolved.run.build, datasets)
        meta["flops_per_token"] = job.needs.get("flops_per_token")
        bundle.write_meta(run, meta)
    keys = {
        "TOY_RUN_DIR": run,
        "TAO_RUN_DIR": run,
        "TOY_RUN_ID": run.name,
        "RECIPE": resolved.run.recipe,
        "STEPS": resolved.train.steps,
        "SEED": resolved.run.seed,
        "TOY_CONFIG": run / "config.kv",
        "CORPUS": prepared.tokens,
        "TOKENIZER": prepared.tokenizer_gguf,
        **({"VAL_CORPUS": validation.tokens} if validation else {}),
    }
    return resolved, runners.environment(keys, resolved.run.device)


def dataset(prepared: Any) -> dict[str, Any]:
    manifest = prepared.manifest
    return {
        "name": manifest.get("name"),
        "tokens": str(prepared.tokens),
        "sha256": prepared.sha256,
        "n_tokens": prepared.n_tokens,
        "vocab_size": prepared.vocab_size,
        "source": manifest.get("source"),
        "tokenizer": manifest.get("tokenizer"),
    }


class Packing:
    """Progress of packing on stderr: a bar on a terminal, one line in a pipe, nothing at all when it is quick."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.said = False
        self.quiet_until = time.monotonic() + 0.4

    def __enter__(self) -> Packing:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def progress(self, done: int, total: int) -> None:
        if time.monotonic() < self.quiet_until or (done >= total and self.bar is None):
            return
        if not sys.stderr.isatty():
            if not self.said:
                self.said = True
                say(f"packing the corpus ({bytes_text(total)})")
            return
        if self.bar is None:
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

            from toy.cli.common import console

            columns = (TextColumn("packing the corpus"), BarColumn(), DownloadColumn())
            self.bar = Progress(*columns, console=console(), transient=True)
            self.bar.start()
            self.bar.add_task("", total=total)
        self.bar.update(self.bar.task_ids[0], completed=done, total=total)
