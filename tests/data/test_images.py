"""Tests of the image sets: disjoint and fixed splits, balanced draws, errors for sets that are not available."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pruning_lib.data import images
from pruning_lib.data.images import IMAGES, SPLITS


def rows_of(pixels):
    return {tuple(image.flatten().tolist()) for image in pixels}


@pytest.fixture
def copy_of_cifar(tmp_path, monkeypatch):
    """Write a copy as under PRUNING_DATA: 5,010 training and 4 test images, each of a different colour."""
    folder = tmp_path / "cifar10" / "data"
    folder.mkdir(parents=True)
    for part, count, first in (("train", 5010, 0), ("test", 4, 6000)):
        cells = [{"img": {"bytes": encoded(first + i)}, "label": i % 10} for i in range(count)]
        pd.DataFrame(cells).to_parquet(folder / f"{part}-00000-of-00001.parquet")
    monkeypatch.setenv("PRUNING_DATA", str(tmp_path))


def encoded(number):
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 2, 3), (number % 256, number // 256, 7), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_three_splits_of_the_digits_share_no_image_and_make_up_the_whole():
    from sklearn.datasets import load_digits

    found = {split: images.load("digits", split) for split in SPLITS}
    assert [len(labels) for _, labels in found.values()] == [300, 900, 597]
    numbers = [rows_of(pixels) for pixels, _ in found.values()]
    assert not (numbers[0] & numbers[1] or numbers[0] & numbers[2] or numbers[1] & numbers[2])
    pixels, labels = (torch.cat(parts) for parts in zip(*found.values(), strict=True))
    assert pixels.dtype == torch.uint8 and pixels.shape == (1797, 1, 8, 8) and pixels.max() == 255
    whole, values = load_digits(), (pixels.double() * 16 / 255).round().flatten(1).int().tolist()
    assert sorted(zip(values, labels.tolist(), strict=True)) == sorted(
        zip(whole.data.astype(int).tolist(), whole.target.tolist(), strict=True))


def test_the_order_is_the_same_every_time_and_the_first_images_are_the_first():
    """Pin the fingerprint in the records: another order would invalidate every comparison across runs."""
    assert images.fingerprint(images.load("digits", "train")[0]) == "6c732fc12dc3d677"
    few, labels = images.load("digits", "calibration", 7)
    pixels, all_labels = images.load("digits", "calibration")
    assert torch.equal(few, pixels[:7]) and torch.equal(labels, all_labels[:7])


def test_a_copy_under_pruning_data_is_read_and_split(copy_of_cifar):
    found = {split: images.load("cifar10", split) for split in SPLITS}
    assert [len(labels) for _, labels in found.values()] == [5000, 10, 4]
    assert sorted(found["test"][0][:, :, 0, 0].tolist()) == [[6000 % 256 + i, 23, 7] for i in range(4)]
    assert len(rows_of(torch.cat([found["calibration"][0], found["train"][0]]))) == 5010
    for pixels, labels in (found["calibration"], found["train"]):  # a label stays with its image
        assert ((pixels[:, 1, 0, 0].long() * 256 + pixels[:, 0, 0, 0]) % 10).tolist() == labels.tolist()


def test_copies_of_cifar_in_two_orders_give_the_same_images_in_the_same_order(tmp_path, monkeypatch):
    found = []
    for name, numbers in (("one", range(5010)), ("other", reversed(range(5010)))):
        folder = tmp_path / name / "cifar10" / "data"
        folder.mkdir(parents=True)
        cells = [{"img": {"bytes": encoded(i)}, "label": i % 10} for i in numbers]
        for part, some in (("train", cells), ("test", cells[:40] if name == "one" else cells[-40:])):
            pd.DataFrame(some).to_parquet(folder / f"{part}-00000-of-00001.parquet")
        monkeypatch.setenv("PRUNING_DATA", str(tmp_path / name))
        found.append({split: images.load("cifar10", split) for split in SPLITS})
    for split in SPLITS:
        (pixels, labels), (others, their_labels) = found[0][split], found[1][split]
        assert torch.equal(pixels, others) and torch.equal(labels, their_labels)
        assert ((pixels[:, 1, 0, 0].long() * 256 + pixels[:, 0, 0, 0]) % 10).tolist() == labels.tolist()
    assert [len(labels) for _, labels in found[0].values()] == [5000, 10, 40]


@pytest.mark.parametrize("name", IMAGES)
def test_an_entry_states_one_mean_and_deviation_per_channel_and_a_licence(name):
    entry = IMAGES[name]
    assert len(entry.mean) == len(entry.std) in (1, 3) and entry.calibration > 0 and entry.licence


def test_the_stated_mean_and_deviation_of_the_digits_are_those_of_their_training_part():
    pixels = torch.cat([images.load("digits", split)[0] for split in ("calibration", "train")]).float() / 255
    entry = IMAGES["digits"]
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((*entry.mean, *entry.std), abs=1e-3)


def test_a_balanced_draw_has_every_class_as_often_and_obeys_its_seed():
    labels = torch.tensor([0, 1, 2] * 30 + [2] * 50)
    chosen = images.balanced(labels, 12, seed=3)
    assert labels[chosen].bincount().tolist() == [12, 12, 12] and chosen.tolist() == sorted(set(chosen.tolist()))
    assert torch.equal(chosen, images.balanced(labels, 12, seed=3))
    assert not torch.equal(chosen, images.balanced(labels, 12, seed=4))
    with pytest.raises(ValueError, match="per_class=31, but class 0 has 30 images; give at most that"):
        images.balanced(labels, 31)


@pytest.mark.parametrize("arguments, message", [
    (("numbers", "test"), "unknown image set 'numbers'"),
    (("digits", "validation"), "split='validation'; allowed: calibration, train, test"),
    (("digits", "test", 598), "n=598 images of 'digits', test; give 1 to 597"),
    (("digits", "test", 0), "n=0 images")])
def test_what_there_is_not_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        images.load(*arguments)


def test_a_broken_archive_says_where_it_belongs_and_what_else_there_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))
    (tmp_path / "cifar10" / "cifar-10-batches-py").mkdir(parents=True)
    with pytest.raises(ConnectionError, match="(?s)not available.*cifar10.*'digits'"):
        images.load("cifar10", "test")


def test_a_copy_without_its_files_is_named(tmp_path, monkeypatch):
    (tmp_path / "cifar10" / "data").mkdir(parents=True)
    monkeypatch.setenv("PRUNING_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="has no test-"):
        images.load("cifar10", "test")


def test_a_fingerprint_tells_pixels_and_their_order_apart():
    pixels = torch.arange(12, dtype=torch.uint8).view(2, 1, 2, 3)
    found = {images.fingerprint(p) for p in (pixels, pixels.flip(0), pixels + 1)}
    assert len(found) == 3 and images.fingerprint(pixels.clone()) in found
