"""Statistics equal those of the images, training is determined by its seed, augmentation only shifts and flips."""

import copy
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import image_network, pixels
from torch import nn
from transformers import AutoModelForCausalLM

from pruning_lib.evaluation import quality
from pruning_lib.models import families
from pruning_lib.training.sgd import recalibrate_batchnorm, shifted_and_flipped, train


def images(n=12, size=8, *, seed=0):
    """Return uint8 pixels whose two channels differ in brightness."""
    noise = torch.rand(n, 2, size, size, generator=torch.Generator().manual_seed(seed))
    return (noise * torch.tensor([255, 90]).view(2, 1, 1)).byte()


def small_network(*, seed=0, dropout=0.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Dropout(dropout), nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                             nn.Linear(4 * 36, 2))


class Numbered(nn.Module):
    """Network that records the images it receives, by the number in their first pixel."""

    def __init__(self, classes=2):
        super().__init__()
        self.linear, self.batches = nn.Linear(1, classes), []

    def forward(self, x):
        self.batches.append((x[:, 0, 0, 0] * 255).round().long().tolist())
        return self.linear(x.flatten(1)[:, :1])


def numbered(n):
    return torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 8, 8).clone()


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a, b):
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# --- batch norms ------------------------------------------------------------------------------------------------------


def test_statistics_are_the_mean_over_all_batches_and_nothing_else_changes():
    """Compare three batches of four with means and (unbiased) variances of the norm's inputs, without dropout."""
    model = small_network(dropout=0.5)
    before = weights(model)
    model[2].running_mean.fill_(7)
    recalibrate_batchnorm(model, images(), images_per_batch=4)
    entering = F.conv2d(images() / 255, model[1].weight, model[1].bias)  # (12, 4, 6, 6)
    batches = entering.transpose(0, 1).reshape(4, 3, -1)
    torch.testing.assert_close(model[2].running_mean, batches.mean((1, 2)))
    torch.testing.assert_close(model[2].running_var, batches.var(2).mean(1))
    assert model[2].num_batches_tracked == 3 and same(weights(model), before)


def test_every_norm_measures_behind_norms_that_use_their_batch():
    """Compare with a run in training mode that averages the inputs of each norm."""
    model, data = image_network("cifar_resnet", depth=14), torch.cat([pixels(8), pixels(8).flip(0) ** 2])
    slow, given = copy.deepcopy(model).train(), {}
    for name, norm in slow.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_forward_pre_hook(lambda _, args, name=name: given.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for batch in data.split(2):
            slow(batch)
    recalibrate_batchnorm(model, data, images_per_batch=2)
    assert len(given) == 13
    for name, batches in given.items():
        norm = model.get_submodule(name)
        mean = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
        var = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in batches]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-4, atol=1e-6)


def test_bytes_and_floats_give_the_same_statistics_and_a_last_image_alone_is_left_out():
    ours, theirs = small_network(), small_network()
    recalibrate_batchnorm(ours, images(13), images_per_batch=4)
    recalibrate_batchnorm(theirs, images(13)[:12].float() / 255, images_per_batch=4)
    assert same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("fails", [False, True])
def test_momenta_and_modes_come_back(fails):
    model = small_network().train()
    model[2].momentum = 0.3
    model[0].eval()
    before = modes(model)
    if fails:
        with pytest.raises(ValueError, match="images have 1 channels"):
            recalibrate_batchnorm(model, images()[:, :1])
    else:
        assert recalibrate_batchnorm(model, images()) is model
    assert model[2].momentum == 0.3 and modes(model) == before


@pytest.mark.parametrize(("n", "images_per_batch"), [(0, 4), (1, 4), (12, 1)])
def test_too_few_images_for_a_variance_are_refused_and_the_statistics_stay(n, images_per_batch):
    model = small_network()
    model[2].running_mean.fill_(7)
    with pytest.raises(ValueError, match="at least 2 images"):
        recalibrate_batchnorm(model, images(n), images_per_batch=images_per_batch)
    assert (model[2].running_mean == 7).all()


def test_a_network_without_batch_norms_has_nothing_to_measure():
    with pytest.raises(ValueError, match="this Linear has no batch norm"):
        recalibrate_batchnorm(nn.Linear(2, 2), images())


