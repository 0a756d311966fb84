"""Corruptions equal the published ones: by hand, by another library, or by counting."""

import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from scipy import ndimage

from pruning_lib.evaluation import corruptions
from pruning_lib.evaluation.corruptions import CORRUPTIONS, corrupt

# as printed in the authors' make_cifar_c.py
PUBLISHED = ["gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
             "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"]


def pictures(channels=3, size=32, n=6):
    """Return smooth images with an edge and no pixel at the ends of the range."""
    y, x = np.mgrid[0:size, 0:size] / size
    planes = [[0.4 + 0.25 * np.sin((3 + i) * x + c) + 0.2 * (y > 0.3 + 0.05 * i) for c in range(channels)]
              for i in range(n)]
    return torch.from_numpy((np.array(planes) * 255).astype(np.uint8))


def test_there_are_the_fifteen_of_cifar_10_c():
    assert sorted(CORRUPTIONS) == sorted(PUBLISHED)
    assert {facts["kind"] for facts in CORRUPTIONS.facts.values()} == {"noise", "blur", "weather", "digital"}
    assert all(len(facts["strengths"]) == 5 for facts in CORRUPTIONS.facts.values())


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("channels, size", [(3, 32), (1, 8)])
def test_a_corruption_changes_pictures_more_at_five_than_at_one_and_keeps_their_form(name, channels, size):
    x = pictures(channels, size)
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    found = [corrupt(name, x, severity=s, seed=3) for s in (1, 5)]
    assert all(f.shape == x.shape and f.dtype == torch.uint8 for f in found)
    mild, severe = ((f.float() - x.float()).abs().mean() for f in found)
    assert (mild if size == 32 else severe) > 0.05
    assert severe > mild or name == "elastic_transform"  # its first strength is an affine map alone
    assert torch.equal(found[1], corrupt(name, x, severity=5, seed=3))
    assert (np.random.get_state()[1] == before).all() and torch.equal(torch.get_rng_state(), torch_before)
    drawn = CORRUPTIONS.facts[name]["kind"] in ("noise", "weather") or name in ("glass_blur", "motion_blur",
                                                                                "elastic_transform")
    assert torch.equal(found[1], corrupt(name, x, severity=5, seed=4)) == (not drawn or name == "brightness")


@pytest.mark.parametrize("name", ["gaussian_noise", "glass_blur", "motion_blur", "snow", "frost", "fog",
                                  "elastic_transform"])
def test_every_image_draws_its_own_noise_and_the_first_block_does_not_know_the_rest(name, monkeypatch):
    monkeypatch.setattr(corruptions, "BLOCK", 4)
    x = pictures(n=1).expand(6, -1, -1, -1)
    found = corrupt(name, x, severity=5)
    assert len({f.numpy().tobytes() for f in found}) >= 5  # two lines of motion may fall on the same pixels
    assert torch.equal(corrupt(name, x[:4], severity=5), found[:4])


def grey(value=128, n=20, size=32):
    return torch.full((n, 3, size, size), value, dtype=torch.uint8)


@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
def test_noise_is_as_strong_as_published(severity):
    gaussian = corrupt("gaussian_noise", grey(), severity=severity).float() / 255
    assert gaussian.std().item() == pytest.approx([.04, .06, .08, .09, .10][severity - 1], rel=0.03)
    shot = corrupt("shot_noise", grey(), severity=severity).float() / 255
    photons = [500, 250, 100, 75, 50][severity - 1]
    assert shot.std().item() == pytest.approx((128 / 255 / photons) ** 0.5, rel=0.03)
    impulse = corrupt("impulse_noise", grey(), severity=severity)
    share = [.01, .02, .03, .05, .07][severity - 1]
    for value in (0, 255):
        assert (impulse == value).float().mean().item() == pytest.approx(share / 2, rel=0.15)


def test_brightness_adds_to_the_value_of_hue_saturation_value_and_contrast_keeps_the_mean():
    x = pictures()
    hsv = rgb_to_hsv(x.permute(0, 2, 3, 1).numpy() / 255)
    hsv[..., 2] = (hsv[..., 2] + .15).clip(0, 1)
    wanted = torch.from_numpy(hsv_to_rgb(hsv) * 255).permute(0, 3, 1, 2)
    assert (corrupt("brightness", x, severity=3) - wanted).abs().max() < 1.01
    assert corrupt("brightness", grey(0), severity=5).unique().tolist() == [76]  # 0.3 of 255, cut off
    less, mean = corrupt("contrast", x, severity=2).float(), x.float().mean((2, 3), keepdim=True)
    assert (less - (mean + 0.5 * (x - mean))).abs().max() < 1.01


def point(value=255):
    x = np.zeros((1, 33, 33, 1))
    x[0, 16, 16] = value / 255
    return x


def test_a_point_out_of_focus_is_a_disk_and_in_motion_half_a_gaussian_on_a_line():
    disk = CORRUPTIONS["defocus_blur"](point(), None, 5)[0, ..., 0]
    assert disk[15:18, 15:18] == pytest.approx(np.full((3, 3), 1 / 9)) and disk.sum() == pytest.approx(1)
    line = corruptions._along(point(), 6, 2.0, np.array([0.0]))[0, ..., 0]
    wanted = np.exp(-np.arange(13) ** 2 / 8)
    assert line[16, 4:17][::-1] == pytest.approx(wanted / wanted.sum()) and line.sum() == pytest.approx(1)
    steep = corruptions._along(point(), 6, 2.0, np.array([-90.0]))[0, ..., 0]
    assert steep[16:29, 16] == pytest.approx(line[16, 4:17][::-1])


