"""The CIFAR ResNets equal those of the paper: layers, shortcuts, multiply-adds, names of the weights."""

import pytest
import torch
import torch.nn.functional as F
from conftest import image_network, pixels
from torch import nn

from pruning_lib.models import surgery
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.models.cifar_resnet import CifarResNet, Normalise, PaddedSubsample


def multiply_adds(network, size=32):
    """Return the multiply-adds of convolutions and dense layers for one image, counted by hooks."""
    found = []

    def count(module, args, out):
        found.append(out[0].numel() * module.weight[0].numel())  # each output value: one per weight that leads to it

    handles = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        network(pixels(size)[:1])
    for handle in handles:
        handle.remove()
    return sum(found)


def test_the_multiply_adds_of_resnet56_are_those_counted_by_hand():
    first, dense = 32 * 32 * 16 * 3 * 9, 640
    block = 2 * 32 * 32 * 16 * 16 * 9  # in every stage: a quarter of the pixels, four times the channel pairs
    change, one_by_one = block * 3 // 4, 16 * 16 * 32 * 16
    whole = first + dense + 9 * block + 2 * (8 * block + change)
    assert multiply_adds(CifarResNet(56, "A").eval()) == whole
    network = CifarResNet(56, "projection").eval()
    assert multiply_adds(network) == whole + 2 * one_by_one == 125_747_840
    removed = [f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(2, 9)]
    pruned = surgery.remove(network, BlockPlan.of(network, removed))
    assert multiply_adds(pruned) == first + dense + 2 * block + 2 * (block + change + one_by_one) == 26_657_408


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_the_depth_is_the_number_of_layers_with_weights(depth):
    with torch.device("meta"):
        network = CifarResNet(depth)
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in network.modules()) == depth


def test_the_weights_have_the_names_that_published_ones_have():
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{n}" for n in norm)}
    for block in (f"layer{stage}.{i}" for stage in (1, 2, 3) for i in (0, 1, 2)):
        expected |= {f"{block}.conv1.weight", f"{block}.conv2.weight"}
        expected |= {f"{block}.{bn}.{n}" for bn in ("bn1", "bn2") for n in norm}
    assert set(CifarResNet(20).state_dict()) == expected
    extra = {f"layer{stage}.0.shortcut.{n}" for stage in (2, 3) for n in ("0.weight", *(f"1.{n}" for n in norm))}
    assert set(CifarResNet(20, "projection").state_dict()) == expected | extra


@pytest.mark.parametrize("shortcut", ["A", "projection"])
def test_the_network_computes_what_the_paper_says(shortcut):
    """Compare with a second implementation on the bare weights; the smallest depth has one block per stage."""
    network = image_network("cifar_resnet", depth=8, shortcut=shortcut, channels=2, classes=5, mean=(0.1, 0.2),
                            std=(0.5, 0.7)).double()
    w, x = network.state_dict(), pixels(channels=2, dtype=torch.float64)

    def conv(x, name, stride=1, padding=1):
        return F.conv2d(x, w[f"{name}.weight"], stride=stride, padding=padding)

    def norm(x, name):
        mean, var, weight, bias = (w[f"{name}.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight",
                                                                            "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    h = (x - torch.tensor([0.1, 0.2]).view(2, 1, 1)) / torch.tensor([0.5, 0.7]).view(2, 1, 1)
    h = norm(conv(h, "conv1"), "bn1").relu()
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        b = f"layer{stage}.0"
        branch = norm(conv(norm(conv(h, f"{b}.conv1", stride), f"{b}.bn1").relu(), f"{b}.conv2"), f"{b}.bn2")
        if stride == 2 and shortcut == "projection":
            h = norm(conv(h, f"{b}.shortcut.0", 2, padding=0), f"{b}.shortcut.1")
        elif stride == 2:
            padded = torch.zeros_like(branch)
            quarter = branch.shape[1] // 4
            padded[:, quarter:3 * quarter] = h[:, :, ::2, ::2]
            h = padded
        h = (h + branch).relu()
    expected = F.linear(h.flatten(2).mean(-1), w["linear.weight"], w["linear.bias"])
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=1e-10)


def test_the_parameter_free_shortcut_pads_on_both_sides():
    x = torch.arange(1.0, 33).view(1, 2, 4, 4)
    out = PaddedSubsample(2, 4)(x)
    assert out[0, [0, 3]].abs().max() == 0
    assert out[0, 1].tolist() == [[1, 3], [9, 11]] and out[0, 2].tolist() == [[17, 19], [25, 27]]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"depth": 18}, r"depth=18.*6n \+ 2.*20.*56"),
    ({"depth": 2}, "depth=2"),
    ({"shortcut": "B"}, "shortcut='B'; allowed: A, projection"),
    ({"channels": 1}, "1 channels but a mean of 3"),
    ({"std": (0.5, 0.5)}, "one of each per channel"),
    ({"std": (0.5, 0.5, 0)}, "every std above 0"),
])
def test_what_cannot_be_built_is_refused_with_what_can(arguments, message):
    with pytest.raises(ValueError, match=message):
        CifarResNet(**arguments)


def test_normalised_pixels_have_the_stated_mean_and_deviation():
    layer = Normalise((0, 0.5), (1, 0.25))
    assert layer(torch.full((1, 2, 1, 1), 0.75)).flatten().tolist() == [0.75, 1.0]
    assert not layer.state_dict() and not list(layer.parameters())