def test_images_go_to_where_the_network_is():
    """Use the meta device in place of a GPU; only the counter of batches is read, so it is kept."""
    model = small_network().to("meta")
    model[2].num_batches_tracked = torch.tensor(0)
    recalibrate_batchnorm(model, images())
    assert model[2].num_batches_tracked == 1


# --- training ---------------------------------------------------------------------------------------------------------


def test_what_is_easily_told_apart_is_learnt():
    """Classify the bright half of unseen images."""
    labels = torch.arange(64) % 2
    data = images(128, seed=1) // 2
    for label, rows in ((0, slice(0, 4)), (1, slice(4, 8))):
        data[torch.arange(128) % 2 == label, :, rows] += 60
    model, options = small_network(), {"seed": 0, "lr": 0.05, "images_per_batch": 16, "progress": False}
    first, _ = quality.accuracy(model, data[64:], labels)
    assert train(model, data[:64], labels, epochs=6, dtype="float32", **options) is model
    found, _ = quality.accuracy(model, data[64:], labels)
    assert found["accuracy_fraction"] > 0.95 > 0.8 > first["accuracy_fraction"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_seed_decides_alone_and_the_global_generator_is_left_alone(dtype):
    """Vary the seed of order, shifts, flips and dropout."""
    def trained(seed, around):
        torch.manual_seed(around)
        state, model = torch.get_rng_state(), small_network(dropout=0.5)
        train(model, images(), torch.arange(12) % 2, epochs=2, seed=seed, images_per_batch=4, dtype=dtype)
        assert torch.equal(torch.get_rng_state(), state)
        return weights(model)

    with torch.random.fork_rng(devices=[]):
        first, again, other = trained(3, 11), trained(3, 12), trained(4, 11)
    assert same(first, again) and not same(first, other)


def test_bytes_and_floats_train_alike():
    found = []
    for data in (images(), images().float() / 255):
        before, model = data.clone(), small_network()
        train(model, data, torch.arange(12) % 2, epochs=2, seed=0, images_per_batch=4)
        assert torch.equal(data, before)
        found.append(weights(model))
    assert same(*found) and not same(found[0], weights(small_network()))


def test_multiplications_are_in_the_dtype_asked_for_and_weights_in_their_own():
    model, seen = small_network(), []
    model[1].register_forward_hook(lambda _, args, y: seen.append(y.dtype))
    for dtype in ("float32", "bfloat16"):
        train(model, images(), torch.arange(12) % 2, epochs=1, seed=0, images_per_batch=12, dtype=dtype)
    assert seen == [torch.float32, torch.bfloat16] and {p.dtype for p in model.parameters()} == {torch.float32}


def test_steps_are_those_of_sgd_with_nesterov_momentum_along_a_cosine():
    """Compare with three explicit steps, with all images in every batch."""
    model, data, labels = nn.Sequential(nn.Flatten(), nn.Linear(2 * 9, 2)).double(), images(4, 3) / 255.0, [0, 1, 1, 0]
    data, labels = data.double(), torch.tensor(labels)
    w, b = (p.detach().clone().requires_grad_() for p in model[1].parameters())
    speed = [torch.zeros_like(w), torch.zeros_like(b)]
    for step in range(3):
        loss = F.cross_entropy((data.flatten(1) @ w.T + b).float(), labels)
        for p, v, g in zip((w, b), speed, torch.autograd.grad(loss, (w, b)), strict=True):
            g = g + 0.01 * p.detach()
            v.mul_(0.8).add_(g)
            p.data -= 0.1 * (1 + math.cos(math.pi * step / 3)) / 2 * (g + 0.8 * v)
    train(model, data, labels, epochs=3, seed=0, lr=0.1, momentum=0.8, weight_decay=0.01, augment=False,
          dtype="float32", images_per_batch=4)
    for found, expected in zip(model[1].parameters(), (w, b), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("epochs", "n", "images_per_batch", "steps"), [
    (1, 40, 10, 4), (0.5, 40, 10, 2), (2.25, 40, 10, 9), (2, 25, 10, 5), (3, 5, 10, 3), (0, 40, 10, 0)])
def test_epochs_are_passes_over_the_images_and_may_be_fractions(epochs, n, images_per_batch, steps):
    model = Numbered()
    train(model, numbered(n), torch.arange(n) % 2, epochs=epochs, seed=0, images_per_batch=images_per_batch,
          augment=False, dtype="float32")
    assert [len(batch) for batch in model.batches] == [min(n, images_per_batch)] * steps


def test_every_image_comes_once_per_epoch_in_another_order_each_time_with_its_own_label(monkeypatch):
    seen, model = [], Numbered(classes=40)
    true_loss = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda scores, labels: (seen.extend(labels.tolist()),
                                                                    true_loss(scores, labels))[1])
    train(model, numbered(40), torch.arange(40), epochs=2, seed=0, images_per_batch=10, augment=False, dtype="float32")
    order = sum(model.batches, [])
    assert order == seen and sorted(order[:40]) == sorted(order[40:]) == list(range(40)) and order[:40] != order[40:]


