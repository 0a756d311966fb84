"""Types without a record: what is found is cut exactly, reloads plainly, or is refused with the part it is about."""

import copy

import pytest
import torch
from conftest import build
from transformers import AutoModelForCausalLM, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from pruning_lib.models import equivalents, families, possible_cuts, structure, surgery
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.models.hooks import skip_block
from pruning_lib.models.plan import Plan
from pruning_lib.models.toy_models import randomise, toy
from pruning_lib.pruning import consensus
from pruning_lib.pruning.importance import METHODS
from pruning_lib.pruning.reconstruction import reconstruct
from pruning_lib.pruning.selection import choose

BOTH = ("gemma2 gemma3_text cohere cohere2 starcoder2 glm glm4 ministral arcee exaone4 ernie4_5 hunyuan_v1_dense "
        "seed_oss nemotron apertus gemma3 granite_swa").split()
NEURONS = {"olmo2": "q_norm", "olmo3": "q_norm", "stablelm": "width / heads", "helium": "output projection",
           "gpt_neox": "width / heads", "olmo_hybrid": "q_norm", "gpt2": "width / heads", "opt": "width / heads",
           "falcon": "width / heads"}
MIXED = {"qwen3_5_text": (1,), "bamba": (1,), "lfm3": (1,), "nemotron_h": (1,)}  # blocks that have heads
UNLIKE = {"gemma4_text": (0, 1), "diffllama": (0, 1)}  # blocks differ in head width; heads go in pairs
SLIDING = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
VARIANTS = {  # settings of real models: fewer keys, which are the values too; keys and values of other blocks
    "gemma4_31b": ("gemma4_text", {"attention_k_eq_v": True, "num_attention_heads": 8, "num_key_value_heads": 4,
                                   "num_global_key_value_heads": 2}, "whole_groups"),
    "gemma4_e4b": ("gemma4_text", {"num_kv_shared_layers": 2, **SLIDING}, "equal_queries")}
LATENT = ("deepseek_v3",)  # heads of its own kind, neurons in experts
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18]])


@pytest.fixture(scope="module")
def model_of():
    """``model_of(name)``: a toy network in float64, made once; experts are multiplied in float32 at most."""
    made = {}

    def make(name):
        if name not in made:
            kind, sizes = VARIANTS.get(name, (name, {}))[:2]
            made[name] = toy(kind, **sizes, dtype=torch.float32 if name in LATENT else torch.float64)
        return made[name]

    return make


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def assert_reloads(model, folder, how=AutoModelForCausalLM):
    """Plain transformers loads the checkpoint and gives the same logits bit for bit, in float32."""
    model = copy.deepcopy(model).float()
    model.save_pretrained(folder)
    assert torch.equal(logits(how.from_pretrained(folder, dtype=torch.float32)), logits(model))


def plan_of(model, cut):
    """Return a plan that removes a unit of heads, if any, and other neurons in every block."""
    s = families.sizes(model)
    La, Lm = len(s.head_blocks), len(s.neuron_blocks)
    neurons = torch.stack([torch.arange(s.neurons).roll(2 * i)[:5].sort().values for i in range(Lm)])
    if not s.heads:
        return Plan("whole_groups", torch.zeros(0, 0, dtype=torch.long), neurons, s)
    shape = (La,) if cut == "whole_groups" else (La, s.groups)
    generator = torch.Generator().manual_seed(1)
    places = s.groups if cut == "whole_groups" else s.heads // s.groups
    return Plan(cut, torch.randint(places, (*shape, 1), generator=generator), neurons, s)


def masked(model, plan):
    """Return the model with the inputs of its output projections at zero where heads and neurons go, by hooks."""
    model = copy.deepcopy(model)
    family, s = families.family_of(model), plan.sizes

    def at_zero(columns):
        def hook(module, args):
            x = args[0].clone()
            x[..., columns] = 0
            return (x, *args[1:])
        return hook

    blocks = families.blocks(model)
    for i, D, removed in zip(s.head_blocks, s.head_widths, plan.removed_heads.tolist(), strict=True):
        columns = [h * D + d for h in removed for d in range(D)]
        blocks[i].get_submodule(family.heads_out).register_forward_pre_hook(at_zero(columns))
    for i, columns in zip(s.neuron_blocks, plan.neurons.tolist(), strict=True):
        blocks[i].get_submodule(family.neurons_out).register_forward_pre_hook(at_zero(columns))
    return model


@pytest.mark.parametrize(("name", "cut"), [
    *((n, cut) for n, (*_, cut) in VARIANTS.items()),
    *((n, c) for n in (*BOTH, *MIXED, "diffllama") for c in ("whole_groups", "equal_queries")),
    *((n, "whole_groups") for n in (*NEURONS, *LATENT))])
def test_removing_equals_masking_and_reloads_plainly(name, cut, model_of, tmp_path):
    model = model_of(name)
    plan = plan_of(model, cut)
    pruned, expected = surgery.remove(model, plan), logits(masked(model, plan))
    assert (logits(model) - expected).abs().max() > 1e-3  # the removed parts did matter
    near = 1e-4 if name in LATENT else 1e-9
    torch.testing.assert_close(logits(pruned), expected, rtol=near, atol=near)
    assert families.parameter_count(pruned) == plan.sizes.parameters - plan.removed_parameters
    assert_reloads(pruned, tmp_path)


