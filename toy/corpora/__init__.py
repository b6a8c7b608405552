"""Text, folders, JSONL, images and packed ids -> what a runner reads, with a manifest that makes it checkable."""

from typing import TYPE_CHECKING, Any

from toy.corpora.examples import check_examples, first_question, kind_of, prepare_examples
from toy.corpora.making import check, default_cache_dir, default_sequences, prepare, token_count, vocabulary_size
from toy.corpora.packed import Prepared
from toy.corpora.packings import check_vocabulary

if TYPE_CHECKING:
    from toy.corpora.images import PreparedImages, check_images, is_images, pack_one, prepare_images

__all__ = [
    "Prepared",
    "PreparedImages",
    "check",
    "check_examples",
    "check_images",
    "check_vocabulary",
    "default_cache_dir",
    "default_sequences",
    "first_question",
    "is_images",
    "kind_of",
    "pack_one",
    "prepare",
    "prepare_examples",
    "prepare_images",
    "token_count",
    "vocabulary_size",
]


def __getattr__(name: str) -> Any:
    """Images need numpy, which takes longer to import than all else: only for those who ask."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from toy.corpora import images

    return getattr(images, name)
