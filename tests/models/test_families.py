"""Family records find their modules; head counts that cannot be stored are refused with the allowed counts."""

import pytest
import torch
import torchvision
from conftest import build, image_network
from torchvision.models.mobilenetv2 import InvertedResidual
from transformers import AutoConfig, AutoModel

from pruning_lib.models import families, image_families, image_networks, surgery
from pruning_lib.models.plan import Plan
from pruning_lib.pruning.selection import choose


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 3), (6, 2), (4, 1)])
def test_sizes_are_read_off_the_modules(family, tiny, heads, groups):
    model = tiny(family, heads=heads, groups=groups, head_width=16, neurons=26, n_blocks=3)
    s = families.sizes(model)
    assert (s.blocks, s.heads, s.groups, s.head_width, s.neurons, s.width) == (3, heads, groups, 16, 26, 48)
    assert s.parameters == sum(p.numel() for p in model.parameters())


def test_the_family_names_every_projection_that_heads_and_neurons_pass_through(family, tiny):
    """Find forgotten projections: matrices of a pruned block that still have a side of H*D, G*D, M, or a sum."""
    model = tiny(family, heads=6, groups=3, head_width=7, neurons=26, n_blocks=1)
    record = families.family_of(model)
    named = {record.queries, record.keys, record.values, record.heads_out, *record.neurons_in, record.neurons_out}
    wide = {name.removesuffix(".weight") for name, p in families.blocks(model)[0].named_parameters()
            if p.ndim == 2 and {42, 21, 26, 42 + 2 * 21, 2 * 26} & set(p.shape)}
    assert wide == named


def test_a_fused_matrix_is_taken_apart_into_the_rows_of_its_projections(tiny):
    p = families.projections(tiny("phi3", heads=6, groups=3, head_width=7, neurons=26).model.layers[0],
                             families.FAMILIES["phi3"])
    assert [(rows.start, rows.count) for rows in (p.queries, p.keys, p.values, *p.neurons_in)] == [
        (0, 42), (42, 21), (63, 21), (0, 26), (26, 26)]
    assert p.queries.linear is p.values.linear and p.neurons_in[0].linear is p.neurons_in[1].linear


def test_a_long_context_phi3_keeps_its_heads_and_may_lose_neurons(tiny, random_importance):
    long = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4}
    model = tiny("phi3", fields={"rope_parameters": long}, heads=6, groups=3, head_width=8)
    with pytest.raises(ValueError, match="short_factor.*scope='neurons'"):
        choose(random_importance(model), model, removed_fraction=0.2, heads_removed=2)
    assert choose(random_importance(model), model, removed_fraction=0.1, scope="neurons").kept["heads"] == 6


def test_a_module_that_is_no_language_model_is_refused_with_the_known_families():
    with pytest.raises(ValueError, match="unknown family 'Linear'; known: .*llama.*qwen3"):
        families.family_of(torch.nn.Linear(2, 2))


def test_a_part_of_a_model_is_refused_with_the_way_to_load_it(family, tiny):
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        families.family_of(AutoModel.from_config(tiny(family).config))


def test_blocks_of_different_sizes_are_refused(tiny):
    model = tiny("qwen2")
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(20, 48, bias=False)
    with pytest.raises(ValueError, match="blocks differ in size"):
        families.sizes(model)


