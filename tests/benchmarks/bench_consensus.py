"""Speed of scoring all blocks of ResNet-56 with all eight metrics, in one run with the plain procedure.

ours    the library: the layers before a block are computed once, and all metrics use the same features
plain   a full pass over the images for every block and every metric, with the block skipped, then the metric

The features of both are compared bit for bit.  The plain procedure is slow; ``--sample`` measures it on that many
evenly spread blocks and scales its time up.  Times are processor seconds of one thread.  The floor of the passes is the
number of their multiply-adds divided by the measured peak for products of matrices; the largest ratio to the plain
procedure is stated that any order of the same multiply-adds could reach if all metrics were free.
"""

from __future__ import annotations

import argparse
import time

import torch

from pruning_lib.evaluation import cost
from pruning_lib.models import families, image_networks
from pruning_lib.models.hooks import skip_block
from pruning_lib.pruning import consensus, similarity


def setting(per_class):
    """Return a ResNet-56 with random weights, and random images; speed does not depend on their content."""
    network = image_networks.build(image_networks.ImageConfig("cifar_resnet", {"depth": 56}), seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(10 * per_class, 3, 32, 32, generator=generator)
    return network, pixels, torch.arange(10 * per_class) % 10


def features(network, pixels):
    with torch.inference_mode():
        return torch.cat([consensus.penultimate(network, batch) for batch in pixels.split(128)])


def plain(network, pixels, labels, names):
    """Return seconds, and the features without each block."""
    start, found = time.process_time(), []
    whole = features(network, pixels)
    for name in names:
        for metric in similarity.METRICS:
            with skip_block(network, name):
                without = features(network, pixels)
            similarity.METRICS[metric].distance(whole, without, labels)
        found.append(without)
    return time.process_time() - start, found


def main():
    from bench import multiply_adds, peak  # imports this module

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-class", type=int, default=256)
    parser.add_argument("--sample", type=int, default=3, help="blocks the plain procedure is measured on; 0: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    network, pixels, labels = setting(arguments.per_class)
    names = [block.name for block in families.residual_blocks(network) if block.removable]
    sampled = names[::max(1, len(names) // arguments.sample)] if arguments.sample else names

    for per_class in (arguments.per_class // 4, arguments.per_class // 2, arguments.per_class):
        few = torch.arange(10 * per_class)
        start = time.process_time()
        whole, without = consensus.representations(network, pixels[few], progress=False)
        passes = time.process_time() - start
        similarity.distances(whole, without, labels[few])
        ours = time.process_time() - start
        print(f"ours   {per_class:4} images per class: {ours:7.1f} s ({passes:.1f} s passes, "
              f"{ours - passes:.1f} s metrics)")
    floor = multiply_adds(lambda: consensus.representations(network, pixels[:2], progress=False))
    floor *= len(pixels) / 2 / peak(torch.float32)
    memory = cost.peak_bytes(lambda: consensus.representations(network, pixels, progress=False))
    seconds, found = plain(network, pixels, labels, sampled)
    scaled = seconds * len(names) / len(sampled)
    print(f"plain  {arguments.per_class:4} images per class: {scaled:7.1f} s ({seconds:.1f} s for {len(sampled)} of "
          f"{len(names)} blocks)")
    print(f"floor of the passes: {floor:.1f} s, they took {passes / floor:.2f} of it; whatever the order of the same "
          f"multiply-adds, not more than {scaled / floor:.1f} times faster")
    same = all(torch.equal(without[names.index(name)], one) for name, one in zip(sampled, found, strict=True))
    print(f"{scaled / ours:.1f} times faster; features {'identical' if same else 'DIFFER'}; "
          f"memory of the passes {'not measured' if memory is None else f'{memory / 1e6:.0f} MB'}; "
          f"one thread, torch {torch.__version__}")


if __name__ == "__main__":
    main()
