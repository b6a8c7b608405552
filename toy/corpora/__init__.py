"""Text, folders, JSONL and packed ids -> packed tokens for a runner, with a manifest that makes them checkable."""

from toy.corpora.making import check, default_cache_dir, prepare, token_count, vocabulary_size
from toy.corpora.packed import Prepared

__all__ = ["Prepared", "check", "default_cache_dir", "prepare", "token_count", "vocabulary_size"]
