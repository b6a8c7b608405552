"""Small transformers, trained on the machine in front of you, over ggml."""

__version__ = "0.1.0"