def test_phi_with_normalised_queries_keeps_its_heads_and_may_lose_neurons(tiny, random_importance):
    model = tiny("phi", fields={"qk_layernorm": True}, heads=4, groups=2, head_width=12)
    importance = random_importance(model)
    with pytest.raises(ValueError, match="qk_layernorm.*scope='neurons'"):
        choose(importance, model, removed_fraction=0.2, scope="heads")
    assert choose(importance, model, removed_fraction=0.1, scope="neurons").kept["heads"] == 4
    plan = Plan("whole_groups", torch.tensor([[0], [1]]), torch.zeros(2, 0, dtype=torch.long), families.sizes(model))
    with pytest.raises(ValueError, match="qk_layernorm"):
        surgery.remove(model, plan, inplace=True)
    assert families.sizes(model) == plan.sizes


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias"])
def test_a_llama_that_could_not_be_stored_is_refused_before_anything_is_cut(tiny, random_importance, field):
    model = tiny("llama", heads=6, groups=6, fields={field: True})
    before = {name: p.clone() for name, p in model.named_parameters()}
    refused = rf"5 heads.*{field}.*divide the width 48.*Allowed: \[1, 2, 3, 4, 6\].*scope='neurons'"
    with pytest.raises(ValueError, match=refused):
        choose(random_importance(model), model, removed_fraction=0.15, heads_removed=1)
    plan = Plan("whole_groups", torch.tensor([[0], [1]]), torch.zeros(2, 0, dtype=torch.long), families.sizes(model))
    with pytest.raises(ValueError, match=refused):
        surgery.remove(model, plan, inplace=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_every_count_listed_as_allowed_can_be_planned_and_cut(tiny, random_importance):
    """Refuse some divisors of the width: with grouped queries the cut must be lossless as well."""
    model = tiny("llama", heads=8, groups=2, neurons=300, fields={"attention_bias": True})  # width 48
    with pytest.raises(ValueError, match="Allowed") as refused:
        families.refuse_head_count(model, 5)
    allowed = [int(n) for n in str(refused.value).split("Allowed: [")[1].split("]")[0].split(",")]
    assert allowed == [2, 4, 6, 8]
    for kept in allowed:
        cut = "whole_groups" if kept % 4 == 0 else "equal_queries"
        plan = choose(random_importance(model), model, removed_fraction=0.5, heads_removed=8 - kept, grouped_query=cut)
        assert surgery.remove(model, plan).config.num_attention_heads == kept


def test_a_toy_network_keeps_the_head_width_it_was_asked_for(family):
    """Read the head width of Phi and Qwen2, whose configs do not declare head_dim; width / heads is 12 here."""
    config = families.tiny(family, width=48, heads=4, head_width=16)
    assert families.head_width(build(config)) == 16
    assert AutoConfig.for_model(**config.to_dict()).head_dim == 16


def stages(model):
    """Return stage -> (names of its blocks, names of its removable blocks)."""
    found = {}
    for block in families.residual_blocks(model):
        names, removable = found.setdefault(block.stage, ([], []))
        names.append(block.name)
        removable.extend([block.name] * block.removable)
    return found


def test_the_stages_of_resnet56_begin_where_the_shape_changes():
    for shortcut in ("A", "projection"):
        found = stages(image_network("cifar_resnet", depth=56, shortcut=shortcut))
        assert list(found) == [0, 1, 2]
        for stage, (names, removable) in found.items():
            assert names == [f"layer{stage + 1}.{i}" for i in range(9)]
            assert removable == names[stage > 0:]  # layer1.0 keeps the shape too


@pytest.mark.parametrize(("name", "blocks", "first_can_go"), [
    ("resnet18", (2, 2, 2, 2), True), ("resnet34", (3, 4, 6, 3), True),
    ("resnet50", (3, 4, 6, 3), False), ("resnet101", (3, 4, 23, 3), False),  # bottlenecks widen 64 channels to 256
])
def test_the_stages_of_torchvisions_resnets(name, blocks, first_can_go):
    with torch.device("meta"):
        network = image_networks.NETWORKS[name]()
    for stage, (names, removable) in stages(network).items():
        assert names == [f"layer{stage + 1}.{i}" for i in range(blocks[stage])]
        assert removable == (names if stage == 0 and first_can_go else names[1:])


def test_the_blocks_of_mobilenet_are_its_inverted_residuals():
    with torch.device("meta"):
        found = stages(image_networks.NETWORKS["mobilenet_v2"]())
    assert [[int(n.removeprefix("features.")) for n in names] for names, _ in found.values()] == [
        [1], [2, 3], [4, 5, 6], [7, 8, 9, 10], [11, 12, 13], [14, 15, 16], [17]]
    assert all(removable == names[1:] for names, removable in found.values())


@pytest.mark.parametrize("name", image_networks.NETWORKS)
def test_a_block_is_removable_exactly_when_without_its_weights_it_hands_on_its_input(name):
    """Compare the facts read from convolutions with a forward pass in which all weights but the skip are zero."""
    with torch.device("meta"):
        network = image_networks.NETWORKS[name]()
    for info in families.residual_blocks(network):
        block = network.get_submodule(info.name).to_empty(device="cpu").eval()
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.data.zero_()
        channels = next(m for m in block.modules() if isinstance(m, torch.nn.Conv2d)).in_channels
        x = torch.linspace(0, 1, channels * 4).view(1, channels, 2, 2)
        with torch.no_grad():
            out = block(x)
        assert info.removable == (out.shape == x.shape and torch.equal(out, x)), info


def test_a_block_that_steps_over_pixels_changes_the_shape_even_with_as_many_channels():
    assert image_families.keeps_shape(InvertedResidual(16, 16, stride=1, expand_ratio=6))
    assert not image_families.keeps_shape(InvertedResidual(16, 16, stride=2, expand_ratio=6))


def test_the_blocks_of_a_language_model_are_one_stage_and_may_all_go(family, tiny):
    found = families.residual_blocks(tiny(family, n_blocks=3))
    assert found == [families.BlockInfo(f"model.layers.{i}", 0, True) for i in range(3)]


@pytest.mark.parametrize("name", image_networks.NETWORKS)
def test_the_classifier_takes_the_penultimate_features(name):
    with torch.device("meta"):
        network = image_networks.NETWORKS[name]()
    assert families.classifier(network) is list(network.modules())[-1]
    assert families.classifier(network).in_features in (64, 512, 1280, 2048)


def test_the_classifier_of_a_language_model_is_its_head(family, tiny):
    model = tiny(family)
    assert families.classifier(model) is model.lm_head


@pytest.mark.parametrize("ask", [families.residual_blocks, families.classifier])
def test_blocks_of_an_unknown_network_without_weights_cannot_be_found(ask):
    with torch.device("meta"):
        network = torchvision.models.vgg11()
    with pytest.raises(ValueError, match="no weights.*cannot be found by running it"):
        ask(network)


def test_a_network_without_residual_blocks_has_none():
    assert families.residual_blocks(torchvision.models.squeezenet1_1().eval()) == []
