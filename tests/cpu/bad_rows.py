"""Bad command lines, each with the words that its error and hint must have. test_bad_input.py makes what they name."""

from __future__ import annotations

from dataclasses import dataclass

from harness import TINY

TINY_FLAGS = " ".join(str(flag) for flag in TINY)


@dataclass(frozen=True)
class Row:
    """One bad command line. `words` must be in the error line, `hint` in the hint."""

    args: str
    kind: str
    words: str
    hint: str = ""
    env: tuple[tuple[str, str], ...] = ()


def row(args: str, kind: str, words: str, hint: str = "", **env: str) -> Row:
    return Row(args, kind, words, hint, tuple(env.items()))


ROWS = {
    # words
    "recipe": row("train from-scrach", "bad_flag", "from-scrach", "from-scratch"),
    "recipe-flag": row("train --recipe lorra", "bad_flag", "lorra", "lora"),
    "two-recipes": row("train from-scratch --recipe lora", "bad_flag", "lora"),
    "arch": row("train --arch lama", "bad_flag", "lama", "llama"),
    "lora-of-a-vit": row("train lora --arch vit --model good.gguf", "not_available", "vit has others", "vit-tiny"),
    "lora-of-a-gpt2": row(
        "train lora --arch gpt2 --model gpt2.gguf", "not_available", "one for all three", "warm-start"
    ),
    "vit-tiny-of-a-llama": row("train vit-tiny --arch llama --images pictures", "not_available", "images", "--arch"),
    "from-scratch-of-a-vit": row("train --arch vit", "not_available", "images", "vit-tiny"),
    "warm-start-of-a-vit": row("train warm-start --arch vit --model vit.gguf", "not_available", "images", "vit-tiny"),
    "device": row("train --device gpu", "bad_flag", "gpu", "cpu"),
    "device-in-a-file": row("train --config device.yml", "bad_config", "cpuu", "cpu"),
    "command": row("trian", "bad_flag", "trian", "train"),
    "flag": row("train --stepz 5", "bad_flag", "--stepz", "--steps"),
    "flag-of-lora": row("train --rank 8", "bad_flag", "--rank", "lora"),
    "flag-of-warm-start": row("train --init model.gguf", "bad_flag", "--init", "warm-start"),
    "flag-of-two-recipes": row("train --model model.gguf", "bad_flag", "--model"),
    "flag-of-vit": row("train --images photos", "bad_flag", "--images", "vit-tiny"),
    "flag-of-another-recipe": row(
        "train vit-tiny --images pictures --corpus {excerpt}", "bad_flag", "--corpus", "leave"
    ),
    "knob-of-another-recipe": row("train --set lora.rank=4", "bad_config", "lora.rank", "--recipe lora"),
    "knob-of-another-architecture": row(
        "train --arch gpt2 --set model.rope_freq_base=500", "bad_config", "model.rope_freq_base", "--arch llama"
    ),
    "preset-of-another-recipe": row("train lora --model good.gguf --preset vit-mnist", "bad_flag", "vit-mnist"),
    "duration": row("train --stop-after soon", "bad_config", "soon", "1h30m"),
    "preset": row("train --preset tinny", "bad_flag", "tinny", "tiny"),
    # bases and donors
    "lora-without-a-base": row("train lora --corpus {excerpt}", "bad_flag", "needs a base", "--model"),
    "warm-start-without-a-donor": row("train warm-start", "bad_flag", "needs a donor", "--init scratch"),
    "embeddings-without-a-donor": row("train warm-start --init embeddings", "bad_flag", "needs a donor", "--model"),
    "init": row("train warm-start --init donr --model good.gguf", "bad_config", "donr", "donor"),
    "base-missing": row("train lora --model nowhere.gguf", "missing_file", "nowhere.gguf"),
    "base-truncated": row("train lora --model truncated.gguf", "bad_file", "truncated.gguf"),
    "base-not-a-gguf": row("train lora --model not.gguf", "bad_file", "not.gguf"),
    "base-unreadable": row("train lora --model secret.gguf", "bad_file", "secret.gguf"),
    "base-without-weights": row("train lora --model vocabulary.gguf", "bad_file", "no weights"),
    "base-without-a-tokenizer": row("train lora --model mute.gguf", "bad_file", "no tokenizer"),
    "base-is-a-gpt2": row("train lora --model gpt2.gguf", "not_available", "'gpt2'", "warm-start takes this one"),
    "base-is-a-vit": row("train lora --model vit.gguf", "not_available", "'vit'", "qwen2"),
    "base-is-a-mamba": row("train lora --model mamba.gguf", "not_available", "'mamba'", "llama"),
    "base-is-an-adapter": row("train lora --model adapter.gguf", "bad_file", "an adapter", "toy merge"),
    "base-is-a-lora-run": row("train lora --model lora-run", "bad_file", "an adapter", "toy merge"),
    "base-of-another-shape": row("train lora --model shape.gguf", "bad_file", "64 x 200"),
    "base-without-its-shape": row("train lora --model shapeless.gguf", "bad_file", "llama.feed_forward_length"),
    "base-with-a-shape-of-fractions": row("train lora --model fraction.gguf", "bad_file", "feed_forward_length"),
    "base-keeps-its-shape": row(
        "train lora --model good.gguf --set model.n_layer=5",
        "bad_config",
        "model.n_layer = 5",
        "leave model.n_layer out",
    ),
    "donor-is-an-adapter": row("train warm-start --model adapter.gguf", "bad_file", "an adapter"),
    "donor-is-a-vit": row("train warm-start --model vit.gguf", "not_available", "'vit'", "gpt2, llama"),
    "donor-of-another-architecture": row(
        "train warm-start --arch gpt2 --model good.gguf", "bad_config", "run.arch is gpt2", "leave --arch out"
    ),
    "donor-with-another-vocabulary": row(
        "train warm-start --model good.gguf --corpus chars.packed", "bad_file", "another vocabulary", "the text itself"
    ),
    "base-with-another-vocabulary": row(
        "train lora --model good.gguf --corpus chars.packed", "bad_file", "another vocabulary", "the text itself"
    ),
    "donor-with-less-vocabulary": row("train warm-start --model good.gguf --corpus ids.bin", "bad_config", "4999"),
    "donor-and-a-tokenizer": row(
        "train warm-start --model good.gguf --set data.tokenizer=chars", "bad_config", "data.tokenizer", "leave"
    ),
    "context-beyond-a-gpt2": row(
        "train warm-start --model gpt2.gguf --corpus {excerpt} --set model.context=65", "bad_config", "donor's, 64"
    ),
    # adapters
    "rank-none": row("train lora --model good.gguf --rank 0", "bad_config", "lora.rank = 0"),
    "rank-above-the-width": row("train lora --model good.gguf --rank 65", "bad_config", "lora.rank = 65", "4 to 64"),
    "rank-of-letters": row("train lora --model good.gguf --rank many", "bad_flag", "--rank"),
    "target": row("train lora --model good.gguf --set lora.targets=atn_q", "bad_config", "atn_q", "attn_q"),
    "targets-none": row("train lora --model good.gguf --set lora.targets=", "bad_config", "lora.targets is empty"),
    "dropout": row("train lora --model good.gguf --set lora.dropout=1", "bad_config", "lora.dropout"),
    "adapter-for-another-base": row(
        "infer other.gguf --adapter adapter.gguf --prompt a", "bad_file", "another base", "trained on"
    ),
    "adapter-for-another-architecture": row(
        "infer gpt2.gguf --adapter adapter.gguf --prompt a", "bad_file", "is a gpt2", "trained on"
    ),
    "adapter-that-is-a-model": row("infer good.gguf --adapter good.gguf --prompt a", "bad_file", "not an adapter"),
    "merge-into-another-base": row("merge other.gguf adapter.gguf out.gguf", "bad_file", "other.gguf", "--other-base"),
    # frozen tensors
    "freeze-nothing": row("train --set train.freeze=blk.77.*", "bad_config", "blk.77.*"),
    "freeze-everything": row("train --set train.freeze=*", "bad_config", "nothing to train"),
    "freeze-a-base": row(
        "train lora --model good.gguf --set train.freeze=*norm*", "bad_config", "base is frozen anyway", "*.lora_a"
    ),
    "freeze-every-second-factor": row(
        "train lora --model good.gguf --set train.freeze=*.lora_b", "bad_config", "begins at zero", "*.lora_a"
    ),
    # examples
    "examples-not-json": row("train lora --model good.gguf --corpus broken.jsonl", "bad_file", "broken.jsonl:2"),
    "examples-without-a-role": row("train lora --model good.gguf --corpus role.jsonl", "bad_file", "role.jsonl:1"),
    "examples-without-an-answer": row("train lora --model good.gguf --corpus asked.jsonl", "bad_file", "asked.jsonl:1"),
    "examples-empty-answer": row("train lora --model good.gguf --corpus silent.jsonl", "bad_file", "silent.jsonl:2"),
    "examples-nested-too-deeply": row("train --corpus deep.jsonl", "bad_file", "deep.jsonl:1: not JSON (nested too"),
    "template-missing": row("train lora --model good.gguf --corpus chat.jsonl", "bad_file", "chat template", "prompt"),
    "validation-of-another-kind": row(
        "train lora --model good.gguf --corpus pairs.jsonl --set data.val_corpus={excerpt}", "bad_file", "val_corpus"
    ),
    # images
    "images-none": row("train vit-tiny", "bad_flag", "needs images", "--images"),
    "images-missing": row("train vit-tiny --images nowhere", "missing_file", "nowhere"),
    "images-empty": row("train vit-tiny --images folder", "bad_file", "folder"),
    "images-of-mixed-sizes": row("train vit-tiny --images mixed", "bad_file", "9 x 9", "model.image_size=8"),
    "images-damaged": row("train vit-tiny --images damaged", "bad_file", "damaged"),
    "images-of-one-class": row("train vit-tiny --images single", "bad_file", "one class"),
    "images-for-a-text-model": row("infer good.gguf --image pictures/a/01.png", "bad_flag", "--image", "--prompt"),
    "text-for-a-vit": row("infer vit.gguf --prompt a", "bad_flag", "--prompt", "--image"),
    "image-damaged": row("infer vit.gguf --image damaged/b/00.png", "bad_file", "00.png"),
    "images-not-images": row("train vit-tiny --images short.txt", "bad_file", "short.txt"),
    "patches": row(
        "train vit-tiny --images pictures --set model.patch_size=5", "bad_config", "model.patch_size = 5", "= 4"
    ),
    "classes": row("train vit-tiny --images pictures --set model.n_class=7", "bad_config", "n_class = 7", "leave"),
    "crop": row("train vit-tiny --images pictures --set data.augment_crop=8", "bad_config", "data.augment_crop"),
    # validation
    "patience-without-validation": row(
        "train --set eval.patience=3 --set data.val_fraction=0", "bad_config", "eval.patience", "data.val_corpus"
    ),
    "patience-without-images": row(
        "train vit-tiny --images pictures --set eval.patience=3 --set data.val_fraction=0",
        "bad_config",
        "eval.patience",
        "data.val_images",
    ),
    "patience-without-evaluations": row(
        "train --set eval.patience=3 --set eval.every=0", "bad_config", "eval.patience"
    ),
    # corpora
    "corpus-missing": row("train --corpus nowhere.txt", "missing_file", "nowhere.txt"),
    "corpus-empty": row("train --corpus empty.txt", "bad_file", "empty.txt"),
    "corpus-unreadable": row("train --corpus secret.txt", "bad_file", "secret.txt", "read"),
    "corpus-binary": row("train --corpus binary.txt", "bad_file", "binary.txt"),
    "corpus-short": row("train --corpus short.txt", "bad_file", "short.txt"),
    "corpus-empty-folder": row("train --corpus folder", "bad_file", "folder"),
    "corpus-jsonl-without-text": row("train --corpus other.jsonl", "bad_file", "other.jsonl"),
    "corpus-torn-ids": row("train --corpus torn.bin", "bad_file", "torn.bin"),
    "corpus-negative-ids": row("train --corpus negative.bin", "bad_file", "negative.bin"),
    "validation-corpus-missing": row("train --set data.val_corpus=gone.txt", "missing_file", "gone.txt"),
    "tokenizer-missing": row("train --set data.tokenizer=mine.json", "missing_file", "mine.json"),
    "vocabulary-too-small": row("train --corpus ids.bin --set model.vocab_size=100", "bad_config", "4999"),
    "vocabulary-too-small-for-bytes": row(
        f"train {TINY_FLAGS} --set model.vocab_size=200", "bad_config", "model.vocab_size"
    ),
    # models
    "model-missing": row("infer nowhere.gguf --prompt a", "missing_file", "nowhere.gguf"),
    "model-truncated": row("infer truncated.gguf --prompt a", "bad_file", "truncated.gguf"),
    "model-of-fractions": row("infer fraction.gguf --prompt a", "bad_file", "feed_forward_length"),
    "model-cut-in-its-head": row("infer head.gguf --prompt a", "bad_file", "head.gguf"),
    "model-not-a-gguf": row("infer not.gguf --prompt a", "bad_file", "not.gguf"),
    "model-of-another-architecture": row("infer mamba.gguf --prompt a", "not_available", "mamba"),
    "model-without-weights": row("infer vocabulary.gguf --prompt a", "bad_file", "vocabulary.gguf"),
    "model-unreadable": row("infer secret.gguf --prompt a", "bad_file", "secret.gguf"),
    "model-is-an-empty-folder": row("infer folder --prompt a", "missing_file", "folder"),
    "eval-with-another-vocabulary": row(
        "eval good.gguf --corpus chars.packed", "bad_file", "another vocabulary", "the text itself"
    ),
    "data-with-another-vocabulary": row(
        "data show chars.packed --model good.gguf", "bad_file", "another vocabulary", "the text itself"
    ),
    "describe-missing": row("describe nowhere.gguf", "missing_file", "nowhere.gguf"),
    "describe-truncated": row("describe truncated.gguf", "bad_file", "truncated.gguf"),
    "describe-not-a-gguf": row("describe not.gguf", "bad_file", "not.gguf"),
    "prompt-id-beyond": row("infer good.gguf --prompt-ids 1,9999", "bad_flag", "9999"),
    "prompt-ids-of-letters": row("infer good.gguf --prompt-ids a,b", "bad_flag", "--prompt-ids"),
    "prompt-too-long": row(f"infer good.gguf --prompt {'a' * 70}", "bad_flag", "70"),
    "infer-n": row("infer good.gguf --prompt a --n 0", "bad_flag", "--n"),
    # configuration
    "set-unknown-knob": row("train --set train.stepz=5", "bad_config", "train.stepz", "train.steps"),
    "set-unknown-section": row("train --set trian.steps=5", "bad_config", "trian", "train"),
    "set-unknown-setting": row("train --set preste=tiny", "bad_config", "preste", "preset"),
    "set-not-a-pair": row("train --set steps", "bad_config", "steps"),
    "file-unknown-section": row("train --config section.yml", "bad_config", "modell", "model"),
    "file-unknown-knob": row("train --config knob.yml", "bad_config", "n_layers", "n_layer"),
    "json-unknown-knob": row("train --config knob.json", "bad_config", "n_layers", "n_layer"),
    "file-missing": row("train --config gone.yml", "missing_file", "gone.yml"),
    "file-not-yaml": row("train --config broken.yml", "bad_config", "broken.yml:"),
    "range-low": row("train --steps 0", "bad_config", "train.steps"),
    "range-high": row("train --set train.beta1=1.5", "bad_config", "train.beta1"),
    "range-negative": row("train --set train.learning_rate=-1", "bad_config", "train.learning_rate"),
    "not-finite": row("train --set train.learning_rate=nan", "bad_config", "train.learning_rate"),
    "type-of-a-flag": row("train --steps many", "bad_flag", "--steps"),
    "type-digits": row("train --steps 1 --set train.batch=1__0", "bad_config", "train.batch", "train.batch"),
    "type-too-many-digits": row(f"train --set train.batch={'9' * 5000}", "bad_config", "train.batch", "train.batch"),
    "type-whole-number": row("train --set model.n_embd=12.5", "bad_config", "model.n_embd"),
    "type-truth": row("train --set model.tie_embeddings=perhaps", "bad_config", "model.tie_embeddings"),
    "type-choice": row("train --set train.schedule=cosin", "bad_config", "train.schedule", "cosine"),
    # sizes
    "heads": row("train --set model.n_embd=65 --set model.n_head=4", "bad_config", "n_embd"),
    "key-heads": row(
        "train --set model.n_head=4 --set model.n_head_kv=3 --set model.n_embd=64", "bad_config", "n_head_kv"
    ),
    "micro-batch": row("train --set train.batch=8 --set train.micro_batch=3", "bad_config", "micro_batch"),
    "too-large": row(
        "train --set model.n_layer=1000 --set model.n_embd=65536 --set model.n_head=64", "oom", "parameters"
    ),
    # places
    "out-not-writable": row(f"train {TINY_FLAGS} --out locked/run", "bad_flag", "locked"),
    "out-holds-a-run": row(f"train {TINY_FLAGS} --out old-run", "bad_flag", "old-run"),
    "out-is-not-empty": row(f"train {TINY_FLAGS} --out full", "bad_flag", "full"),
    "out-is-a-file": row(f"train {TINY_FLAGS} --out short.txt", "bad_flag", "short.txt"),
    "out-under-a-file": row(f"train {TINY_FLAGS} --out short.txt/run", "bad_flag", "short.txt"),
    "new-not-empty": row("new full", "bad_flag", "full", "--force"),
    "resume-missing": row("train --resume llama-1", "missing_file", "llama-1"),
    "resume-from-another-recipe": row(
        "train lora --model good.gguf --resume old-run", "resume_mismatch", "from-scratch, not lora", "--recipe"
    ),
    "resume-from-another-architecture": row(
        "train --arch gpt2 --resume old-run", "resume_mismatch", "llama, not gpt2", "--arch"
    ),
    "resume-from-a-torn-checkpoint": row(
        "train --resume torn-run/checkpoints/step_50 --steps 60", "bad_file", "no whole checkpoint", "its run"
    ),
    "resume-without-a-checkpoint": row("train --resume lone-run --steps 60", "missing_file", "lone-run"),
    "resume-at-the-end": row("train --resume old-run", "bad_flag", "step 50", "--steps 100"),
    "root-not-found": row(f"train {TINY_FLAGS} --out run", "missing_file", "TOY_HOME", TOY_HOME="/nowhere"),
    "root-not-found-install": row("install", "missing_file", "TOY_HOME", TOY_HOME="/nowhere"),
    # gates and runs
    "gate-run-missing": row("gate check llama-1 gate.txt", "missing_file", "llama-1"),
    "gate-file-missing": row("gate check old-run gone.txt", "missing_file", "gone.txt"),
    "gate-not-lines": row("gate check old-run short.txt", "bad_file", "short.txt"),
}
