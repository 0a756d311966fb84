"""Processor time counts work and not waiting, and leaves the network as it was."""

import time

import pytest
import torch
from conftest import image_network

from pruning_lib.evaluation import processor_time


class Waiting(torch.nn.Module):
    def forward(self, x):
        time.sleep(0.05)
        return x


def test_waiting_does_not_count_and_times_are_per_thousand_images():
    found = processor_time.inference_time(Waiting(), torch.zeros(10, 1, 2, 2), repetitions=3)
    assert found["infer_s"] < 0.02 * 100  # by the clock it would be 0.05 s for 10 images, 5 s for 1,000
    assert found["infer_low_s"] <= found["infer_s"] <= found["infer_high_s"] and found["repetitions"] == 3


def test_tuning_takes_longer_than_inference_and_changes_nothing():
    network = image_network("cifar_resnet", depth=8)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    pixels, labels = torch.rand(16, 3, 16, 16), torch.zeros(16, dtype=torch.long)
    infer = processor_time.inference_time(network, pixels)["infer_low_s"]
    assert processor_time.tuning_time(network, pixels, labels)["tune_low_s"] > infer
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_no_repetition_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        processor_time.inference_time(Waiting(), torch.zeros(1, 1, 2, 2), repetitions=0)
