"""How byte-level BPE tokenizers cut text into words before merging, by the name in `tokenizer.ggml.pre`.

A GGUF holds only the name; the expressions behind each name are a convention between whoever wrote the tokenizer and
whoever reads the file. Each entry is a list: the expressions are applied one after the other, each one cutting the
pieces that the one before left, and what does not match stays a piece of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(ending: str, digits: str) -> str:
    """The o200k shape: a word is capitals then small letters; letters without case count as both."""
    small = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    big = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = f"{lead}{big}*{small}+{ending}|{lead}{big}+{small}*{ending}"
    return words + rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


# Qwen2's, with combining marks counted as letters.
_QWEN35_WORDS = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_MAIN = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Letters with case, which is what DeepSeek-LLM's long list of ranges spells out.
_CASED_LETTERS = r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"
_CJK_SPAN = "[一-龥\u0800-一가-\ud7ff]+"


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting: the expressions, and whether a whole word found in the vocabulary skips the merges."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = PreTokenizer((GPT2,))
_DIGITS = PreTokenizer((r"\p{N}", GPT2))
_LLAMA3 = PreTokenizer((rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}",))
_QWEN2 = PreTokenizer((rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_TAIL}",))
_DEEPSEEK3 = PreTokenizer((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK_MAIN))
_BLOOM = PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+",))

_FAMILIES: list[tuple[PreTokenizer, str]] = [
    (_GPT2, "gpt-2 phi-2 mpt olmo jais gigachat mellum modern-bert exaone4 trillion granite-docling roberta-bpe"),
    (_GPT2, "jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code a.x-4.0"),
    (_DIGITS, "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")), "default"),
    (PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]")), "falcon"),
    (PreTokenizer(_LLAMA3.patterns, ignore_merges=True, add_bos=True), "llama-bpe llama3 llama-v3 falcon3 falcon-h1"),
    (PreTokenizer(_LLAMA3.patterns, ignore_merges=True, add_bos=True), "pixtral midm-2.0 lfm2"),
    (_LLAMA3, "dbrx smaug-bpe glm4 chatglm-bpe"),
    (_QWEN2, "qwen2 stablelm2 deepseek-r1-qwen kormo f2llmv2 megrez hunyuan solar-open grok-2"),
    (PreTokenizer((_QWEN35_WORDS,)), "qwen35"),
    (
        PreTokenizer((r"[\r\n]", _CASED_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", _CJK_SPAN, r"\p{N}+")),
        "deepseek-llm",
    ),
    (PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_SPAN, r"\p{N}")), "deepseek-coder"),
    (_DEEPSEEK3, "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    (_BLOOM, "bloom poro-chat gpt3-finnish"),
    (PreTokenizer((*_BLOOM.patterns, r"\p{N}")), "viking"),
    (PreTokenizer((_cased("", r"\p{N}"),), ignore_merges=True, add_bos=True), "tekken"),
    (PreTokenizer((_cased(f"{_CONTRACTION}?", r"\p{N}{1,3}"),)), "gpt-4o llama4 kanana2 minimax-m2"),
]

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: pre for pre, names in _FAMILIES for name in names.split()}

#: Spellings that `tokenizer.json` files use for the same cuts (flags in place of both cases, no final `\s+`).
_ALIASES: dict[tuple[str, ...], str] = {
    (rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}",): "llama-bpe",
    (rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORD}|\p{{N}}|{_TAIL}",): "qwen2",
    (_cased("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}"),): "gpt-4o",
    (GPT2.removesuffix(r"|\s+"),): "gpt-2",
}


def name_of(patterns: tuple[str, ...]) -> str | None:
    """The `tokenizer.ggml.pre` name for these expressions, or None when there is none."""
    if patterns in _ALIASES:
        return _ALIASES[patterns]
    return next((name for name, pre in PRE_TOKENIZERS.items() if pre.patterns == patterns), None)
