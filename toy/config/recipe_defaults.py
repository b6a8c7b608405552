"""What a recipe has instead of the knobs' own defaults. ONE table; what depends on the data is filled by `resolve`."""

from __future__ import annotations

from typing import Any

#: recipe -> knob -> value, in the place of the default of toy.config.knobs.
RECIPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "from-scratch": {},
    # Weights that know something already: a third of the rate of new ones.
    "warm-start": {"model.init": "donor", "train.learning_rate": 3e-4},
    # B begins at zero and the base stays as it is, so the rate can be higher than for the base's own weights. Few
    # examples, seen a few times. No decay: a strong one (15) keeps an adapter from changing more than its examples
    # ask for, and is for those whose other abilities have to stay (tests/slow/test_lora_smollm2.py).
    "lora": {
        "train.steps": 300,
        "train.batch": 8,
        "train.learning_rate": 5e-4,
        "train.beta2": 0.999,
        "train.weight_decay": 0.0,
        "eval.every": 50,
    },
    # ViT-Tiny: Touvron et al. 2021 (https://arxiv.org/abs/2012.12877), table 1. Weights and positions begin at about
    # 1 / sqrt(n_embd): with 0.02, thousands of images go by before it sees where a patch is (MNIST, 200 steps: 90 %
    # right, not 76 %).
    "vit-tiny": {
        "run.arch": "vit",
        "model.n_layer": 12,
        "model.n_embd": 192,
        "model.n_head": 3,
        "model.norm_eps": 1e-6,
        "model.init_std": 0.06,
        "train.batch": 64,
        "train.beta2": 0.999,
        "train.weight_decay": 0.05,
    },
}
