"""A training as it runs: its step lines stored and shown, its events followed, its end summed up."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from toy import config, corpora, recipes
from toy.cli import profile
from toy.cli.common import bytes_text, count_text, duration_text, emit, quote, say
from toy.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, ToyError, one_line, shown
from toy.runs import Claim, curve, events, history, point_latest

if TYPE_CHECKING:
    from toy.cli.train import Job

FORMAT = "toy/train-v1"
SAMPLE_TOKENS = 120
STEP_LINE = re.compile(r"step ([0-9]+): loss=(\S+)")


class Training:
    """Launches the runner and takes what it says: step lines on stdout, events in its file."""

    def __init__(self, job: Job, cfg: config.Config, claim: Claim, *, as_json: bool) -> None:
        self.job, self.cfg, self.claim, self.as_json = job, cfg, claim, as_json
        self.run: Path = claim.path
        self.losses: list[str] = []
        self.step = (job.resumed_from or {}).get("step") or 0
        self.file: TextIO | None = None
        self.follower = events.Follower(self.run)
        self.curve = curve.Curve(self.run)
        self.start: dict[str, Any] = {}
        self.end: dict[str, Any] | None = None
        self.profile: dict[str, Any] | None = None
        self.best: tuple[int, float] | None = None
        self.accuracy: float | None = None  # vit: of the last validation
        self.error: ToyError | None = None
        self.view: View = Silent() if as_json else (Live(cfg) if on_terminal() else Lines())
        self.begun = time.monotonic()

    def go(self, env: dict[str, str]) -> None:
        """Run the runner to its end."""
        from toy import runners

        failure: BaseException | None = None
        result = None
        with self.view, (self.run / "losses.txt").open("w", encoding="utf-8") as self.file:
            try:
                result = runners.launch(
                    self.job.row.target,
                    env,
                    variant=self.cfg.run.build,
                    on_stdout=self.on_line,
                    on_stderr=lambda line: self.view.note(line) if line.startswith("note: ") else None,
                    on_tick=self.on_tick,
                    on_stop=lambda: self.view.note("stopping: saving a checkpoint (Ctrl-C again to give up)"),
                    cwd=self.run,
                    pass_fds=(self.claim.fd,),
                )
            except Exception as error:
                failure = error
            self.on_tick()
        self.close(result, failure)

    def on_line(self, line: str) -> None:
        match = STEP_LINE.fullmatch(line)
        if match is None:
            raise ToyError(
                "runner_failed", f"the runner printed {line[:80]!r} where step lines go", "report this as a bug"
            )
        assert self.file is not None
        self.file.write(line + "\n")
        self.file.flush()
        self.step = int(match[1])
        self.losses.append(match[2])
        if len(self.losses) == 1 and self.job.out is None:
            point_latest(self.run)
        self.view.step(line)

    def on_tick(self) -> None:
        for event in self.follower.new():
            kind = event["kind"]
            if kind == "run_start":
                self.start = event
            elif kind == "run_end":
                self.end = event
            elif kind == "profile":
                self.profile = history.profile(self.run)
            elif kind == "eval" and isinstance(event.get("val_loss"), (int, float)):
                self.best = min(
                    self.best or (0, math.inf), (event["step"], event["val_loss"]), key=lambda best: best[1]
                )
                self.accuracy = event.get("accuracy")
            self.view.event(event)
            self.curve.take(event)

    def close(self, result: Any, failure: BaseException | None) -> None:
        """Know how it ended; write what the runner could not."""
        error: ToyError | None = None
        if isinstance(failure, ToyError):
            error = failure
        elif isinstance(failure, BrokenPipeError):
            error = ToyError("interrupted", "the reader of this run's output went away", self.resume_hint())
        elif isinstance(failure, OSError):
            from toy.errors import os_error

            error = os_error(failure, "write the run's files")
        elif failure is not None:
            raise failure
        elif result is not None:
            error = self.runner_error(result)
        if self.end is None:
            self.end = self.write_end(error, "killed" if result is not None and result.signal else "failed")
        self.error = error
        refused = error is not None and error.exit_code in (EXIT_BAD_INPUT, EXIT_INTERRUPTED)
        if refused and not self.losses and self.checkpoint() is None:
            self.claim.abandon()  # refused or stopped before its first step: nothing is worth keeping
        elif self.curve.train or self.curve.validation:
            try:
                self.curve.draw(now=True)
            except OSError as problem:
                say(f"warning: no loss.svg: {one_line(problem)}")

    def runner_error(self, result: Any) -> ToyError | None:
        error: ToyError | None = result.error()
        if error is None:
            return None
        if error.kind == "interrupted":
            at = f"stopped at step {self.step} of {self.cfg.train.steps}"
            if (self.end or {}).get("reason") == "stop_after":
                at += f", after the {duration_text(self.cfg.run.stop_after)} of run.stop_after"
            checkpoint = self.checkpoint()
            where = f"; checkpoint: {shown(checkpoint)}" if checkpoint else "; no checkpoint was saved"
            return ToyError("interrupted", at + where, self.resume_hint())
        if not (self.end or {}).get("error") and (tail := result.tail()):
            for line in tail:
                say(f"  {line}")
        return error

    def resume_hint(self) -> str:
        if self.checkpoint() is None:
            return "train again"
        return f"go on with: toy train --resume {quote(shown(self.run))}"

    def checkpoint(self) -> Path | None:
        latest = self.run / "checkpoints" / "latest"
        return latest.resolve() if (latest / "DONE").exists() else None

    def write_end(self, error: ToyError | None, reason: str) -> dict[str, Any]:
        """The run_end that the runner did not live to write."""
        speed = self.view.speed
        end: dict[str, Any] = {
            "kind": "run_end",
            "reason": "interrupted" if error and error.kind == "interrupted" else reason,
            "step": self.step,
            "final_loss": float(self.losses[-1]) if self.losses else None,
            "val_loss": None,
            "best_val_loss": self.best[1] if self.best else None,
            "best_step": self.best[0] if self.best else None,
            "tokens_per_second": speed,
            "seconds": round(time.monotonic() - self.begun, 3),
            "peak_rss_bytes": None,
            "accuracy": self.accuracy,
            "gguf": None,
            "checkpoint": str(self.checkpoint()) if self.checkpoint() else None,
            "error": error.as_json() if error else None,
            "quality_gate": None,
        }
        try:
            events.append(self.run, end)
        except OSError as problem:
            say(f"warning: events.jsonl: {one_line(problem)}")
        return end

    # --- the end ----------------------------------------------------------------------------------------------------

    def gguf(self) -> Path:
        """What the run leaves: its model, or its adapter."""
        return self.run / "weights" / recipes.gguf_name(self.cfg.run.recipe)

    def document(self) -> dict[str, Any]:
        """`toy/train-v1`."""
        end, cfg = self.end or {}, self.cfg
        gguf, checkpoint = self.gguf(), self.checkpoint()
        return {
            "run_id": self.run.name,
            "run_dir": str(self.run),
            "recipe": cfg.run.recipe,
            "arch": cfg.run.arch,
            "device": cfg.run.device,
            "build": cfg.run.build,
            "steps": cfg.train.steps,
            "seed": cfg.run.seed,
            "step": self.step,
            "reason": end.get("reason"),
            "losses": self.losses,
            "final_loss": end.get("final_loss"),
            "val_loss": end.get("val_loss"),
            "best_val_loss": end.get("best_val_loss"),
            "best_step": end.get("best_step"),
            "accuracy": end.get("accuracy", self.accuracy),
            "tokens_per_second": end.get("tokens_per_second"),
            "sequences_per_second": end.get("sequences_per_second", self.view.sequences),
            "tokens_per_step": self.start.get("tokens_per_step"),
            "parameters": self.start.get("parameters"),
            "total_parameters": self.start.get("total_parameters", self.start.get("parameters")),
            "resumed_from": self.job.resumed_from,
            "peak_rss_bytes": end.get("peak_rss_bytes"),
            "memory": self.start.get("memory"),
            "checkpoint": str(checkpoint) if checkpoint else None,
            "gguf": str(gguf) if gguf.is_file() else None,
            "base": self.cfg.lora.base or None,
            "seconds": end.get("seconds"),
            "profile": self.profile,
            "sample": None,
            "error": None,
        }

    def finish(self, *, sample: bool) -> None:
        """Say how it went: the summary and a sample, or the error."""
        document = self.document()
        if self.error is not None:
            if not self.as_json:
                raise self.error
            emit(FORMAT, document | {"error": self.error.as_json()})
            raise SystemExit(self.error.exit_code)
        prompt, text = self.sample(self.gguf()) if sample and document["gguf"] else ("", None)
        if self.as_json:
            emit(FORMAT, document | {"sample": text})
            return
        self.summary(document, prompt, text)

    def sample(self, gguf: Path) -> tuple[str, str | None]:
        """A prompt and some text of the new model. A model that cannot be sampled is still a model: it only warns."""
        from toy.models.generate import sample_text

        if self.cfg.run.arch == "vit":
            return "", None
        model, more = gguf, dict[str, Any]()
        if self.cfg.run.recipe == "lora":
            model, more = Path(self.cfg.lora.base), {"adapter": gguf}
        prompts = ["The", "\n", "a"]  # no space at the end: bpe puts it before the next word
        if self.question:
            prompts, more["chat"], more["temperature"] = [self.question[0]], self.question[1], 0.0
        problem: Exception | None = None
        for prompt in prompts:
            try:
                return prompt, sample_text(model, prompt, SAMPLE_TOKENS, self.cfg.run.seed, **more)
            except Exception as error:
                problem = problem or error
        say(f"warning: no sample: {one_line(problem)}")
        return "", None

    @cached_property
    def question(self) -> tuple[str, bool] | None:
        """What the first example asks, and whether as a chat: an adapter is shown by its answer."""
        if self.cfg.run.recipe != "lora":
            return None
        try:
            if corpora.kind_of(self.cfg.data.corpus, texts_are_examples=True) != "examples":
                return None
            return corpora.first_question(self.cfg.data.corpus)
        except (ToyError, OSError):
            return None  # the file may be gone by now

    def summary(self, document: dict[str, Any], prompt: str, text: str | None) -> None:
        """For people: on stderr where stdout is a pipe, which gets step lines and nothing else."""
        lines = []
        if document["val_loss"] is not None:
            best = ""
            if document["best_step"] not in (None, document["step"]):
                best = f" (best {document['best_val_loss']:.4f} at step {document['best_step']})"
            right = f", {100 * document['accuracy']:.2f} % right" if document["accuracy"] is not None else ""
            lines.append(f"validation loss {document['val_loss']:.4f}{best}{right}")
        speed, unit = speed_of(self.cfg, document["tokens_per_second"], document["sequences_per_second"])
        numbers = [
            f"{document['step']} steps in {duration_text(document['seconds'] or 0)}",
            f"{speed:,.0f} {unit}" if speed else "",
            parameters_text(document["parameters"], document["total_parameters"]),
            f"{bytes_text(document['peak_rss_bytes'])} of memory" if document["peak_rss_bytes"] else "",
        ]
        lines.append(", ".join(number for number in numbers if number))
        if document["reason"] == "early_stop":
            lines.append(f"stopped early: no better validation loss in {self.cfg.eval.patience} validations")
        if text is not None:
            before = prompt.rstrip("\n") + "\n" if self.question else prompt
            shown_text = text if text.startswith(prompt) else before + text
            lines += ["", *("    " + line for line in shown_text.strip("\n").splitlines()[:20]), ""]
        if document["gguf"]:
            what = "adapter" if document["base"] else "model"
            lines.append(f"{what}: {shown(document['gguf'])}")
            lines.append(f"run it: {self.infer_command(prompt)}")
        out = sys.stdout if sys.stdout.isatty() else sys.stderr
        click.echo("\n".join(lines), file=out)
        if self.profile:
            click.echo("\n".join(["", *profile.table(self.profile)]), err=True)

    def infer_command(self, prompt: str) -> str:
        """A lora run brings its base, so that every run is named alike."""
        words = "--image FILE" if self.cfg.run.arch == "vit" else f"--prompt {quote(prompt or 'The')}"
        if self.question and self.question[1]:
            words = f"--chat {words}"
        return f"toy infer {quote(shown(self.run))} {words}"


def speed_of(cfg: config.Config, tokens: float | None, sequences: float | None) -> tuple[float | None, str]:
    """Speed in what this recipe's data is counted in."""
    return (sequences, "images/s") if cfg.run.arch == "vit" else (tokens, "tokens/s")


