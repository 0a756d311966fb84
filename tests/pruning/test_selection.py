"""A plan reaches the requested fraction, removes the least important units first, and is equal across blocks."""

import math
import re

import pytest
import torch

from pruning_lib.models import families, surgery
from pruning_lib.models.plan import GROUPED, Plan
from pruning_lib.pruning.selection import RULES, SCOPES, Importance, choose

SHAPES = [(4, 4), (6, 3), (6, 2), (4, 1)]  # heads, groups


def count(model):
    return sum(p.numel() for p in model.parameters())


def reachable(error):
    """Return the ranges (or points) in an error message: [(low, high), ...]."""
    stated = re.search(r"reachable: (.*?) \(", str(error)).group(1)
    return [tuple(map(float, (part.split(" to ") * 2)[:2])) for part in stated.split(", ")]


# --- how much ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("heads", "groups", "cut"), [
    (heads, groups, cut) for heads, groups in SHAPES for cut in GROUPED if cut == "whole_groups" or heads > groups])
def test_the_fraction_is_of_all_parameters_and_within_one_neuron_per_block(
        family, tiny, random_importance, scope, cut, heads, groups):
    model = tiny(family, heads=heads, groups=groups, neurons=40)
    importance, s = random_importance(model), families.sizes(model)
    unit = {"whole_groups": heads // groups, "equal_queries": groups}[cut]
    per_unit = unit * s.head_parameters + (cut == "whole_groups") * s.group_parameters
    units = {"whole_groups": groups, "equal_queries": heads // groups}[cut]
    reached, counts, whole = 0, {}, count(model)
    for fraction in [0.0, *torch.linspace(0.003, 0.7, 23).tolist()]:
        try:
            plan = choose(importance, model, removed_fraction=fraction, scope=scope, grouped_query=cut)
        except ValueError as error:
            step = s.blocks * (per_unit if scope == "heads" else s.neuron_parameters) / s.parameters
            assert all(not low <= fraction <= high for low, high in reachable(error)), error
            if scope == "heads":  # steps: refused only below the first half step, or half a step beyond the last
                last = (units - 1) * step
                assert 0 < fraction < step / 2 + 1e-9 or fraction > last + step / 2 - 1e-9
            continue
        reached += 1
        kept = plan.kept["heads"], plan.kept["neurons"]  # with the same numbers the same parameters are left
        left = counts[kept] = counts.get(kept) or count(surgery.remove(model, plan))
        assert plan.removed_parameters == whole - left and plan.removed_fraction == (whole - left) / whole
        off = abs(plan.removed_fraction - fraction) * s.parameters / s.blocks
        assert off <= (per_unit / 2 if scope == "heads" else s.neuron_parameters) * (1 + 1e-9)
        assert (plan.kept["heads"] == heads) or scope != "neurons"
        assert (plan.kept["neurons"] == 40) or scope != "heads"
    assert reached >= (1 if scope == "heads" else 4)


def test_heads_and_neurons_lose_the_same_share(tiny, random_importance):
    model = tiny("llama", heads=8, groups=8, neurons=160)
    plan = choose(random_importance(model), model, removed_fraction=0.3, heads_removed="same_share")
    assert abs((8 - plan.kept["heads"]) / 8 - (160 - plan.kept["neurons"]) / 160) < 1 / 8


def test_one_query_per_group_cannot_be_cut_evenly_and_the_refusal_says_what_can(tiny, random_importance):
    model = tiny("mistral", heads=4, groups=4)
    with pytest.raises(ValueError, match="grouped_query='whole_groups'"):
        choose(random_importance(model), model, removed_fraction=0.2, grouped_query="equal_queries",
               heads_removed="same_share")
    assert choose(random_importance(model), model, removed_fraction=0.2, grouped_query="equal_queries", scope="neurons")


@pytest.mark.parametrize(("scope", "cut", "heads_removed"), [
    ("heads_and_neurons", "whole_groups", None), ("heads_and_neurons", "equal_queries", None),
    ("neurons", "whole_groups", None), ("heads", "whole_groups", None), ("heads", "equal_queries", None),
    ("heads_and_neurons", "whole_groups", 4)])
@pytest.mark.parametrize("neurons", [2, 24])  # with two neurons there are gaps between the units of attention
def test_a_refused_fraction_is_told_the_range_that_can_be_reached_and_its_ends_can(
        tiny, random_importance, scope, cut, heads_removed, neurons):
    model = tiny("llama", heads=6, groups=3, neurons=neurons)
    importance, arguments = random_importance(model), {"scope": scope, "grouped_query": cut,
                                                       "heads_removed": heads_removed}
    with pytest.raises(ValueError, match=r"0\.97 cannot be reached") as refused:
        choose(importance, model, removed_fraction=0.97, **arguments)
    for low, high in reachable(refused.value):
        for fraction in (low, (low + high) / 2, high):
            choose(importance, model, removed_fraction=fraction, **arguments)
    beyond = max(high for _, high in reachable(refused.value))
    s = families.sizes(model)
    one_more = s.blocks * (s.group_parameters + 2 * s.head_parameters if scope == "heads" else s.neuron_parameters)
    with pytest.raises(ValueError, match="cannot be reached"):
        choose(importance, model, removed_fraction=beyond + one_more / s.parameters, **arguments)


def test_the_stated_range_can_be_reached_at_seven_billion_parameters_too(llama2_7b, random_importance):
    """State the ends with enough digits: one neuron per block is 0.00006 of the model."""
    importance = random_importance(llama2_7b)
    for heads_removed in range(0, 32, 3):
        with pytest.raises(ValueError, match="reachable") as refused:
            choose(importance, llama2_7b, removed_fraction=0.97, heads_removed=heads_removed)
        for fraction in reachable(refused.value)[0]:
            choose(importance, llama2_7b, removed_fraction=fraction, heads_removed=heads_removed, multiple_of=1)


@pytest.mark.parametrize(("fraction", "heads", "neurons", "parameters"), [
    (0.30034, 22, 7568, 4_714_663_936), (0.21024, 25, 8600, 5_321_789_440)])
def test_at_the_papers_size_the_plan_is_the_published_network(
        llama2_7b, random_importance, fraction, heads, neurons, parameters):
    plan = choose(random_importance(llama2_7b), llama2_7b, removed_fraction=fraction, heads_removed="same_share",
                  multiple_of=1)
    assert plan.kept["heads"] == heads
    assert abs(plan.kept["neurons"] - neurons) <= 1
    assert abs(plan.sizes.parameters - plan.removed_parameters - parameters) <= 32 * 3 * 4096
    stated = plan.sizes.parameters - plan.removed_parameters
    surgery.remove(llama2_7b, plan, inplace=True)
    assert count(llama2_7b) == stated


def test_heads_can_be_fixed_and_the_neurons_take_up_the_rest(tiny, random_importance):
    model = tiny("mistral", heads=6, groups=3, neurons=60)
    plan = choose(random_importance(model), model, removed_fraction=0.25, heads_removed=2)
    assert plan.kept["heads"] == 4 and plan.kept["groups"] == 2
    assert abs(plan.removed_fraction - 0.25) <= plan.sizes.blocks * plan.sizes.neuron_parameters / plan.sizes.parameters
    for wrong, cut, allowed in ((1, "whole_groups", "[0, 2, 4]"), (2, "equal_queries", "[0, 3]"),
                                (6, "whole_groups", "[0, 2, 4]"), (-2, "whole_groups", "[0, 2, 4]")):
        with pytest.raises(ValueError, match=re.escape(f"allowed: {allowed}")):
            choose(random_importance(model), model, removed_fraction=0.25, heads_removed=wrong, grouped_query=cut)
    with pytest.raises(ValueError, match="scope='neurons'"):
        choose(random_importance(model), model, removed_fraction=0.2, heads_removed=2, scope="neurons")


@pytest.mark.parametrize("multiple_of", [1, 2, 7, 8, 40])
def test_the_neurons_kept_are_the_nearest_multiple_or_the_fraction_is_refused(tiny, random_importance, multiple_of):
    model = tiny("llama", heads=6, groups=3, neurons=40)
    importance = random_importance(model)
    multiples, refused = range(multiple_of, 41, multiple_of), 0
    for fraction in [0.0, *torch.linspace(0.01, 0.5, 30).tolist()]:
        exact = choose(importance, model, removed_fraction=fraction, heads_removed="same_share")
        wanted = exact.kept["neurons"]
        nearest = min(multiples, key=lambda m: (abs(m - wanted), m % (2 * multiple_of)))
        gone = exact.removed_parameters
        reached = gone + (wanted - nearest) * exact.sizes.neuron_parameters * exact.sizes.blocks
        unheard = wanted < 40 and not gone / 2 <= reached <= 2 * gone  # nothing at all, or another fraction
        if unheard or (wanted < 40 and abs(nearest - wanted) > multiple_of / 2):
            with pytest.raises(ValueError, match=f"multiple_of={multiple_of} is too coarse"):
                choose(importance, model, removed_fraction=fraction, multiple_of=multiple_of,
                       heads_removed="same_share")
            refused += 1
            continue
        plan = choose(importance, model, removed_fraction=fraction, multiple_of=multiple_of, heads_removed="same_share")
        assert torch.equal(plan.heads, exact.heads)
        kept = plan.kept["neurons"]
        assert kept == 40 if wanted == 40 else abs(kept - wanted) == abs(nearest - wanted)
        assert plan.removed_parameters == count(model) - count(surgery.remove(model, plan))
    assert (refused > 0) == (multiple_of > 1)


@pytest.mark.parametrize(("neurons", "fraction", "multiple_of", "said"), [
    (192, 0.02, 64, "192 neurons per block remove 0.0000, 128 neurons per block remove"),  # removed nothing, silently
    (200, 0.02, 128, "128 neurons per block remove")])  # removed a third of them
def test_a_multiple_too_coarse_for_the_fraction_names_those_it_reaches(tiny, random_importance, neurons, fraction,
                                                                       multiple_of, said):
    model = tiny("llama", neurons=neurons)
    with pytest.raises(ValueError, match=f"multiple_of={multiple_of} is too coarse.*{said}") as error:
        choose(random_importance(model), model, removed_fraction=fraction, multiple_of=multiple_of)
    reachable = float(str(error.value).split(" of all parameters")[0].rpartition(" ")[2])
    plan = choose(random_importance(model), model, removed_fraction=reachable, multiple_of=multiple_of)
    assert plan.kept["neurons"] == 128 and plan.removed_fraction == pytest.approx(reachable, abs=1e-4)


@pytest.mark.parametrize(("neurons", "kept"), [(192, 160), (200, 170)])
def test_without_a_multiple_blocks_of_32_stay_blocks_of_32_and_others_are_cut_to_the_neuron(tiny, random_importance,
                                                                                            neurons, kept):
    model = tiny("llama", neurons=neurons)
    s = families.sizes(model)
    fraction = s.blocks * 30 * s.neuron_parameters / s.parameters
    assert choose(random_importance(model), model, removed_fraction=fraction).kept["neurons"] == kept


@pytest.mark.parametrize("multiple_of", [0, -8, 41])
def test_a_multiple_that_no_number_of_neurons_can_be_is_refused(tiny, random_importance, multiple_of):
    model = tiny("llama", neurons=40)
    with pytest.raises(ValueError, match=f"multiple_of={multiple_of};.* 40 neurons.*8 or 64"):
        choose(random_importance(model), model, removed_fraction=0.1, multiple_of=multiple_of,
               heads_removed="same_share")


@pytest.mark.parametrize(("argument", "value", "allowed"), [
    ("removed_fraction", math.nan, "0 <= fraction < 1"), ("removed_fraction", -0.1, "0 <= fraction < 1"),
    ("removed_fraction", 1.0, "0 <= fraction < 1"), ("removed_fraction", 25, "0 <= fraction < 1"),
    ("scope", "mlp", ", ".join(SCOPES)), ("rule", "best", ", ".join(RULES)),
    ("grouped_query", "any", ", ".join(GROUPED))])
def test_a_wrong_argument_is_answered_with_what_was_given_and_what_is_allowed(
        tiny, random_importance, argument, value, allowed):
    model = tiny("llama")
    with pytest.raises(ValueError, match=f"{argument}=.*{re.escape(str(value))}.*{re.escape(allowed)}"):
        choose(random_importance(model), model, **{"removed_fraction": 0.1, argument: value})


# --- which ------------------------------------------------------------------------------------------------------------


def hand_made():
    """Return importances of two blocks with different orders: six heads in three groups, six neurons."""
    heads = torch.tensor([[1., 9., 4., 4., 0., 5.], [7., 0., 1., 1., 6., 6.]])
    neurons = torch.tensor([[3., 1., 2., 6., 5., 4.], [1., 2., 3., 4., 5., 6.]])
    return Importance(heads, neurons, {})


@pytest.mark.parametrize(("rule", "cut", "heads", "removed_heads", "neurons"), [
    ("lowest", "whole_groups", [[2], [1]], [[4, 5], [2, 3]], [[1, 2], [0, 1]]),
    ("highest", "whole_groups", [[0], [2]], [[0, 1], [4, 5]], [[3, 4], [4, 5]]),
    ("lowest", "equal_queries", [[[0], [0], [0]], [[1], [0], [0]]], [[0, 2, 4], [1, 2, 4]], [[1, 2], [0, 1]]),
    ("highest", "equal_queries", [[[1], [0], [1]], [[0], [0], [0]]], [[1, 2, 5], [0, 2, 4]], [[3, 4], [4, 5]])])
def test_each_block_loses_its_own_least_or_most_important_parts_and_ties_go_by_place(
        tiny, rule, cut, heads, removed_heads, neurons):
    model = tiny("llama", heads=6, groups=3, neurons=6)
    s, unit = families.sizes(model), {"whole_groups": 2, "equal_queries": 3}[cut]
    target = unit * s.head_parameters + (cut == "whole_groups") * s.group_parameters + 2 * s.neuron_parameters
    plan = choose(hand_made(), model, removed_fraction=s.blocks * target / s.parameters, rule=rule, grouped_query=cut,
                  heads_removed=unit)
    assert plan.heads.tolist() == heads
    assert plan.removed_heads.tolist() == removed_heads
    assert plan.neurons.tolist() == neurons


@pytest.mark.parametrize("rule", ["lowest", "highest"])
def test_when_all_scores_are_equal_the_first_places_go(tiny, rule):
    model = tiny("qwen3", heads=6, groups=6, neurons=30)
    equal = Importance(torch.ones(2, 6), torch.ones(2, 30), {})
    plan = choose(equal, model, removed_fraction=0.3, rule=rule, heads_removed="same_share")
    assert 0 < plan.heads.shape[1] < 6 and 0 < plan.neurons.shape[1] < 30
    assert (plan.heads == torch.arange(plan.heads.shape[1])).all()
    assert (plan.neurons == torch.arange(plan.neurons.shape[1])).all()


@pytest.mark.parametrize("cut", GROUPED)
def test_random_choices_repeat_with_their_seed_and_leave_the_global_generator_alone(tiny, random_importance, cut):
    model = tiny("mistral", heads=8, groups=4, neurons=60)
    state = torch.get_rng_state()
    first, same, other = (
        choose(random_importance(model, seed=importance_seed), model, removed_fraction=0.3, rule="random", seed=seed,
               grouped_query=cut, heads_removed="same_share") for importance_seed, seed in ((0, 3), (1, 3), (0, 4)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.heads, same.heads) and torch.equal(first.neurons, same.neurons)  # scores unused
    assert not torch.equal(first.neurons, other.neurons)
    assert not torch.equal(first.neurons[0], first.neurons[1])  # blocks draw their own


# --- what cannot be said ----------------------------------------------------------------------------------------------

NO_NEURONS = torch.zeros(2, 0, dtype=torch.long)


@pytest.mark.parametrize(("cut", "heads"), [
    ("whole_groups", [[0, 1, 2], [0, 1, 2]]),  # no group would be kept
    ("whole_groups", [[0, 0], [0, 1]]), ("whole_groups", [[1, 0], [0, 1]]), ("whole_groups", [[0], [3]]),
    ("whole_groups", [[-1], [0]]), ("whole_groups", [[0]]), ("whole_groups", [[[0]] * 3] * 2),
    ("whole_groups", [[0.0], [1.0]]), ("whole_groups", [[True], [False]]), ("whole_groups", 0),
    ("equal_queries", [[0, 2], [1, 3]]),  # query heads, not places within every group
    ("equal_queries", [[[0], [1]], [[0], [1]]]),  # a group is missing
    ("equal_queries", [[[0, 1]] * 3] * 2), ("equal_queries", [[[0], [2], [0]]] * 2), ("some", [[0], [0]])])
def test_a_malformed_or_unequal_cut_cannot_be_written_down(tiny, cut, heads):
    sizes = families.sizes(tiny("llama", heads=6, groups=3))
    with pytest.raises(ValueError, match=r"plan\.heads|grouped_query"):
        Plan(cut, torch.tensor(heads), NO_NEURONS, sizes)


@pytest.mark.parametrize("neurons", [[[0], [24]], [[1, 0], [0, 1]], [[0, 0], [0, 1]], [[0]], [list(range(24))] * 2])
def test_malformed_neurons_are_refused(tiny, neurons):
    sizes = families.sizes(tiny("llama", heads=6, groups=3, neurons=24))
    with pytest.raises(ValueError, match=r"plan\.neurons"):
        Plan("whole_groups", NO_NEURONS, torch.tensor(neurons), sizes)


def test_blocks_may_lose_different_heads_but_never_a_different_number(tiny):
    with pytest.raises(ValueError):  # rows of unequal length are no tensor at all
        torch.tensor([[0], [0, 1]])
    sizes = families.sizes(tiny("llama", heads=6, groups=3))
    plan = Plan("whole_groups", torch.tensor([[0], [2]]), NO_NEURONS, sizes)
    assert plan.removed_heads.tolist() == [[0, 1], [4, 5]] and plan.removed_groups.tolist() == [[0], [2]]


def test_a_plan_says_what_it_does(tiny, random_importance):
    model = tiny("llama", heads=6, groups=3, neurons=40)
    plan = choose(random_importance(model), model, removed_fraction=0.2, heads_removed="same_share")
    kept = plan.kept
    assert f"{plan.removed_fraction:.4%} of {count(model):,} parameters" in str(plan)
    assert f"{kept['heads']} of 6 heads, {kept['groups']} of 3 groups, {kept['neurons']} of 40 neurons" in str(plan)


# --- importances ------------------------------------------------------------------------------------------------------


def test_an_importance_survives_its_file(tmp_path, tiny, random_importance):
    importance = random_importance(tiny("llama"))
    path = tmp_path / "deep" / "scores.safetensors"
    importance.save(path)
    importance.save(path)  # again over the old one
    loaded = Importance.load(path)
    assert torch.equal(loaded.heads, importance.heads) and torch.equal(loaded.neurons, importance.neurons)
    assert loaded.made_with == importance.made_with
    assert [p.name for p in path.parent.iterdir()] == ["scores.safetensors"]


def test_a_file_that_holds_no_importance_is_refused_by_name(tmp_path, tiny, random_importance):
    from safetensors.torch import save_file

    good = tmp_path / "good"
    random_importance(tiny("llama")).save(good)
    wrong = {"cut_short": good.read_bytes()[:-10], "text": b"heads: 1, 2, 3", "empty": b""}
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
    save_file({"heads": torch.ones(2, 2)}, tmp_path / "no_metadata")
    save_file({"heads": torch.ones(2, 2)}, tmp_path / "half", metadata={"made_with": "{}"})
    save_file({"heads": torch.ones(2, 2), "neurons": torch.ones(2)}, tmp_path / "not_json", metadata={"made_with": "{"})
    for name in (*wrong, "no_metadata", "half", "not_json"):
        with pytest.raises(ValueError, match=f"{name} holds no importance"):
            Importance.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Importance.load(tmp_path / "missing")


@pytest.mark.parametrize("other", [{"heads": 6, "groups": 2}, {"neurons": 20}, {"n_blocks": 3}])
def test_the_importance_of_another_model_is_refused(tiny, random_importance, other):
    with pytest.raises(ValueError, match="measured on another model"):
        choose(random_importance(tiny("llama", **other)), tiny("llama"), removed_fraction=0.1)


@pytest.mark.parametrize("part", ["heads", "neurons"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_importance_that_is_not_finite_is_refused(tiny, random_importance, part, value):
    model = tiny("llama")
    importance = random_importance(model)
    getattr(importance, part)[1, 2] = value
    with pytest.raises(ValueError, match=f"{part} holds NaN or infinity"):
        choose(importance, model, removed_fraction=0.1, heads_removed="same_share")


@pytest.mark.parametrize(("neurons", "arguments", "message"), [
    (96, {"removed_fraction": 0.02, "multiple_of": 64}, "too coarse: 92 of 96.*64 neurons per block remove 0.1707")])
def test_a_multiple_that_removes_nothing_or_much_more_is_refused(tiny, random_importance, neurons, arguments, message):
    model = tiny("llama", heads=6, groups=3, neurons=neurons)
    with pytest.raises(ValueError, match=message):
        choose(random_importance(model), model, **arguments)


@pytest.mark.parametrize("removed_fraction", [0.1, 0.2, 0.3, 0.4])
@pytest.mark.parametrize("multiple_of", [None, 1, 8, 32])
def test_what_is_reached_is_between_half_and_twice_of_what_was_wanted(tiny, random_importance, removed_fraction,
                                                                     multiple_of):
    model = tiny("llama", heads=6, groups=3, neurons=192)
    plan = choose(random_importance(model), model, removed_fraction=removed_fraction, multiple_of=multiple_of)
    assert removed_fraction / 2 <= plan.removed_fraction <= 2 * removed_fraction
    assert plan.kept["neurons"] % (multiple_of or 32) == 0
