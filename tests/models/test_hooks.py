"""Hooks record inputs and outputs without side effects; a skipped block returns its input and does not run."""

import pytest
import torch
from conftest import hooks_of, image_network, pixels

from pruning_lib.models import families
from pruning_lib.models.hooks import inputs_to, only_block, outputs_of, resume_after, skip_block

IDS = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def resnet8():
    return image_network("cifar_resnet", depth=8)


def test_what_enters_the_classifier_gives_the_logits(family, tiny, resnet8):
    for model, data in ((tiny(family), IDS), (resnet8, pixels())):
        seen, head = {}, families.classifier(model)
        with torch.no_grad(), inputs_to([head], seen.__setitem__):
            out = model(data)
        given = head(seen[0]) if model is resnet8 else families.logits(model, seen[0])
        assert torch.equal(given, getattr(out, "logits", out))
        assert not hooks_of(model)


def test_outputs_of_several_modules_come_with_their_numbers(resnet8):
    blocks, seen = [resnet8.get_submodule(b.name) for b in families.residual_blocks(resnet8)], {}
    with torch.no_grad(), outputs_of(blocks, seen.__setitem__):
        resnet8(pixels())
    assert {i: tuple(y.shape) for i, y in seen.items()} == {0: (3, 16, 32, 32), 1: (3, 32, 16, 16), 2: (3, 64, 8, 8)}
    assert not hooks_of(resnet8)
    with torch.no_grad():
        assert torch.equal(blocks[2](seen[1]), seen[2])


def test_hooks_go_when_what_is_inside_fails(resnet8):
    for catch in (inputs_to, outputs_of):
        with pytest.raises(ZeroDivisionError), catch([resnet8.conv1], lambda i, x: 1 / 0):
            resnet8(pixels())
        assert not hooks_of(resnet8)


def test_a_bypassed_block_does_not_run_and_others_do(family, tiny):
    """Skip a block whose weights are NaN: the logits show if it runs."""
    for model, name, data in ((tiny(family, n_blocks=3), "model.layers.1", IDS),
                              (image_network("cifar_resnet", depth=20), "layer2.1", pixels())):
        for parameter in model.get_submodule(name).parameters():
            parameter.data.fill_(torch.nan)
        with torch.no_grad():
            with skip_block(model, name):
                out = model(data)
            assert not getattr(out, "logits", out).isnan().any()
            out = model(data)
            assert getattr(out, "logits", out).isnan().all()


def test_bypasses_nest_in_any_order_and_leave_nothing_behind(resnet8):
    model = image_network("cifar_resnet", depth=20)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        dense = model(pixels())
        with skip_block(model, "layer1.0"):
            one = model(pixels())
            with skip_block(model, "layer3.2"):
                two = model(pixels())
                with skip_block(model, "layer1.0"):  # once more
                    assert torch.equal(model(pixels()), two)
                assert torch.equal(model(pixels()), two)
            assert torch.equal(model(pixels()), one)
        assert torch.equal(model(pixels()), dense)
    assert not torch.equal(one, dense) and not torch.equal(one, two)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    with pytest.raises(KeyError), skip_block(model, "layer1.0"):
        raise KeyError
    assert "forward" not in vars(model.layer1[0])


def test_a_forward_that_something_else_put_there_comes_back(resnet8):
    own = resnet8.layer1[0].forward
    resnet8.layer1[0].forward = own  # as accelerate does for models on several devices
    with skip_block(resnet8, "layer1.0"):
        pass
    assert vars(resnet8.layer1[0]).pop("forward") is own


@pytest.mark.parametrize("name", ["layer2.0", "layer1.1", "layer1", "conv1", ""])
def test_what_is_no_removable_block_is_refused(resnet8, name):
    message = f"{name!r} is not a removable block; removable: layer1.0$"
    for way in (skip_block(resnet8, name), resume_after(resnet8, name, pixels())):
        with pytest.raises(ValueError, match=message), way:
            pass


def test_behind_a_block_the_network_goes_on_with_what_it_is_handed(family, tiny):
    """Resume after blocks whose weights are NaN: the logits show if one of them runs."""
    for model, name, data in ((tiny(family, n_blocks=4), "model.layers.2", IDS),
                              (image_network("cifar_resnet", depth=20), "layer2.1", pixels())):
        seen, names = {}, [block.name for block in families.residual_blocks(model)]
        with torch.no_grad():
            with skip_block(model, name), inputs_to([model.get_submodule(name)], seen.__setitem__):
                expected = model(data)
            for block in names[:names.index(name) + 1]:
                for parameter in model.get_submodule(block).parameters():
                    parameter.data.fill_(torch.nan)
            with resume_after(model, name, seen[0]):
                found = model(data)
                with resume_after(model, name, 2 * seen[0]):
                    other = model(data)
                again = model(data)
        found, other, again, expected = (getattr(out, "logits", out) for out in (found, other, again, expected))
        assert torch.equal(found, expected) and torch.equal(again, expected) and not torch.equal(other, expected)
        with pytest.raises(KeyError), resume_after(model, name, seen[0]):
            raise KeyError
        assert not [module for module in model.modules() if "forward" in vars(module)]


def test_alone_a_block_gives_what_it_gives_in_the_whole_network_for_the_same_input(family, tiny):
    """Run one block while the weights of all others are NaN: the result shows if one of them runs."""
    model = tiny(family, n_blocks=3)
    names = [block.name for block in families.residual_blocks(model)]
    entered, left = {}, {}
    with torch.no_grad():
        modules = [model.get_submodule(name) for name in names]
        with inputs_to(modules, entered.__setitem__), outputs_of(modules, left.__setitem__):
            model(IDS)
        for i in (0, 2):
            again, other = {}, tiny(family, n_blocks=3)
            for name in set(names) - {names[i]}:
                for parameter in other.get_submodule(name).parameters():
                    parameter.data.fill_(torch.nan)
            with outputs_of([other.get_submodule(names[i])], again.__setitem__):
                with only_block(other, names[i], entered[i] if i else None):
                    other(IDS)
            assert torch.equal(again[0], left[i])
            assert not hooks_of(other) and not [m for m in other.modules() if "forward" in vars(m)]
    with pytest.raises(ValueError, match="not a removable block"), only_block(model, "model.norm", None):
        pass