@pytest.mark.parametrize(("change", "message"), [
    ({"labels": torch.zeros(11, dtype=torch.long)}, "12 images and 11 labels"),
    ({"images": images(0), "labels": torch.zeros(0, dtype=torch.long)}, "0 images and 0 labels"),
    ({"dtype": "float16"}, "dtype='float16'; allowed: float32, bfloat16"),
    ({"lr": 1e30}, r"the loss is (nan|inf) after 3 steps; try a learning rate below 1e\+30"),
    ({"images": images().float() * math.nan}, "pixels hold NaN")])
def test_what_cannot_be_learnt_is_refused(change, message):
    asked = {"images": images(), "labels": torch.arange(12) % 2, "epochs": 1, "seed": 0, "images_per_batch": 4}
    model = small_network()
    with pytest.raises(ValueError, match=message):
        train(model, **{**asked, **change})
    assert model.training


def test_a_language_model_is_not_trained_on_images():
    model = AutoModelForCausalLM.from_config(families.tiny("llama"))
    with pytest.raises(ValueError, match="LlamaForCausalLM is a language model.*lora.tune"):
        train(model, images(), torch.arange(12) % 2, epochs=1, seed=0)


@pytest.mark.parametrize("fails", [False, True])
def test_every_part_is_in_training_mode_while_training_and_afterwards_in_its_own(fails):
    model, seen = small_network(dropout=0.5).eval(), []
    model[3].train()
    before = modes(model)
    model[3].register_forward_hook(lambda *_: seen.append(modes(model)))
    labels = torch.arange(12) % 2 + 9 * fails
    if fails:
        with pytest.raises(ValueError, match="label 10, but the network tells 2 classes apart"):
            train(model, images(), labels, epochs=1, seed=0)
    else:
        train(model, images(), labels, epochs=1, seed=0)
    assert seen and all(all(found.values()) for found in seen) and modes(model) == before


# --- augmentation -----------------------------------------------------------------------------------------------------


def test_an_image_is_moved_by_up_to_an_eighth_of_its_width_and_flipped_and_nothing_else():
    """Encode row and column in every pixel: all 25 shifts occur, flipped or not, padded black."""
    height, width, n = 12, 16, 1000
    rows, columns = torch.meshgrid(torch.arange(1, height + 1), torch.arange(1, width + 1), indexing="ij")
    image = torch.stack([rows, columns]).byte()
    moved = {}
    for down, right, flip in product(range(-2, 3), range(-2, 3), (False, True)):
        expected = torch.zeros_like(image)
        for r, c in product(range(height), range(width)):
            if 0 <= r + down < height and 0 <= c + right < width:
                expected[:, r + down, c + right] = image[:, r, c]
        expected = expected.flip(2) if flip else expected
        moved[expected.numpy().tobytes()] = (down, right, flip)
    batch = image.expand(n, 2, height, width)
    found = shifted_and_flipped(batch, torch.Generator().manual_seed(0))
    assert found.shape == batch.shape and found.dtype == torch.uint8
    how = [moved[one.contiguous().numpy().tobytes()] for one in found]
    assert set(how) == set(moved.values()) and len(moved) == 50
    assert 0.45 < sum(flip for *_, flip in how) / n < 0.55


def test_images_of_a_batch_stay_themselves_and_the_generator_decides():
    data = images(6).float() + 1000 * torch.arange(6).view(6, 1, 1, 1)
    first, again, other = (shifted_and_flipped(data, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert [int(one.max()) // 1000 for one in first] == list(range(6))


def test_augmentation_can_be_left_out():
    data = numbered(12)
    for augment in (True, False):
        model = Numbered()
        train(model, data, torch.arange(12) % 2, epochs=3, seed=0, images_per_batch=4, augment=augment)
        assert (sorted(sum(model.batches, [])) == sorted([*range(12)] * 3)) is not augment
