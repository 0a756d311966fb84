"""Residual blocks of any image network are found, removed as if bypassed, saved, and read without the original file."""

import json
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from functools import partial

import pytest
import torch
import torchvision
from conftest import hooks_of
from own_network import Own
from safetensors.torch import save_file
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from pruning_lib.models import checkpoints, families, image_networks, residual_blocks, sources, surgery
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.models.hooks import inputs_to, resume_after, skip_block
from pruning_lib.models.image_networks import describe
from pruning_lib.models.loading import load_model
from pruning_lib.training.sgd import recalibrate_batchnorm


def small_swin():
    return SwinTransformer([4, 4], 12, [2, 2], [1, 3], [4, 4], num_classes=3)


def small_vit():
    return VisionTransformer(16, 4, 3, 2, 12, 24, num_classes=3)


def small_convnext():
    return ConvNeXt([CNBlockConfig(12, 24, 2), CNBlockConfig(24, None, 2)], num_classes=3)


TV = torchvision.models
# name: (builder, blocks, blocks that can go, the first of them)
NETWORKS = {
    "resnet": (partial(TV.resnet18, num_classes=3), 8, 5, "layer1.0"),
    "wide_resnet": (partial(ResNet, Bottleneck, [2, 1, 1, 2], 3, width_per_group=128), 6, 2, "layer1.1"),
    "resnext": (partial(ResNet, Bottleneck, [2, 1, 1, 2], 3, groups=32, width_per_group=4), 6, 2, "layer1.1"),
    "mobilenet_v2": (partial(TV.mobilenet_v2, num_classes=3), 17, 10, "features.3"),
    "mobilenet_v3": (partial(TV.mobilenet_v3_small, num_classes=3), 11, 6, "features.3"),
    "efficientnet": (partial(TV.efficientnet_b0, num_classes=3), 16, 9, "features.2.1"),
    "convnext": (small_convnext, 4, 4, "features.1.0"),
    "regnet": (partial(TV.regnet_y_400mf, num_classes=3), 16, 12, "trunk_output.block2.block2-1"),
    "vit": (small_vit, 3, 3, "encoder.layers.encoder_layer_0"),
    "swin": (small_swin, 4, 4, "features.1.0"),
    "own": (Own, 5, 5, "first"),
}