@pytest.mark.parametrize("name", BOTH)
def test_heads_and_neurons_of_these_families_are_found(name, model_of):
    s = families.sizes(model_of(name))
    assert (s.heads, s.head_width, s.neurons) == (4, 8, 24) and possible_cuts.removable(model_of(name))["heads"] == ""


@pytest.mark.parametrize(("name", "having"), {**MIXED, **UNLIKE}.items())
def test_blocks_without_attention_or_of_another_head_width_lose_what_the_plan_says(name, having):
    """Scores, plan, cut and least squares work on the blocks that have heads; the stated fraction is the true one."""
    model = toy(name)
    batches = [{"input_ids": IDS + i, "attention_mask": torch.ones_like(IDS)} for i in range(2)]
    s = families.sizes(model)
    assert s.head_blocks == having and possible_cuts.removable(model)["heads"] == ""
    for method in ("amp", "wanda", "magnitude", "peak_to_peak", "reconstruction_error"):
        found = METHODS[method].importance(model, batches)
        assert found.heads.shape == (len(having), 4) and found.neurons.shape == (len(s.neuron_blocks), s.neurons)
    wanted = (len(s.head_blocks) * (2 * s.head_parameters + s.group_parameters)
              + len(s.neuron_blocks) * 3 * s.neuron_parameters) / s.parameters
    plan = choose(found, model, removed_fraction=wanted, heads_removed=2, multiple_of=1)
    assert plan.removed_fraction == pytest.approx(wanted, abs=1e-9) and plan.kept["neurons"] == s.neurons - 3
    pruned, steps = reconstruct(model, plan, batches, ridge=0.1)
    assert families.parameter_count(pruned) == s.parameters - plan.removed_parameters
    assert len(steps) == len(s.head_blocks) + len(s.neuron_blocks)


@pytest.mark.parametrize(("name", "other", "reason"), [
    ("gemma4_31b", "equal_queries", "differ in the number of key/value heads"),
    ("gemma4_e4b", "whole_groups", "keys and values of other blocks")])
