import math

import torch
from perplexity import perplexity

TOKENS = torch.tensor([3, 1, 2, 0, 2])


def test_a_model_that_knows_nothing_guesses_among_all_words():
    assert math.isclose(perplexity(torch.zeros(5, 50), TOKENS), 50, rel_tol=1e-5)


def test_a_model_that_knows_the_next_word_has_perplexity_one():
    logits = torch.zeros(5, 4)
    logits[torch.arange(4), TOKENS[1:]] = 50.0
    assert math.isclose(perplexity(logits, TOKENS), 1, rel_tol=1e-5)


def test_one_half_and_one_eighth():
    """Two predictions of probability 1/2 and 1/8: the geometric mean of 2 and 8 is 4."""
    probabilities = torch.tensor([[0.5, 0.5, 1e-9], [0.125, 0.875, 1e-9], [1 / 3, 1 / 3, 1 / 3]])
    assert math.isclose(perplexity(probabilities.log(), torch.tensor([2, 0, 0])), 4, rel_tol=1e-5)


def test_adding_a_number_to_all_logits_changes_nothing():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(5))
    assert math.isclose(perplexity(logits + 7, TOKENS), perplexity(logits, TOKENS), rel_tol=1e-4)


def test_the_last_logits_predict_nothing_here():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(6))
    other = logits.clone()
    other[-1] = 100 * torch.rand(9)
    assert math.isclose(perplexity(logits, TOKENS), perplexity(other, TOKENS), rel_tol=1e-6)
