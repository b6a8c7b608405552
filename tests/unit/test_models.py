"""Finding models where people's tools keep them, describing them, and everything `toy infer` refuses before it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vocabularies
from harness import ROOT, Result, Toy

from toy.errors import ToyError
from toy.models import cards, chat, generate, resolve
from toy.models.discover import discover
from toy.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer.from_name("bytes").to_gguf_metadata()
    return vocabularies.write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", tokenizer)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, and a project in it as the working directory: nothing of this machine is found."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGINGFACE_", "OLLAMA_", "TOY_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    project = tmp_path / "project"
    for folder in (tmp_path / "home", project / "data", project / "runs"):
        folder.mkdir(parents=True)
    (project / "toy.yml").write_text("")
    monkeypatch.chdir(project)
    return tmp_path / "home"


def place(model: Path, *parts: str | Path) -> Path:
    path = Path(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.read_bytes())
    return path


def ollama(root: Path, model: Path, name: str, digest: str = "sha256:abc") -> Path:
    manifest = root / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:1"},
        {"mediaType": "application/vnd.ollama.image.model", "digest": digest},
    ]
    manifest.write_text(json.dumps({"layers": layers}))
    return place(model, root, "blobs", digest.replace(":", "-"))


def hub(root: Path, model: Path, repo: str, file: str) -> Path:
    folder = root / f"models--{repo.replace('/', '--')}"
    blob = place(model, folder, "blobs", "0123")
    link = folder / "snapshots" / "rev1" / file
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(blob)
    return link


def toy(*args: object, **env: str) -> Result:
    return Toy(Path.cwd(), {"HOME": os.environ["HOME"], "PYTHONPATH": str(ROOT)} | env)(*args)


def refused(result: Result, kind: str, *says: str) -> None:
    """Exit 2, one `error:` line that names the thing, one `hint:` line, nothing else."""
    assert result.code == 2, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: "), result.stderr
    for word in says:
        assert word in lines[0], result.stderr
    as_json = toy(*result.argv[3:], "--json")
    assert as_json.code == 2 and as_json.document["error"]["kind"] == kind, as_json.stdout
    assert as_json.document["format"] == f"toy/{result.argv[3]}-v1"


# toy list


def test_every_place_each_file_once(home: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Path.cwd()
    run = place(model, "runs", "llama-1", "weights", "model.gguf").parents[1]
    (run / "config.json").write_text("{}")
    (project / "runs" / "latest").symlink_to("llama-1")
    place(model, "data", "seed.gguf")
    place(model, "data", "packed", "text", "tokenizer.gguf")
    place(model, run, "checkpoints", "step_1", "state.gguf")
    hub(home / ".cache/huggingface/hub", model, "some-org/some-model", "sub/q4.gguf")
    blob = ollama(home / ".ollama/models", model, "registry.ollama.ai/library/smol/135m")
    ollama(home / ".ollama/models", model, "registry.ollama.ai/me/mine/latest", "sha256:def")
    ollama(home / ".ollama/models", model, "hf.co/org/repo/Q4", "sha256:012")
    place(model, home, ".lmstudio/models/pub/repo/lm.gguf")
    mine = home / "mine"
    mine.mkdir()
    (mine / "same.gguf").symlink_to(blob)
    monkeypatch.setenv("TOY_MODEL_DIR", str(mine))
    found = {item.name: item for item in discover(project)}
    assert sorted(found) == sorted(
        [
            "data/seed.gguf",
            "runs/llama-1/weights/model.gguf",
            "same.gguf",
            "some-org/some-model/sub/q4.gguf",
            "hf.co/org/repo:Q4",
            "me/mine:latest",
            "pub/repo/lm.gguf",
        ]
    )
    assert found["same.gguf"].also == ["smol:135m"]
    assert [item.source for item in found.values()] == [
        "project", "project", "TOY_MODEL_DIR", "Hugging Face", "Ollama", "Ollama", "LM Studio",
    ]  # fmt: skip
    for item in found.values():
        assert item.error is None and item.card is not None
        assert (item.card.architecture, item.card.quantisation) == ("llama", "F32")
        assert resolve(item.name).resolve() == item.path.resolve()
    assert resolve("smol:135m") == mine / "same.gguf"
    assert resolve("me/mine") == found["me/mine:latest"].path
    assert resolve("q4") == found["some-org/some-model/sub/q4.gguf"].path


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS"])
def test_places_named_by_the_environment(
    variable: str, home: Path, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = tmp_path / "elsewhere"
    monkeypatch.setenv(variable, str(root))
    if variable == "OLLAMA_MODELS":
        ollama(root, model, "registry.ollama.ai/library/a/b")
    else:
        hub(root / "hub" if variable == "HF_HOME" else root, model, "o/r", "f.gguf")
    assert [item.name for item in discover()] == ["a:b" if variable == "OLLAMA_MODELS" else "o/r/f.gguf"]


def test_list_shows_broken_files_and_goes_on(home: Path, model: Path, tmp_path: Path) -> None:
    place(model, "data", "good.gguf")
    Path("data/cut.gguf").write_bytes(model.read_bytes()[:900])
    Path("data/half.gguf").write_bytes(model.read_bytes()[:-100])
    Path("data/not.gguf").write_text("hello")
    Path("data/empty.gguf").write_text("")
    Path("data/gone.gguf").symlink_to(tmp_path / "nowhere")
    (home / ".ollama/models/manifests/registry.ollama.ai/library/x").mkdir(parents=True)
    (home / ".ollama/models/manifests/registry.ollama.ai/library/x/y").write_text("{")
    ollama(home / ".ollama/models", model, "registry.ollama.ai/library/lost/b").unlink()
    document = toy("list", "--json").ok().document
    assert document["format"] == "toy/list-v1"
    errors = {entry["name"]: entry["error"] for entry in document["models"]}
    assert {name for name, error in errors.items() if error is None} == {"data/good.gguf"}
    assert len(errors) == 8
    assert all("\n" not in error for error in errors.values() if error)
    text = toy("list").ok()
    assert "data/good.gguf" in text.stdout and "F32" in text.stdout
    assert text.stderr.count("broken: ") == 7
    [good] = [entry for entry in document["models"] if entry["error"] is None]
    assert good["parameters"] == 257 * 32 + 32 * 3 + 7 * 32 * 32
    assert good["size"] == model.stat().st_size
    assert isinstance(good["recipes"], list)


def test_list_of_nothing(home: Path) -> None:
    assert toy("list", "--json").ok().document["models"] == []
    assert "no models found" in toy("list").ok().stderr


# toy describe, and what a MODEL can be


def test_describe(home: Path, model: Path) -> None:
    document = toy("describe", model, "--json").ok().document
    assert document["format"] == "toy/describe-v1"
    assert (document["architecture"], document["title"], document["context"]) == ("llama", "a tiny one", 512)
    assert document["types"] == {"F32": document["parameters"]}
    assert document["shape"]["block_count"] == 1
    assert document["tokenizer"]["tokens"] == 257
    assert document["tokenizer"]["special"]["eos"] == {"id": 256, "text": "<|endoftext|>"}
    assert document["tokenizer"]["chat_template"] is False
    assert {"name": "token_embd.weight", "shape": [32, 257], "type": "F32"}.items() <= document["tensors"][0].items()
    text = toy("describe", model).ok().stdout
    for part in ("llama", "257 tokens", "blk.*.attn_q.weight", "32 x 32", "chat template", "recipes"):
        assert part in text
    assert "blk.0.attn_q.weight" in toy("describe", model, "--tensors").ok().stdout


def test_runs_are_models(home: Path, model: Path) -> None:
    weights = place(model, Path.cwd(), "runs", "llama-1", "weights", "model.gguf")
    run = weights.parents[1]
    (run / "config.json").write_text("{}")
    (Path.cwd() / "runs" / "latest").symlink_to("llama-1")
    for name in ("runs/latest", "latest", "llama-1", str(run), str(weights), "runs/llama-1/", f"{weights.parent}"):
        assert resolve(name).resolve() == weights, name
    weights.unlink()
    with pytest.raises(ToyError) as caught:
        resolve("runs/latest")
    assert caught.value.kind == "missing_file" and "left no model" in caught.value.message


@pytest.mark.parametrize(
    ("name", "hint"),
    [("data/goof.gguf", "data/good.gguf"), ("god", "good"), ("runs/llama-2", "llama-1"), ("zzzzqq", "toy list")],
)
def test_the_nearest_name(name: str, hint: str, home: Path, model: Path) -> None:
    place(model, "data", "good.gguf")
    place(model, "runs", "llama-1", "weights", "model.gguf")
    Path("runs/llama-1/config.json").write_text("{}")
    with pytest.raises(ToyError) as caught:
        resolve(name)
    assert caught.value.kind == "missing_file"
    assert hint in caught.value.hint


def test_ambiguous_names_and_folders(home: Path, model: Path) -> None:
    place(model, "data", "a", "m.gguf")
    place(model, "data", "b", "m.gguf")
    place(model, "data", "b", "n.gguf")
    for name in ("m", "data/b"):
        with pytest.raises(ToyError) as caught:
            resolve(name)
        assert caught.value.kind == "bad_file"
    assert resolve("data/a") == Path("data/a/m.gguf")
    with pytest.raises(ToyError):
        resolve("data")


# toy infer: refused before anything runs


def test_infer_refuses_files(home: Path, model: Path, tmp_path: Path) -> None:
    data = model.read_bytes()
    Path("cut.gguf").write_bytes(data[:900])
    Path("half.gguf").write_bytes(data[:-100])
    Path("not.gguf").write_text("hello, this is no GGUF")
    Path("empty.gguf").write_text("")
    tokenizer = Tokenizer.from_name("bytes").to_gguf_metadata()
    vocabularies.write_model(Path("mamba.gguf"), tokenizer, architecture="mamba")
    from toy.models import gguf

    gguf.write_vocabulary("vocab.gguf", {"general.architecture": "llama"} | tokenizer)
    prompt = ("--prompt", "a")
    refused(toy("infer", "none.gguf", *prompt), "missing_file", "none.gguf")
    for name in ("cut.gguf", "half.gguf", "not.gguf", "empty.gguf"):
        refused(toy("infer", name, *prompt), "bad_file", name)
        refused(toy("describe", name), "bad_file", name)
    refused(toy("infer", "mamba.gguf", *prompt), "not_available", "mamba")
    refused(toy("infer", "vocab.gguf", *prompt), "bad_file", "no weights")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt", "a", "--prompt-ids", "1"], "--prompt and --prompt-ids"),
        (["--prompt-ids", "1,two"], "'two'"),
        (["--prompt-ids", ","], "empty"),
        (["--prompt-ids", "1,257"], "257"),
        (["--prompt-ids", "-1"], "-1"),
        (["--prompt", "x" * 600], "600 tokens"),
        (["--prompt", "hello", "--context", "4"], "5 tokens"),
        (["--chat", "--prompt", "hello"], "no chat template"),
        (["--chat"], "message"),
        (["--chat", "--prompt-ids", "1"], "--chat"),
        (["--device", "tpu"], "tpu"),
        (["--prompt", "a", "--n", "0"], "--n"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature"),
        (["--prompt", "a", "--top-p", "0"], "--top-p"),
        (["--prompt", "a", "--temprature", "1"], "--temprature"),
    ],
)
def test_infer_refuses_flags(flags: list[str], says: str, home: Path, model: Path) -> None:
    refused(toy("infer", model, *flags), "bad_flag", says)
    assert not list(Path.cwd().glob("build*"))


def test_infer_refuses_a_device_that_is_not_there(home: Path, model: Path) -> None:
    refused(toy("infer", model, "--prompt", "a", "--device", "metal"), "not_available", "metal")


def test_logprobs_need_json(home: Path, model: Path) -> None:
    result = toy("infer", model, "--prompt", "a", "--logprobs", 3)
    assert result.code == 2 and "--logprobs" in result.stderr and "--json" in result.stderr


def test_a_prompt_that_is_not_utf8(home: Path, model: Path) -> None:
    argv = [*Toy.argv("infer", model, "--prompt")]
    env = {"HOME": str(home), "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    done = subprocess.run([*map(os.fsencode, argv), b"a\xff"], capture_output=True, check=False, env=env)
    assert done.returncode == 2 and b"not UTF-8" in done.stderr
    piped = subprocess.run(argv[:-1], input=b"a\xff", capture_output=True, check=False, env=env)
    assert piped.returncode == 2 and b"standard input is not UTF-8 text (byte 1)" in piped.stderr


# What goes to the runner


def test_prompt_ids() -> None:
    tokenizer = Tokenizer.from_name("bytes")
    assert generate.prompt_ids(tokenizer, "hi<|endoftext|>") == [104, 105, 256]
    assert generate.prompt_ids(tokenizer, "") == [256]  # a new document
    few = Tokenizer.from_name("chars", lambda: ["ab"])
    with pytest.raises(ToyError):
        generate.prompt_ids(few, "xyz")


def test_chat_templates() -> None:
    def template(text: str, **special: Any) -> Tokenizer:
        from dataclasses import replace

        return Tokenizer(replace(Tokenizer.from_name("bytes").vocabulary, chat_template=text, **special))

    messages = [{"role": "user", "content": "Hi\n{{ 1 }}"}]
    text = (
        "{%- for m in messages %}\n<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{%- endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    assert chat.render(template(text), messages, "m") == "<user>Hi\n{{ 1 }}<|endoftext|>:"
    assert chat.render(template("{{ bos_token }}x", add_bos=True), messages, "m") == "x"
    assert chat.render(template("{{ messages | tojson }}"), messages, "m").startswith('[{"role"')
    assert (
        chat.render(template("{% generation %}a{% endgeneration %}{{ strftime_now('%Y')|length }}"), messages, "m")
        == "a4"
    )
    for bad in (
        "{{ raise_exception('no system role') }}",
        "{% for",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
    ):
        with pytest.raises(ToyError) as caught:
            chat.render(template(bad), messages, "m.gguf")
        assert caught.value.kind == "bad_file" and "m.gguf" in caught.value.message


def test_timings() -> None:
    lines = ["chatter", "timing load_s=0.5 prefill_tokens=7 prefill_s=0.25 decode_tokens=10 decode_s=2.5"]
    found = generate._timings(lines)
    assert found["prefill_tokens"] == 7 and found["load_s"] == 0.5 and found["tokens_per_second"] == 4.0
    assert generate._timings([]) == {}


def test_cards(model: Path) -> None:
    card = cards.read(model)
    assert card.summary() == {
        "architecture": "llama",
        "title": "a tiny one",
        "parameters": sum(card.types.values()),
        "quantisation": "F32",
        "size": model.stat().st_size,
        "context": 512,
    }


def test_help_does_not_import_what_is_slow() -> None:
    names = {"tokenizers", "jinja2", "toy._native", "numpy", "toy.models"}
    code = "import sys, toy.cli.infer, toy.cli.list, toy.cli.describe; print([m for m in sys.modules if m in names])"
    code = f"names = {names!r}; {code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