def parameters_text(trainable: int | None, total: int | None) -> str:
    """`5.41 M parameters`; of an adapter, `0.92 M of 135.44 M parameters`."""
    if not trainable:
        return ""
    some = f"{count_text(trainable)} of " if total and total != trainable else ""
    return f"{some}{count_text(total or trainable)} parameters"


# --- what is shown meanwhile ----------------------------------------------------------------------------------------


def on_terminal() -> bool:
    return sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class View:
    """What a person or a pipe sees while it runs."""

    speed: float | None = None  # tokens a second
    sequences: float | None = None  # sequences (or images) a second

    def __enter__(self) -> View:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def step(self, line: str) -> None:
        pass

    def event(self, event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            self.speed = event.get("tokens_per_second") or self.speed
            self.sequences = event.get("sequences_per_second") or self.sequences

    def note(self, text: str) -> None:
        say(text)


class Silent(View):
    """Under --json."""


class Lines(View):
    """In a pipe: the step lines as the runner printed them."""

    def step(self, line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def fitting(numbers: dict[str, str], room: int) -> str:
    """The loss, and of the other numbers those that fit beside it into `room` columns, the more wanted first."""
    chosen = ["loss"]
    for name in ("left", "val", "speed", "lr"):
        if numbers[name] and len(" ".join(numbers[each] for each in (*chosen, name))) <= room:
            chosen.append(name)
    return " ".join(text for name, text in numbers.items() if name in chosen)


class Live(View):
    """On a terminal: one moving line, and one that stays for every validation."""

    def __init__(self, cfg: config.Config) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        from toy.cli.common import console

        self.console = console()
        self.cfg = cfg
        self.total = cfg.train.steps
        self.val_loss = ""
        self.rate: float | None = None  # steps a second, smoothed
        self.last: tuple[float, int] | None = None
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            transient=True,
            expand=True,
        )
        self.task = self.progress.add_task(f"step 0/{self.total}", total=self.total, numbers="starting")

    def __enter__(self) -> View:
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()

    def event(self, event: dict[str, Any]) -> None:
        super().event(event)
        if event["kind"] == "run_start":
            memory = (event.get("memory") or {}).get("total") or 0
            items = f"{event.get('tokens_per_step') or 0:,} tokens"
            if self.cfg.run.arch == "vit":
                items = f"{self.cfg.train.batch:,} images"
            self.progress.console.print(
                f"{parameters_text(event.get('parameters'), event.get('total_parameters'))}, "
                f"{items} a step, {event.get('threads')} threads, {bytes_text(memory)} of memory"
            )
        elif event["kind"] == "eval" and isinstance(event.get("val_loss"), (int, float)):
            self.val_loss = f"val {event['val_loss']:.4f}"
            star = " (best so far)" if event.get("best") else ""
            accuracy = event.get("accuracy")
            right = f", {100 * accuracy:.2f} % right" if isinstance(accuracy, (int, float)) else ""
            self.progress.console.print(f"step {event['step']}: validation loss {event['val_loss']:.4f}{right}{star}")
        elif event["kind"] == "step":
            self.show(event)

    def show(self, event: dict[str, Any]) -> None:
        step, now = int(event["step"]), float(event["time"])
        if self.last is not None and now > self.last[0]:
            rate = (step - self.last[1]) / (now - self.last[0])
            self.rate = rate if self.rate is None else 0.95 * self.rate + 0.05 * rate
        self.last = (now, step)
        loss = event.get("loss")
        speed, unit = speed_of(self.cfg, self.speed, self.sequences)
        unit = unit.replace("tokens", "tok")
        left = f"{duration_text(max(1, round((self.total - step) / self.rate)))} left" if self.rate else ""
        numbers = {
            "loss": f"loss {loss:.4f}" if isinstance(loss, (int, float)) else "loss ?",
            "val": self.val_loss,
            "lr": f"lr {event.get('learning_rate') or 0:.2e}",
            "speed": f"{speed or 0:,.0f} {unit}",
            "left": left,
        }
        description = f"step {step}/{self.total}"
        text = fitting(numbers, self.console.width - len(description) - 2)
        self.progress.update(self.task, completed=step, description=description, numbers=text)

    def note(self, text: str) -> None:
        self.progress.console.print(text)
