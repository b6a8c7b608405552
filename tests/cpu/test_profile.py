"""`toy train --profile`: what a step's time goes to. Which operations, how often and of which shape is asked; how long
they took is not, but for what holds on any machine."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Trained
from harness import EXCERPT, ROOT, TINY, Toy, read_events

STEPS = 5  # two of them warm up
FEW = ("--steps", STEPS, "--set", "eval.every=2", "--set", "eval.batches=1", "--no-sample", "--profile")


def products(profile: dict[str, Any], group: str) -> dict[tuple[int, int, int], float]:
    """m k n of C[m,n] = A[m,k] B[k,n] -> calls a step."""
    return {
        (row["m"], row["k"], row["n"]): row["calls"]
        for row in profile["rows"]
        if row["group"] == f"products, {group}" and row["batch"] == 1
    }


def test_every_product_of_a_step_is_told_with_its_shape(toy: Toy, trained: Trained) -> None:
    shape = ("--set", "model.n_head_kv=2", "--set", "train.micro_batch=2")
    document = toy("train", *TINY, *FEW, *shape, "--out", "run", "--threads", 2, "--json").ok().document
    profile = document["profile"]
    assert (profile["steps"], profile["threads"], profile["precision"]) == (STEPS - 2, 2, "f32")
    # two layers of width 64 and 192, two micro-batches of 2 x 64 tokens: each product twice a layer and step
    # (q, k and v are one product, and so are gate and up)
    tokens, wide, narrow, kv, layers = 128, 192, 64, 32, 4
    forward = products(profile, "forward")
    weights, inputs = products(profile, "weight gradients"), products(profile, "activation gradients")
    assert forward[tokens, narrow, narrow + 2 * kv] == layers, "q, k and v"
    assert forward[tokens, narrow, 2 * wide] == layers, "gate and up"
    assert forward[tokens, narrow, narrow] == layers, "output"
    assert forward[tokens, wide, narrow] == layers, "down"
    assert weights[2 * wide, tokens, narrow] == layers
    assert weights[narrow, tokens, wide] == layers
    assert inputs[tokens, 2 * wide, narrow] == layers
    assert inputs[tokens, narrow, wide] == layers
    # the event in the run's file is what the document shows
    [event] = read_events(toy.cwd / "run", "profile")
    assert {key: event[key] for key in profile} == profile


def test_the_shares_are_those_of_the_step(toy: Toy) -> None:
    """Validations and saves between the steps are no part of them: nothing is left over, and nothing negative."""
    profile = toy("train", *TINY, *FEW, "--out", "run", "--json").ok().document["profile"]
    assert all(row["ms"] >= 0 and row["calls"] > 0 for row in profile["rows"]), profile["rows"]
    for row in profile["rows"]:
        assert row["share"] == pytest.approx(row["ms"] / profile["ms_per_step"])
        if "gflops" in row:
            assert row["roof_share"] == pytest.approx(row["gflops"] / profile["roof_gflops"])
        if "m" in row:
            flops = 2e-6 * row["m"] * row["k"] * row["n"] * row["batch"] * row["calls"]
            assert row["gflops"] == pytest.approx(flops / row["ms"], rel=1e-4)
    assert profile["roof_gflops"] == max(profile["roof_before_after"])
    assert min(profile["roof_before_after"]) > 0


def test_step_lines_are_the_same_and_the_table_is_for_people(toy: Toy, trained: Trained) -> None:
    profiled = toy("train", *TINY, "--steps", 50, "--set", "checkpoint.every=40", "--profile", "--out", "run").ok()
    assert profiled.steps == trained.result.steps
    assert profiled.stdout == "".join(line + "\n" for line in profiled.steps)
    assert "profile of 20 steps" in profiled.stderr
    table = profiled.stderr[profiled.stderr.index("profile of") :].splitlines()
    assert {"products, forward", "attention", "norms", "optimizer", "host"} <= {line.split("  ")[0] for line in table}
    assert max(map(len, table)) < 100, "it fits on a terminal"


def test_without_the_flag_there_is_none(trained: Trained) -> None:
    assert read_events(trained.run, "profile") == []
    assert "profile of" not in trained.result.stderr


@pytest.mark.parametrize("recipe", ["gpt2", "lora", "vit-tiny"])
def test_every_recipe_has_a_profile(toy: Toy, trained: Trained, recipe: str) -> None:
    images = ROOT / "data" / "digits"
    words: dict[str, tuple[object, ...]] = {
        "gpt2": (*TINY, "--arch", "gpt2"),
        "lora": ("lora", "--model", trained.run, "--corpus", EXCERPT, "--rank", 4),
        "vit-tiny": (
            "vit-tiny",
            "--images",
            images,
            "--set",
            "model.n_layer=1",
            "--set",
            "train.batch=8",
        ),
    }
    profile = toy("train", *words[recipe], *FEW, "--out", "run", "--json").ok().document["profile"]
    groups = {row["group"] for row in profile["rows"]}
    assert {"products, forward", "products, weight gradients", "attention", "norms", "optimizer", "data"} <= groups
    if recipe == "lora":
        assert all(4 in shape for shape in products(profile, "weight gradients")), "of the adapter's matrices alone"


def test_a_single_step_is_profiled_without_warming_up(toy: Toy) -> None:
    document = toy("train", *TINY, "--steps", 1, "--no-sample", "--profile", "--out", "run", "--json").ok().document
    assert document["profile"]["steps"] == 1
    assert document["profile"]["roof_gflops"] > 0
