"""Packed rows get the same loss and gradients from FlexAttention and FlashAttention's arguments as padded ones from SDPA."""

import copy

import pytest
import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, Gemma2Config
from transformers.masking_utils import flash_attention_mask

from mm_prm.models import AutoModelForProcessReward, ProcessRewardProcessor, TreePacker, use_flex_attention

from ..models.flex_on_cpu import flex_on_cpu
from ..trainer.packings import build_prm, tree_rows

ARCHITECTURES = ["qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "qwen2"]
BORDERS = []


def _flash_stand_in(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    max_length_q=None,
    max_length_k=None,
    is_causal=None,
    **kwargs,
):
    """Attends row by row within the borders that it is given, as `flash_attn_varlen_func` does, and to nothing else."""
    assert attention_mask is None and torch.equal(cu_seq_lens_q, cu_seq_lens_k) and cu_seq_lens_q.dtype == torch.int32
    assert isinstance(max_length_q, int) and max_length_q == max_length_k == cu_seq_lens_q.diff().max()
    assert cu_seq_lens_q[0] == 0 and cu_seq_lens_q[-1] == query.shape[0] * query.shape[2]
    is_causal = module.is_causal if is_causal is None else is_causal
    if is_causal:
        BORDERS.append(cu_seq_lens_q.tolist())
    groups = query.shape[1] // key.shape[1]
    states = (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))
    rows = [states.transpose(1, 2).flatten(0, 1).split(cu_seq_lens_q.diff().tolist()) for states in states]
    outputs = [
        functional.scaled_dot_product_attention(
            *(part.transpose(0, 1) for part in row), is_causal=is_causal, scale=scaling
        )
        for row in zip(*rows, strict=True)
    ]
    output = torch.cat([output.transpose(0, 1) for output in outputs])
    return output.unflatten(0, (query.shape[0], query.shape[2])), None


AttentionInterface.register("flash_stand_in", _flash_stand_in)
AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)


def _loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys() != set()
    largest = max(gradient.norm() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        if name.endswith("k_proj.bias") and gradient.norm() < 1e-5 * largest:
            continue  # a softmax does not see what is added to all its inputs
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def _rows(architecture):
    rows = tree_rows(architecture)
    problems = [{"question": row["prompt"], "images": row["images"]} for row in rows]
    return problems, [row["completions"] for row in rows], [row["labels"] for row in rows]


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    if request.param == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words")
    return request.param


def test_flex_and_flash_equal_sdpa(architecture, tmp_path):
    path = build_prm(architecture, tmp_path)
    model = AutoModelForProcessReward.from_pretrained(path, dtype=torch.float32)
    processor = ProcessRewardProcessor.from_pretrained(path)
    rows = _rows(architecture)
    encoded = processor.encode(*rows)
    expected = _loss_and_gradients(model, dict(processor(*rows)))
    text = model.config.get_text_config()

    use_flex_attention(model)
    assert "flex" in text._attn_implementation
    longest = max(map(len, encoded.input_ids))
    for share_prefixes, max_tokens in [(True, None), (True, longest + 1), (False, 512)]:
        packer = TreePacker(model, processor, max_tokens, share_prefixes)
        packed = packer.pack(encoded)
        assert (len(packed) == 4) == (max_tokens is None)  # four trees, of which a small budget makes more
        inputs = packer.collate(encoded, packed, packer.layout(packed))
        num_sequences, length = inputs["input_ids"].shape
        assert length % 128 == 0 and (num_sequences == 1) == (max_tokens is None)
        if max_tokens == longest + 1:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        with flex_on_cpu():
            _assert_same(_loss_and_gradients(model, inputs), expected)
        model.gradient_checkpointing_disable()
        model.eval()
    # What is not packed stays with SDPA, to the bit
    assert _loss_and_gradients(model, dict(processor(*rows)))[0] == expected[0]

    # The vision tower of Qwen-VL takes borders of its own meanwhile
    text._attn_implementation = "flash_stand_in"
    for max_tokens in (None, 512):
        packer = TreePacker(model, processor, max_tokens, share_prefixes=False)
        packed = packer.pack(encoded)
        inputs = packer.collate(encoded, packed, packer.layout(packed))
        BORDERS.clear()
        _assert_same(_loss_and_gradients(model, inputs), expected)
        lengths = set(torch.tensor(BORDERS[0]).diff().tolist())
        assert {len(row) for row in encoded.input_ids} <= lengths and len(BORDERS) == text.num_hidden_layers
        assert all(borders == BORDERS[0] for borders in BORDERS)
    with pytest.raises(ValueError, match="'flash_stand_in' cannot hide branches of packed trees"):
        TreePacker(model, processor)


@pytest.mark.parametrize("implementation", ["flex_attention", "eager"])
def test_soft_caps(implementation):
    config = Gemma2Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=4,
        attn_logit_softcapping=2.0,
        layer_types=["full_attention"] * 2,
        attn_implementation="eager",
        pad_token_id=0,
    )
    config.reward_token_ids = [7, 3]
    torch.manual_seed(0)
    model = AutoModelForProcessReward.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    ids = torch.randint(4, 60, (60,))
    first, second = torch.cat([ids[:20], ids[20:40]]), torch.cat([ids[:20], ids[40:]])
    alone = {"input_ids": torch.stack([first, second]), "labels": torch.full((2, 40), torch.nan)}
    alone["labels"][:, 39] = torch.tensor([0.25, 1.0])
    ends = torch.arange(1, 129, dtype=torch.int32)
    ends[:20], ends[20:40], ends[40:60] = 60, 40, 60
    packed = {
        "input_ids": functional.pad(ids, (0, 68))[None],
        "subtree_ends": ends[None],
        "position_ids": torch.tensor([[*range(40), *range(20, 40), *[0] * 68]]),
        "labels": torch.full((1, 128), torch.nan),
    }
    packed["labels"][0, [39, 59]] = torch.tensor([0.25, 1.0])
    expected = _loss_and_gradients(model, alone)
    uncapped = copy.deepcopy(model)
    for layer in uncapped.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert _loss_and_gradients(uncapped, alone)[0] != pytest.approx(expected[0], rel=1e-3)
    model.set_attn_implementation(implementation)
    with flex_on_cpu():
        _assert_same(_loss_and_gradients(model, packed), expected)
    if implementation != "eager":
        with pytest.raises(ValueError, match="100 tokens: FlexAttention takes multiples of 128"):
            model(**{key: values[:, :100] for key, values in packed.items()})


def test_queries_that_autocast_left_in_float32_are_cast(tmp_path):
    # Qwen3 normalises queries and keys, with weights in float32 while training
    path = build_prm("qwen3_vl", tmp_path)
    processor = ProcessRewardProcessor.from_pretrained(path)
    rows = _rows("qwen3_vl")
    model = AutoModelForProcessReward.from_pretrained(path, dtype=torch.float32)
    encoded = processor.encode(*rows)
    losses = []
    for switch in (lambda model: None, use_flex_attention):
        switch(model)
        packer = TreePacker(model, processor)
        packed = packer.pack(encoded)
        with flex_on_cpu(), torch.autocast("cpu", torch.bfloat16):
            losses.append(model(**packer.collate(encoded, packed, packer.layout(packed))).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
