"""
FlexAttention's compiled kernels against SDPA. Needs a GPU:

python -m pytest -m gpu tests/models/test_packing_gpu.py --timeout 900
"""

import copy

import pytest
import torch
from transformers import Qwen2Config

from mm_prm.models import AutoModelForProcessReward, use_flex_attention

from .tiny_architectures import build_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def _trees(lengths: list[int], generator: torch.Generator, vocabulary: int) -> dict[str, torch.Tensor]:
    """Sequences of trees, padded to blocks: each a trunk of half its length, and two branches of a quarter."""
    width = -(-max(lengths) // 128) * 128
    ends = torch.arange(1, width + 1, dtype=torch.int32).repeat(len(lengths), 1)
    positions = torch.zeros(len(lengths), width, dtype=torch.long)
    labels = torch.full((len(lengths), width), torch.nan)
    for index, length in enumerate(lengths):
        trunk, fork = length // 2, 3 * length // 4
        ends[index, :trunk], ends[index, trunk:fork], ends[index, fork:length] = length, fork, length
        positions[index, :fork] = torch.arange(fork)
        positions[index, fork:length] = torch.arange(trunk, trunk + length - fork)
        labels[index, [trunk - 1, fork - 1, length - 1]] = torch.tensor([1.0, 0.25, 0.5])
    ids = torch.randint(10, vocabulary, (len(lengths), width), generator=generator)
    batch = {"input_ids": ids, "subtree_ends": ends, "position_ids": positions, "labels": labels}
    return {key: value.cuda() for key, value in batch.items()}


def _loss_and_gradients(model, inputs, autocast):
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}


def _difference(found, expected):
    largest = max(gradient.norm() for gradient in expected[1].values())
    return max(
        ((found[1][name] - gradient).norm() / gradient.norm()).item()
        for name, gradient in expected[1].items()
        if gradient.norm() > 1e-4 * largest
    )


def _config(head_dim: int, num_heads: int, num_key_value_heads: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=120,
        hidden_size=head_dim * num_heads,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        reward_token_ids=[7, 3],
        pad_token_id=0,
    )


@pytest.mark.parametrize(
    "config",
    [
        build_config("qwen3_vl", tied=True),
        _config(64, 4, 2),
        # Head sizes that are no power of two, and groups of 7 as in Qwen2.5-VL 7B
        _config(80, 4, 4),
        _config(128, 14, 2),
    ],
    ids=["qwen3_vl", "head 64", "head 80", "head 128"],
)
# float32, whose kernels take longest to compile, comes last
@pytest.mark.parametrize("training", ["bfloat16", "autocast", "float32"])
def test_flex_equals_sdpa(config, training, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    # Beyond the limit the plain implementation would compute the whole matrix of scores
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if training == "bfloat16" else torch.float32
    sdpa = AutoModelForProcessReward.from_config(config, dtype=dtype).cuda().train()
    flex = use_flex_attention(copy.deepcopy(sdpa))
    for model in (sdpa, flex):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # Sequences of other numbers and lengths one after another, as in training
    batches = [[500], [300, 700], [2000, 1500, 128], [3000], [128]]
    for lengths in batches[:2] if training == "float32" else batches:
        batch = _trees(lengths, generator, 100)
        expected = _loss_and_gradients(sdpa, batch, training == "autocast")
        found = _loss_and_gradients(flex, batch, training == "autocast")
        assert found[0] == pytest.approx(expected[0], rel=1e-5 if training == "float32" else 2e-2)
        assert _difference(found, expected) < (1e-3 if training == "float32" else 0.1)


def test_memory_does_not_grow_with_the_square_of_the_length():
    torch.manual_seed(0)
    model = use_flex_attention(AutoModelForProcessReward.from_config(_config(64, 8, 2), dtype=torch.bfloat16).cuda())
    peaks = []
    for length in (8192, 32768):
        batch = _trees([length], torch.Generator().manual_seed(0), 100)
        model(**batch).loss.backward()  # compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(**batch).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 6 * peaks[0]
