"""Every form of images and labels gives the right number in every function, or a clear error."""

import pytest
import torch
from conftest import image_network
from torch import nn
from torch.nn.functional import one_hot

from pruning_lib.data import labelled_images
from pruning_lib.evaluation import attacks, quality, spurious_cues
from pruning_lib.pruning import block_ranking, consensus
from pruning_lib.training import sgd

N, CLASSES = 24, 4
PIXELS = torch.rand(N, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N) % CLASSES


@pytest.fixture(scope="module")
def network():
    return image_network("cifar_resnet", depth=14, classes=CLASSES)


def accuracy(network, images, labels):
    return quality.accuracy(network, images, labels)[0]["accuracy_fraction"]


def robust(network, images, labels):
    return attacks.robust_correct("fgsm", network, images, labels, epsilons=[1 / 255])[0].tolist()


def fgsm(network, images, labels):
    return attacks.ATTACKS["fgsm"](network, images, labels, epsilon=1 / 255).sum().item()


def correct(network, images, labels):
    return attacks.correct_mask(network, images, labels).tolist()


def scores(network, images, labels):
    return consensus.scores(network, images, labels, metrics=["cka", "gaussian_2"], progress=False).to_numpy().tolist()


def loss_order(network, images, labels):
    return block_ranking.rank_blocks(network, images, labels, criterion="loss")


def trained(network, images, labels):
    import copy

    tuned = sgd.train(copy.deepcopy(network), images, labels, epochs=0.5, seed=0, images_per_batch=8, dtype="float32",
                      progress=False)
    return tuned.linear.weight.sum().item()


def cued(network, images, labels):
    return spurious_cues.inject_cue((images * 255).byte(), labels, cue="patch", agreement=0.7, seed=0,
                                    classes=CLASSES).sum().item()


# every function that takes labels
TAKE_LABELS = [accuracy, robust, fgsm, correct, scores, loss_order, trained, cued]
# every function that takes images for a network
TAKE_IMAGES = [accuracy, correct, scores, loss_order, trained]
FORMS = {"column": lambda y: y[:, None], "one-hot": one_hot, "floats": lambda y: y.float(), "int32": lambda y: y.int(),
         "column of floats": lambda y: y[:, None].double(), "list": lambda y: y.tolist()}


@pytest.mark.parametrize("act", TAKE_LABELS)
def test_labels_of_every_form_give_the_right_number(act, network):
    expected = act(network, PIXELS, LABELS)
    for form in FORMS.values():
        assert act(network, PIXELS, form(LABELS)) == expected


BAD_LABELS = {
    "probabilities": (torch.full((N, CLASSES), 0.25), "not one-hot"), "fractions": (LABELS + 0.5, "with fractions"),
    "too few": (LABELS[:-1], f"{N} images and {N - 1} labels|{N} integers"),
    "another shape": (torch.zeros(N, 2, 2), "labels have shape"),
}


@pytest.mark.parametrize("bad", BAD_LABELS)
@pytest.mark.parametrize("act", TAKE_LABELS)
def test_labels_that_are_no_classes_are_refused(act, bad, network):
    labels, message = BAD_LABELS[bad]
    with pytest.raises(ValueError, match=message):
        act(network, PIXELS, labels)


@pytest.mark.parametrize("act", [accuracy, robust, correct, loss_order, trained, cued])
def test_a_class_that_the_network_does_not_have_is_refused(act, network):
    for labels in (LABELS + 1, LABELS - 1):
        with pytest.raises(ValueError, match="label 4, but the network|label -1; classes|labels from|labels below"):
            act(network, PIXELS, labels)


@pytest.mark.parametrize("act", TAKE_IMAGES)
def test_uint8_pixels_are_those_in_0_to_1(act, network):
    whole = (PIXELS * 255).byte()
    assert act(network, whole, LABELS) == act(network, whole / 255, LABELS)


BAD_IMAGES = {
    "0 to 255": (PIXELS * 255, "from .* to 25.*divide by 255"), "normalised": (PIXELS * 4 - 2, r"floats in \[0, 1\]"),
    "two channels": (PIXELS[:, :2], "images have 2 channels.*takes 3"),
    "channels last": (PIXELS.permute(0, 2, 3, 1), "takes 3; try images.permute"),
    "flat": (PIXELS.flatten(1), "give a tensor"), "integers": ((PIXELS * 255).long(), "give uint8, or floats"),
    "NaN": (PIXELS * torch.nan, "NaN"),
}


@pytest.mark.parametrize("bad", BAD_IMAGES)
@pytest.mark.parametrize("act", TAKE_IMAGES)
def test_images_that_the_network_does_not_take_are_refused(act, bad, network):
    images, message = BAD_IMAGES[bad]
    with pytest.raises(ValueError, match=message):
        act(network, images, LABELS)


@pytest.mark.parametrize("act", TAKE_IMAGES)
def test_grey_images_are_spread_over_the_channels_of_a_network_that_normalises(act, network):
    grey = PIXELS[:, :1]
    if hasattr(network, "normalise"):
        assert act(network, grey, LABELS) == act(network, grey.expand(-1, 3, -1, -1), LABELS)
    else:
        with pytest.raises(ValueError, match="images have 1 channels.*takes 3; try images.expand"):
            act(network, grey, LABELS)


def test_two_classes_and_one_output_are_told_apart():
    class One(nn.Module):
        def __init__(self, outputs):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, outputs)

        def forward(self, x):
            return self.linear(self.conv(x).mean((2, 3)))

    two = One(2).eval()
    with torch.no_grad():
        expected = (two(PIXELS).argmax(1) == LABELS % 2).float().mean().item()
    assert accuracy(two, PIXELS, (LABELS % 2)[:, None]) == pytest.approx(expected)
    for act in (accuracy, correct, trained):
        with pytest.raises(ValueError, match="one number per image; give it one output per class"):
            act(One(1).eval(), PIXELS, LABELS % 2)


def test_uint8_pixels_of_a_network_that_expects_normalised_ones_are_refused_until_it_normalises():
    import torchvision

    from pruning_lib.models import image_networks

    network = torchvision.models.resnet18(num_classes=CLASSES).eval()
    whole = (torch.rand(4, 3, 64, 64) * 255).byte()
    with pytest.raises(ValueError, match=r"expects normalised floats.*describe\(network, mean"):
        correct(network, whole, LABELS[:4])
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)
    with torch.no_grad():
        expected = network((whole / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
        image_networks.describe(network, mean=mean, std=std)
        torch.testing.assert_close(network(whole / 255), expected)
    assert correct(network, whole, expected.argmax(1)) == [True] * 4


@pytest.mark.parametrize(("inputs", "labels", "message"), [
    ((PIXELS, LABELS), LABELS, "labels are given twice"), ([(PIXELS, LABELS)], LABELS, "labels are given twice"),
    ([PIXELS], None, "labels are missing"), ({"x": PIXELS}, None, "inputs are a dict"), ([3], None, "a batch is a int"),
    ([PIXELS[0]], None, "for single images"), ([(PIXELS, LABELS[:-1])], None, "a batch of 24 images and 23 labels"),
    ([PIXELS], LABELS[:-1], "24 images and 23 labels|a batch of 24 images and 23"), ([], None, "labels are missing"),
])
def test_inputs_that_do_not_fit_are_refused(inputs, labels, message):
    with pytest.raises(ValueError, match=message):
        labelled_images.whole(inputs, labels)