def build(key):
    """A network with no parameter and no statistic zero, so that a missing block shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NETWORKS[key][0]().eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.3, 0.5)
                nn.init.uniform_(module.bias, -0.1, 0.1)
        for name, parameter in network.named_parameters():
            if "layer_scale" in name or not parameter.any():
                nn.init.uniform_(parameter, 0.2, 0.5)
        if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
            recalibrate_batchnorm(network, torch.rand(8, 3, 64, 64))  # else the signal fades on the way
    return network


def images(network):
    shape = image_networks.described_networks.description(network).layout.example
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def without(network, names, x):
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(skip_block(network, name))
        return network(x)


def removable(network):
    return [info.name for info in families.residual_blocks(network) if info.removable]


@pytest.mark.parametrize("key", NETWORKS)
def test_blocks_and_classifier_are_found(key):
    network, (_, blocks, can_go, first) = build(key), NETWORKS[key][:4]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    infos = families.residual_blocks(network)
    assert len(infos) == blocks and len(removable(network)) == can_go and removable(network)[0] == first
    assert isinstance(families.classifier(network), nn.Linear) and families.classifier(network).out_features == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not hooks_of(network) and not network.training


@pytest.mark.parametrize("key", NETWORKS)
def test_removing_is_bypassing_and_the_rest_resumes_behind_a_block(key):
    network = build(key)
    names, x = removable(network), images(network)
    for some in ([names[0]], [names[-1]], names[::2]):
        pruned = surgery.remove(network, BlockPlan.of(network, some))
        with torch.no_grad():
            found = pruned(x)
        assert torch.equal(found, without(network, some, x)) and not torch.equal(found, without(network, [], x))
        gone = sum(p.numel() for name in some for p in network.get_submodule(name).parameters())
        left = sum(p.numel() for p in pruned.parameters())
        assert left == sum(p.numel() for p in network.parameters()) - gone
        assert removable(pruned) == [name for name in names if name not in some]
    entered = []
    with torch.no_grad():
        with inputs_to([network.get_submodule(names[-1])], lambda _, y: entered.append(y.clone())):
            network(x)
        with resume_after(network, names[-1], entered[0]):
            found = network(x)
    assert torch.equal(found, without(network, names[-1:], x))


@pytest.mark.parametrize("key", ["vit", "swin"])
def test_attention_and_mlp_can_be_blocks_of_their_own(key):
    network = build(key)
    whole = removable(network)
    describe(network, branches=True)
    names, x = removable(network), images(network)
    assert len(names) == 2 * len(whole) and all(name.endswith(("attn", "self_attention", "mlp")) for name in names)
    pruned = surgery.remove(network, BlockPlan.of(network, [names[1], names[2]]))
    with torch.no_grad():
        assert torch.equal(pruned(x), without(network, [names[1], names[2]], x))
        both = surgery.remove(network, BlockPlan.of(network, names[:2]))(x)
    plain = build(key)
    torch.testing.assert_close(both, without(plain, [whole[0]], x))  # both branches are the block
    entered = []
    with torch.no_grad():
        with inputs_to([network.get_submodule(whole[1])], lambda _, y: entered.append(y.clone())):
            network(x)
    for name in names[2:4]:
        with resume_after(network, name, entered[0].clone()), torch.no_grad():
            found = network(x)
        assert torch.equal(found, without(network, [name], x)), name


@pytest.mark.parametrize("key", ["resnet", "mobilenet_v3", "efficientnet", "regnet"])
def test_networks_of_torchvision_are_saved_and_read_without_being_described(key, tmp_path):
    network = build(key)
    pruned = surgery.remove(network, BlockPlan.of(network, removable(network)[:2]))
    again = load_model(str(checkpoints.save(pruned, None, tmp_path / "pruned")), device="cpu")[0]
    x = images(network)
    with torch.no_grad():
        assert torch.equal(again(x), pruned(x))
    assert families.residual_blocks(again) == families.residual_blocks(pruned)


OWN = "own_network:Own"


def test_a_network_of_ones_own_is_read_in_a_fresh_process_if_its_builder_is_allowed(tmp_path):
    network = build("own")
    describe(network, f"import:{OWN}", arguments={"width": 8}, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3))
    pruned = surgery.remove(network, BlockPlan.of(network, ["first", "several.1"]))
    twice = surgery.remove(pruned, BlockPlan.of(pruned, ["pair.0"]))
    folder, x = checkpoints.save(twice, None, tmp_path / "own"), torch.rand(2, 3, 20, 20)
    with torch.no_grad():
        save_file({"x": x, "y": twice(x)}, tmp_path / "expected.safetensors")
    with pytest.raises(ValueError, match=rf"importing it runs code.*allow_import=\['{OWN}'\]"):
        load_model(str(folder), device="cpu")
    script = textwrap.dedent(f"""
        import torch
        from safetensors.torch import load_file
        from pruning_lib.models.loading import load_model
        network, _ = load_model({str(folder)!r}, device="cpu", allow_import=[{OWN!r}])
        data = load_file({str(tmp_path / "expected.safetensors")!r})
        with torch.no_grad():
            assert torch.equal(network(data["x"]), data["y"])
    """)
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path += {sys.path!r}\n{script}"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = json.loads((folder / "config.json").read_text())["kept_blocks"]
    assert kept == ["several.0", "pair.1"]


def test_a_vit_with_branches_removed_is_read_again(tmp_path):
    network = build("vit")
    describe(network, "import:test_described_networks:small_vit", branches=True)
    pruned = surgery.remove(network, BlockPlan.of(network, [removable(network)[i] for i in (0, 3)]))
    folder = checkpoints.save(pruned, None, tmp_path / "vit")
    again = image_networks.read(folder, allow_import=["test_described_networks:small_vit"])
    with torch.no_grad():
        assert torch.equal(again(images(network)), pruned(images(network)))


def test_a_network_that_nothing_describes_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"describe\(network, 'timm:NAME' or .*import:own_network:Own"):
        checkpoints.save(build("own"), None, tmp_path / "own")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["convnext_atto", "vit_tiny_patch16_224"])
def test_networks_of_timm_are_saved_and_read(key, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed; pip install timm ends this skip")
    network = timm.create_model(key, num_classes=3)
    pruned = surgery.remove(network.eval(), BlockPlan.of(network, removable(network)[1:3]))
    again = load_model(str(checkpoints.save(pruned, None, tmp_path / "timm")), device="cpu")[0]
    with torch.no_grad():
        assert torch.equal(again(images(network)), pruned(images(network)))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_blocks_that_are_no_sums_can_be_named():
    network = build("own")
    assert "plain" not in removable(network)
    describe(network, blocks=["several.0", "plain"])
    assert removable(network) == ["plain", "several.0"]
    for blocks, message in ((["third"], "no module is called 'third'; modules that keep the shape.*first"),
                            (["stem"], "stem cannot be left out, it changes the shape"),
                            (["pair", "pair.0"], "pair contains another block")):
        with pytest.raises(ValueError, match=message):
            describe(network, blocks=blocks)


@pytest.mark.parametrize(("network", "message"), [
    (lambda: nn.DataParallel(Own()), "wrapper; give the network itself, model.module"),
    (lambda: nn.Sequential(nn.Linear(4, 4)), "no 2-d convolution.*example"),
    (lambda: nn.Sequential(nn.Conv2d(3, 3, 3)), r"returns a tensor of shape .*logits \(N, classes\)"),
    (lambda: Own().to("meta"), "no weights"),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(7, 2)), "accepts no image of 3 channels"),
])
def test_networks_that_cannot_be_run_are_refused(network, message):
    with pytest.raises(ValueError, match=message):
        residual_blocks.find(network())


@pytest.mark.parametrize(("source", "arguments", "message"), [
    ("keras:x", {}, "unknown library 'keras'"), ("torchvision:resnet18", {"weights": "DEFAULT"}, "without weights"),
    ("timm:x", {"checkpoint_path": "/evil.pth"}, "checkpoint_path: a source describes"),
    ("import:a:b", {"f": print}, "argument f of a:b cannot be written"),
])
def test_a_source_holds_nothing_that_could_load_or_run_something(source, arguments, message):
    with pytest.raises(ValueError, match=message):
        describe(build("own"), source, arguments=arguments)


def test_a_source_builds_only_what_it_may(tmp_path):
    with pytest.raises(ValueError, match="torchvision has no classification model 'get_model'"):
        sources.build(sources.Source("torchvision", "get_model"))
    with pytest.raises(ValueError, match="importing it runs code"):
        sources.build(sources.Source("import", "os:system", {"command": "true"}), allow_import=["os:getcwd"])
    with pytest.raises(ValueError, match="returns a str; a source has to return a torch.nn.Module"):
        sources.build(sources.Source("import", "os:getcwd"), allow_import=["os:getcwd"])


def test_building_a_source_draws_nothing_from_the_global_generator():
    state = torch.get_rng_state()
    sources.build(sources.Source("torchvision", "mobilenet_v3_small"))
    assert torch.equal(torch.get_rng_state(), state)