def test_blocks_that_depend_on_each_other_lose_heads_in_one_manner(name, other, reason, model_of, random_importance):
    """Without weights the manners and the sizes are the same."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model_of(name).config)
    for model in (model_of(name), empty):
        assert families.sizes(model) == families.sizes(model_of(name))
        with pytest.raises(ValueError, match=f"grouped_query='{other}'.*{reason}"):
            choose(random_importance(model), model, removed_fraction=0.3, heads_removed=4, grouped_query=other)
    plan = plan_of(model_of(name), VARIANTS[name][2])
    if "other blocks" in reason:
        with pytest.raises(ValueError, match="mode='one_pass'"):
            reconstruct(model_of(name), plan, [])


@pytest.mark.parametrize(("name", "reason"), NEURONS.items())
def test_heads_are_refused_with_the_reason(name, reason, model_of, random_importance):
    model = model_of(name)
    assert reason in families.family_of(model).refused["heads"]
    assert (reason in possible_cuts.removable(model)["heads"]) == (equivalents.entry(model) is None)
    with pytest.raises(ValueError, match=f"heads of this model cannot be removed: .*{reason}.*scope='neurons'"):
        choose(random_importance(model), model, removed_fraction=0.1, heads_removed="same_share")
    assert choose(random_importance(model), model, removed_fraction=0.1, scope="neurons").neurons.shape[1] > 0


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_5_text", "falcon", "bart", "gpt2", "cohere2"])
def test_blocks_go_with_what_the_config_lists_per_block(name, model_of, tmp_path):
    model = model_of(name)
    first = families.residual_blocks(model)[0].name
    with skip_block(model, first):
        expected = logits(model)
    pruned = surgery.remove(model, BlockPlan.of(model, [first]))
    assert torch.equal(logits(pruned), expected) and len(families.blocks(pruned)) == 1
    lists = getattr(pruned.config, "layer_types", None)
    assert lists is None or lists == model.config.layer_types[1:]
    assert_reloads(pruned, tmp_path)


def test_a_pruned_model_of_a_found_type_can_be_pruned_again(model_of):
    once = surgery.remove(model_of("gemma2"), plan_of(model_of("gemma2"), "equal_queries"))
    plan = plan_of(once, "whole_groups")
    torch.testing.assert_close(logits(surgery.remove(once, plan)), logits(masked(once, plan)), rtol=1e-9, atol=1e-9)


def test_head_counts_that_transformers_refuses_are_listed_before_anything_is_cut(random_importance):
    model = toy("gemma2", num_attention_heads=8, num_key_value_heads=4)  # width 32: 6 heads do not divide it
    with pytest.raises(ValueError, match=r"6 heads per block could not be stored.*Allowed: \[2, 4, 8\]"):
        choose(random_importance(model), model, removed_fraction=0.3, heads_removed=2)


def test_the_text_tower_of_a_multimodal_wrapper_is_cut_and_reloads(tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 32}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).double().eval()
    randomise(model, 0)
    assert "width / heads" in possible_cuts.removable(model)["heads"]
    plan = plan_of(model, "whole_groups")
    pruned = surgery.remove(model, plan)
    torch.testing.assert_close(logits(pruned), logits(masked(model, plan)), rtol=1e-9, atol=1e-9)
    assert pruned.config.text_config.intermediate_size == 19 and model.config.text_config.intermediate_size == 24
    assert_reloads(pruned, tmp_path, Qwen2_5_VLForConditionalGeneration)


@pytest.mark.parametrize("name", ["llama", "phi3", "granite", "phi"])
def test_the_search_finds_what_the_record_of_a_known_family_states(name, tiny):
    model = tiny(name)
    found, record = structure.find(model), families.FAMILIES[name]
    assert (found.blocks, found.heads_out, found.neurons_out) == (record.blocks, record.heads_out, record.neurons_out)
    assert set(families.named_paths(found)) == set(families.named_paths(record))


def test_two_layouts_of_the_same_shape_are_told_apart_by_trying(model_of):
    """GLM fuses gate and up one after the other; read as pairs, the wrong rows would go."""
    gate_up = next(p for p in families.family_of(model_of("glm")).parts if "gate_up" in p.parameter)
    assert (gate_up.entries, gate_up.pieces) == (2, 2)


@pytest.mark.parametrize(("wrap", "way"), [
    (lambda m: torch.compile(m), "_orig_mod"), (lambda m: torch.nn.DataParallel(m), "model.module")])
def test_a_wrapped_model_is_refused_at_once_with_the_way_to_the_model(wrap, way, tiny):
    with pytest.raises(ValueError, match=way):
        families.sizes(wrap(tiny("qwen2")))


def test_a_model_with_adapters_is_refused_at_once(tiny):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("qwen2"), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="merge_and_unload"):
        families.sizes(model)


def test_a_network_that_is_not_of_transformers_is_refused():
    with pytest.raises(ValueError, match="no model of transformers"):
        structure.find(torch.nn.Linear(2, 2))


def test_weights_that_are_not_at_hand_are_not_cut_without_a_trial():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(toy("glm").config)
    assert families.sizes(model).heads == 4  # sizes are known from shapes alone
    with pytest.raises(ValueError, match="not available"):
        surgery.remove(model, plan_of(model, "whole_groups"))
    pairs = toy("diffllama").config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(pairs)
    assert families.sizes(model).heads == 4  # of 8 in the config


def test_without_weights_the_same_reason_is_given(model_of):
    """``inspect`` reads the config alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_of("olmo2").config)
    assert possible_cuts.removable(model) == possible_cuts.removable(model_of("olmo2"))


def test_a_toy_network_has_no_parameter_at_zero(tiny):
    for model in (toy("gpt2"), build(families.tiny("llama"))):
        assert all((p != 0).all() for p in model.parameters())


def test_heads_that_only_one_manner_of_cutting_removes_exactly(model_of, random_importance, tmp_path):
    model = model_of("doge")  # a value decides on what all heads attend to, so its group has to stay
    scores = random_importance(model)
    with pytest.raises(ValueError, match="grouped_query='whole_groups'.*use grouped_query='equal_queries'"):
        choose(scores, model, removed_fraction=0.3, heads_removed=2)
    with pytest.raises(ValueError, match="use grouped_query='equal_queries'"):
        surgery.remove(model, plan_of(model, "whole_groups"))
    plan = choose(scores, model, removed_fraction=0.3, heads_removed=2, grouped_query="equal_queries")
    pruned = surgery.remove(model, plan)
    torch.testing.assert_close(logits(pruned), logits(masked(model, plan)), rtol=1e-9, atol=1e-9)
    assert_reloads(pruned, tmp_path)


def test_a_count_that_the_config_lists_for_every_block_follows(random_importance, tmp_path):
    model = toy("laguna")
    plan = choose(random_importance(model), model, removed_fraction=0.15, scope="heads", heads_removed=2)
    pruned = surgery.remove(model, plan)
    assert pruned.config.num_attention_heads_per_layer == [2, 2]
    assert_reloads(pruned, tmp_path)


def test_a_cut_is_tried_in_a_block_of_every_kind(model_of):
    model = model_of("gemma3n_text")  # its first block cuts off all but the largest neurons, its second does not
    assert "removing does not equal masking" in families.family_of(model).refused["neurons"]


def test_blocks_that_have_to_stay_are_named_before_a_ranking_and_by_inspect():
    model = toy("diffllama")
    first, last = families.residual_blocks(model)
    assert not first.removable and "lambda_init" in first.reason and last.removable
    assert possible_cuts.removable(model)["blocks"].startswith(possible_cuts.SOME_BLOCKS)
    with pytest.raises(ValueError, match="2 rounds of 1 blocks; 1 blocks can be removed"):
        consensus.prune(model, lambda _: pytest.fail("ranked"), rounds=2, min_blocks=1)
