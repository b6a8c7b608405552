"""vit against PyTorch: the same losses and gradients, from the same images. (Dumps: test_torch_parity.py.)"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import parity
import pytest
from packed_data import patterned_images
from parity import N_IMAGES, VIT_CASES, Case, needs_torch


@needs_torch
@pytest.mark.parametrize("case", VIT_CASES, ids=lambda case: case.name)
def test_losses_and_gradients_are_those_of_torch(case: Case, tmp_path: Path) -> None:
    parity.check_against(case, parity.run_torch(case, tmp_path), tmp_path)


def scaled(case: Case) -> tuple[parity.Array, parity.Array]:
    """The case's images as PyTorch would take them, [n, channel, row, column], and their labels."""
    m = case.knobs.model
    images, labels = patterned_images(N_IMAGES, m.n_class, m.image_size, m.n_channel)
    x = images.astype(np.float64) / 255
    mean, std = (f(x, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.std))
    return ((x - mean) / std).astype(np.float32), labels


def patches_of(case: Case, images: parity.Array) -> parity.Array:
    pytest.importorskip("torch")
    from torch_vit import patches_of as cut

    return cut(images, case.knobs.model.patch_size)


@pytest.mark.parametrize("case", VIT_CASES[1:], ids=lambda case: case.name)
def test_a_batch_is_the_images_normalised_and_cut(case: Case, tmp_path: Path) -> None:
    """Each image of the training part once an epoch, with its label; the validation part never."""
    images, labels = scaled(case)
    n_train = N_IMAGES - N_IMAGES // 10
    expected = patches_of(case, images).reshape(N_IMAGES, -1)
    reader, seen = parity.trainer(case, tmp_path), []
    while len(seen) < 2 * n_train:
        patches, wanted = reader.next_batch()
        for row, label in zip(patches.reshape(len(wanted.ravel()), -1), wanted.ravel(), strict=True):
            distance = np.abs(expected - row).max(axis=1)
            seen.append(int(distance.argmin()))
            assert distance.min() < 1e-5
            assert label == labels[seen[-1]]
    assert sorted(seen[:n_train]) == list(range(n_train))
    assert sorted(seen[n_train : 2 * n_train]) == list(range(n_train))
    assert seen[:n_train] != seen[n_train : 2 * n_train], "each epoch has an order of its own"


def test_flipped_images_are_their_mirror_images(tmp_path: Path) -> None:
    case = Case("flip", VIT_CASES[1].model, {"batch": 9}, arch="vit", recipe="vit-tiny", data={"augment_flip": True})
    images, _ = scaled(case)
    straight, mirrored = (patches_of(case, x).reshape(N_IMAGES, -1) for x in (images, images[..., ::-1]))
    reader, flips = parity.trainer(case, tmp_path), []
    for _ in range(20):
        patches, wanted = reader.next_batch()
        for row in patches.reshape(len(wanted.ravel()), -1):
            errors = [np.abs(x - row).max(axis=1).min() for x in (straight, mirrored)]
            assert min(errors) < 1e-5
            flips.append(errors[1] < errors[0])
    assert 0.35 < np.mean(flips) < 0.65


def test_cropped_images_are_shifted(tmp_path: Path) -> None:
    """augment_crop: a window of the image's own size out of the image with that much border all around."""
    crop = 2
    case = Case("crop", VIT_CASES[0].model, {"batch": 9}, arch="vit", recipe="vit-tiny", data={"augment_crop": crop})
    m = case.knobs.model
    images, _ = scaled(case)
    size, inside = m.image_size, slice(crop, -crop)
    reader, shifts = parity.trainer(case, tmp_path), set()
    for _ in range(20):
        patches, wanted = reader.next_batch()
        n = len(wanted.ravel())
        grid = size // m.patch_size
        rows = patches.reshape(n, grid, grid, 1, m.patch_size, m.patch_size).transpose(0, 3, 1, 4, 2, 5)
        for image in rows.reshape(n, size, size):
            errors = {
                (dy, dx): np.abs(
                    images[:, 0, crop + dy : size - crop + dy, crop + dx : size - crop + dx] - image[inside, inside]
                ).max(axis=(1, 2)).min()
                for dy in range(-crop, crop + 1) for dx in range(-crop, crop + 1)
            }  # fmt: skip
            best = min(errors, key=lambda shift: errors[shift])
            assert errors[best] < 1e-5
            shifts.add(best)
    assert len(shifts) > 15
    assert max(max(abs(dy), abs(dx)) for dy, dx in shifts) == crop


@needs_torch
@pytest.mark.parametrize("case", VIT_CASES[:2], ids=lambda case: case.name)
def test_validation_loss_is_that_of_the_last_tenth(case: Case, tmp_path: Path) -> None:
    import torch

    ours = parity.trainer(case, tmp_path)
    for _ in range(5):
        ours.step()
    images, labels = scaled(case)
    held_out = slice(N_IMAGES - N_IMAGES // 10, N_IMAGES)
    with torch.no_grad():
        model = parity.torch_model(case, ours.weights(), tmp_path)
        total = model.loss_sum(patches_of(case, images[held_out]), labels[held_out]).item()
    np.testing.assert_allclose(ours.evaluate(), total / (N_IMAGES // 10), rtol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_every_tensor_changes_in_one_step(tmp_path: Path, pool: str) -> None:
    case = Case("step", VIT_CASES[0].model | {"pool": pool}, {"warmup_steps": 0}, arch="vit", recipe="vit-tiny")
    ours = parity.trainer(case, tmp_path)
    before = ours.weights()
    assert ("cls_embd.weight" in before) is (pool == "cls")
    ours.step()
    after = ours.weights()
    assert [name for name in before if np.array_equal(before[name], after[name])] == []
