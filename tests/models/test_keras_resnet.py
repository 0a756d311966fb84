"""The Keras-built ResNet computes what Keras computes: checked against arithmetic written a second time with loops."""

import numpy as np
import pytest
import torch
from conftest import image_network

from pruning_lib.models import checkpoints, families, loading, surgery
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.models.keras_resnet import KerasResNet, SameConv2d, blocks_of


def same_convolution(x, kernel, bias, stride):
    """Convolve (channels, height, width) as Keras' documentation of "same" says, one output value at a time."""
    out, _, k, _ = kernel.shape
    starts, counts = [], []
    for size in x.shape[1:]:
        count = -(-size // stride)
        total = max((count - 1) * stride + k - size, 0)
        starts.append(total // 2)  # the smaller half in front
        counts.append(count)
    found = np.empty((out, *counts))
    for o, i, j in np.ndindex(found.shape):
        value = bias[o]
        for c, di, dj in np.ndindex(kernel.shape[1:]):
            row, column = i * stride + di - starts[0], j * stride + dj - starts[1]
            if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                value += kernel[o, c, di, dj] * x[c, row, column]
        found[o, i, j] = value
    return found


def normalised(x, w, name):
    mean, var, gamma, beta = (w[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight",
                                                                             "bias"))
    return (x - mean) / np.sqrt(var + 1e-3) * gamma + beta


def by_loops(w, image, blocks):
    """Return the logits of one image (channels, height, width)."""
    def convolved(x, name, stride=1):
        return same_convolution(x, w[f"{name}.weight"], w[f"{name}.bias"], stride)

    x = np.maximum(normalised(convolved(image - w["pixel_mean.mean"], "conv1"), w, "bn1"), 0)
    for stage, count in enumerate(blocks, 1):
        for i in range(count):
            name, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            branch = np.maximum(normalised(convolved(x, f"{name}.conv1", stride), w, f"{name}.bn1"), 0)
            branch = normalised(convolved(branch, f"{name}.conv2"), w, f"{name}.bn2")
            x = np.maximum((convolved(x, f"{name}.shortcut", 2) if stride == 2 else x) + branch, 0)
    return w["linear.weight"] @ x.mean((1, 2)) + w["linear.bias"]


def keras_network(**arguments):
    """A network in which no weight, bias, statistic or pixel mean is zero."""
    channels = arguments.get("channels", 3)
    network = image_network("keras_resnet", mean=(0.0,) * channels, std=(1.0,) * channels, **arguments)
    generator = torch.Generator().manual_seed(5)
    network.pixel_mean.mean.copy_(torch.rand(network.pixel_mean.mean.shape, generator=generator))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.bias.data.copy_(torch.rand(module.bias.shape, generator=generator) - 0.5)
    return network


@pytest.mark.parametrize("size", [4, 7])  # padding differs between even and odd sizes
def test_the_logits_are_those_of_the_arithmetic_of_keras(size):
    blocks = (1, 2, 1)
    network = keras_network(blocks=blocks, channels=2, classes=3, size=size).double()
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    image = torch.rand(2, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = network(image[None])[0].numpy()
    np.testing.assert_allclose(found, by_loops(weights, image.numpy(), blocks), rtol=1e-9)


@pytest.mark.parametrize("kernel, stride, size", [(3, 2, 8), (3, 2, 7), (1, 2, 8), (3, 3, 8), (5, 2, 6), (2, 2, 5)])
def test_padding_is_that_of_same_for_other_sizes_too(kernel, stride, size):
    convolution = SameConv2d(2, 3, size=kernel, stride=stride).double()
    x = torch.rand(2, size, size + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = convolution(x[None])[0].numpy()
    expected = same_convolution(x.numpy(), *(p.detach().numpy() for p in convolution.parameters()), stride)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_blocks_are_found_cut_saved_and_read_again(tmp_path):
    network = keras_network(blocks=(2, 3, 2))
    infos = families.residual_blocks(network)
    assert [(i.name, i.stage) for i in infos if not i.removable] == [("layer2.0", 1), ("layer3.0", 2)]
    pruned = surgery.remove(network, BlockPlan.of(network, ["layer1.1", "layer2.1"]))
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    network.layer1[1], network.layer2[1] = torch.nn.Identity(), torch.nn.Identity()
    with torch.no_grad():
        expected = network(pixels)
        checkpoints.save(pruned, None, tmp_path / "pruned")
        again, _ = loading.load_model(str(tmp_path / "pruned"), device="cpu")
        assert torch.equal(pruned(pixels), expected) and torch.equal(again(pixels), expected)
    assert torch.equal(again.pixel_mean.mean, network.pixel_mean.mean)
    assert blocks_of(again.state_dict()) == (1, 2, 2)


def test_fresh_weights_have_no_garbage_and_bad_sizes_are_refused():
    fresh = image_network("keras_resnet", blocks=(1, 1, 1))
    assert all(torch.isfinite(tensor).all() for tensor in fresh.state_dict().values())
    assert not fresh.pixel_mean.mean.any() and not fresh.conv1.bias.any()
    for arguments, message in (({"blocks": (9, 9)}, "three numbers"), ({"blocks": (9, 0, 9)}, "at least 1"),
                               ({"size": 0}, "size=0")):
        with pytest.raises(ValueError, match=message):
            KerasResNet(**arguments)
