"""Noise and the choice of tokens: the distribution is the filtered one, and noise belongs to (seed, position) alone."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mm_prm.policies.sampling import choose_tokens, uniform_noise


class TestNoise:
    def test_it_is_a_function_of_seed_and_position(self):
        noise = uniform_noise([5, 2**63 - 1, 0, -3], 7)
        assert torch.equal(noise[1], uniform_noise([2**63 - 1], 9)[0, :7])
        assert torch.equal(noise[3], uniform_noise([2**64 - 3], 7)[0])
        assert len(set(noise.flatten().tolist())) == noise.numel()

    def test_neighbouring_seeds_and_positions_are_uniform_and_independent(self):
        noise = uniform_noise(range(2000), 50).double()
        assert noise.min() >= 0
        assert noise.max() < 1
        assert noise.mean().item() == pytest.approx(0.5, abs=0.005)
        histogram = torch.histc(noise, bins=20, min=0, max=1) / noise.numel()
        assert (histogram - 0.05).abs().max() < 0.005
        centred = noise - 0.5
        for shifted in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
            assert abs(shifted.mean().item() * 12) < 0.02


class TestChoice:
    @pytest.mark.parametrize(
        ("temperature", "top_k", "top_p"),
        [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.8), (1.3, 5, 0.7), (1.0, 100, 0.9), (1.0, 1, 1.0)],
    )
    def test_the_distribution_is_that_of_transformers(self, temperature, top_k, top_p):
        torch.manual_seed(0)
        logits = torch.randn(8) * 2
        scores = TemperatureLogitsWarper(temperature)(None, logits[None])
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        expected = scores.softmax(-1)[0]
        rows = 20001
        noise = (torch.arange(rows) + 0.5) / rows  # every quantile once: frequencies are probabilities
        tokens, logprobs = choose_tokens(logits.expand(rows, -1), noise, temperature, top_k, top_p)
        frequencies = torch.bincount(tokens, minlength=8) / rows
        assert (frequencies - expected).abs().max() < 2e-4
        assert torch.allclose(logprobs, logits.log_softmax(-1)[tokens], atol=1e-5)

    def test_temperature_zero_takes_the_most_probable(self):
        logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
        tokens, logprobs = choose_tokens(logits, torch.tensor([0.99, 0.0]), 0, 50, 0.9)
        assert tokens.tolist() == [1, 0]
        assert torch.allclose(logprobs, logits.log_softmax(-1).max(-1).values)

    def test_extreme_noise_stays_inside_the_filter(self):
        logits = torch.tensor([[5.0, 4.0, -20.0, -30.0]]).expand(2, -1)
        tokens, _ = choose_tokens(logits, torch.tensor([0.0, 1 - 2**-24]), 1.0, 2, 1.0)
        assert tokens.tolist() == [0, 1]
        tokens, _ = choose_tokens(logits.bfloat16(), torch.tensor([0.0, 1 - 2**-24]), 1.0, 0, 0.999)
        assert tokens.tolist() == [0, 1]