def test_zooms_are_as_many_as_published_and_leave_a_plain_picture_as_it_is():
    ends = [1.06, 1.11, 1.16, 1.21, 1.26]
    assert CORRUPTIONS.facts["zoom_blur"]["strengths"] == tuple(len(np.arange(1, end, 0.01)) for end in ends)
    for name in ("zoom_blur", "defocus_blur", "motion_blur", "glass_blur", "elastic_transform", "pixelate"):
        assert (corrupt(name, grey(200, 2), severity=5).int() - 200).abs().max() <= 1, name
    x = pictures().permute(0, 2, 3, 1).numpy()
    slow = ndimage.zoom(x[:, 3:29, 3:29] / 255, (1, 1.25, 1.25, 1), order=1)
    assert corruptions._zoomed(x / 255, 1.25) == pytest.approx(slow[:, :32, :32])


def test_behind_glass_a_pixel_has_the_value_of_one_beside_it():
    x = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = corrupt("glass_blur", x, severity=1)  # its blur is too narrow to reach the next pixel
    moved = 0
    for image, after in zip(x.int(), found.int(), strict=True):
        assert (image[:, :2] - after[:, :2]).abs().max() <= 1  # the border stays
        for h in range(2, 16):
            for w in range(2, 16):
                around = image[:, h - 1:h + 1, w - 1:w + 1].flatten(1).T
                assert ((around - after[:, h, w]).abs().amax(1) <= 1).any()
        moved += ((image - after).abs().amax(0) > 1).sum()
    assert moved > 300


def test_pixelated_rows_are_means_and_as_few_as_published():
    x = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    x[..., 16:] = 240
    found = corrupt("pixelate", torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).mul(255).byte(),
                    severity=5)
    rows = {found[0, :, h].numpy().tobytes() for h in range(32)}
    assert len(rows) >= 20 and corrupt("pixelate", x, severity=5)[0, 0, 0].tolist()[:15] == [0] * 15


def test_an_affine_map_moves_three_points_where_it_says():
    class Moves:
        def uniform(self, low, high, shape):
            assert (low, high, shape) == (-2, 2, (3, 2))
            return np.array([[1.0, 2.0], [0.0, 1.0], [-1.0, 0.0]])  # (x, y) of each point

    image = np.zeros((32, 32, 1))
    for value, (x, y) in enumerate([(26, 26), (26, 6), (6, 6)], 1):
        image[y, x] = value
    found = corruptions._affine(image, 2, Moves())[..., 0]
    for value, (x, y) in enumerate([(27, 28), (26, 7), (5, 6)], 1):
        assert found[y, x] == pytest.approx(value)


def test_fog_keeps_the_brightest_and_its_clouds_fill_the_range_and_differ():
    clouds = corruptions._clouds(3, 32, 2.0, np.random.default_rng(0))
    assert clouds.min((1, 2)).tolist() == [0] * 3 and clouds.max((1, 2)).tolist() == [1] * 3
    smooth, rough = (np.abs(np.diff(corruptions._clouds(20, 32, decay, np.random.default_rng(0)))).mean()
                     for decay in (3, 1.75))
    assert rough > 1.3 * smooth
    x = pictures()
    assert (corrupt("fog", x, severity=3).flatten(1).max(1).values <= x.flatten(1).max(1).values).all()


# --- mean corruption error --------------------------------------------------------------------------------------------


def test_the_mean_corruption_error_by_hand():
    dense = {"fog": [0.1, 0.2, 0.3], "snow": [0.2, 0.2, 0.4]}
    pruned = {"fog": [0.1, 0.2, 0.6], "snow": [0.1, 0.1, 0.2]}
    assert corruptions.mean_corruption_error(pruned, dense) == pytest.approx((0.9 / 0.6 + 0.4 / 0.8) / 2)
    assert corruptions.mean_corruption_error(dense, dense) == 1


@pytest.mark.parametrize("errors, reference, message", [
    ({"fog": [0.1]}, {"snow": [0.1]}, "the same corruptions"), ({"fog": [0.1]}, {"fog": [0.1, 0.2]}, "same severities"),
    ({"fog": [0.1]}, {"fog": [0.0]}, "no error on fog"), ({}, {}, "the same corruptions")])
def test_errors_that_cannot_be_compared_are_refused(errors, reference, message):
    with pytest.raises(ValueError, match=message):
        corruptions.mean_corruption_error(errors, reference)


@pytest.mark.parametrize("images_, severity, message", [
    (grey(n=1), 6, "severity=6; allowed: 1 to 5"), (grey(n=1).float(), 1, "give uint8 pixels"),
    (grey(n=1)[:, :2], 1, "1 or 3, size"), (grey(n=1)[..., :16], 1, "size, size")])
def test_what_cannot_be_corrupted_is_refused(images_, severity, message):
    with pytest.raises(ValueError, match=message):
        corrupt("fog", images_, severity=severity)
