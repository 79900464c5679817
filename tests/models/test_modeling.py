import copy
import pickle

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Blip2Config,
    BlipConfig,
    ChameleonConfig,
    CLIPConfig,
    GPT2Config,
    IdeficsConfig,
    Kosmos2Config,
    MambaConfig,
    MusicgenConfig,
    PaliGemmaConfig,
    PreTrainedConfig,
    T5Config,
)

from mm_prm.models import AutoModelForProcessReward, process_reward_loss
from mm_prm.models.auto import stock_class
from mm_prm.models.modeling import RewardHead

from .tiny_architectures import REWARD_TOKEN_IDS, build_config, build_inputs


def test_soft_capping_and_bias_of_the_head_are_kept():
    config = build_config("gemma2", tied=False)
    model = AutoModelForProcessReward.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1000)
        logits = model(**build_inputs("gemma2")).logits
    assert 1 < logits.abs().max() <= config.final_logit_softcapping == 2

    head = torch.nn.Linear(4, 9)
    hidden = torch.randn(2, 4)
    expected = head(hidden)[:, [5, 1]]
    head.__class__ = RewardHead
    head.reward_token_ids = (5, 1)
    torch.testing.assert_close(head(hidden), expected)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradients_are_those_of_full_logits(tied):
    torch.manual_seed(0)
    model = AutoModelForProcessReward.from_config(build_config("qwen2", tied))
    stock = stock_class(model.config)(model.config)
    stock.load_state_dict(model.state_dict())
    inputs = build_inputs("qwen2")
    labels = torch.full((2, 24), torch.nan)
    labels[0, 5], labels[1, 9], labels[1, 20] = 0.25, 1.0, 0.0

    loss = model(**inputs, labels=labels).loss
    loss.backward()
    labelled = ~labels.isnan()
    log_probabilities = stock(**inputs).logits[..., list(REWARD_TOKEN_IDS)].log_softmax(-1)[labelled]
    targets = torch.stack([1 - labels, labels], dim=-1)[labelled]
    expected = -(targets * log_probabilities).sum() / 3
    expected.backward()

    torch.testing.assert_close(loss, expected)
    gradients = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-6)
    assert model.get_output_embeddings().weight.grad[list(REWARD_TOKEN_IDS)].abs().max() > 0


def test_loss_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [0.0, 2.0], [torch.nan, torch.nan]]], requires_grad=True)
    labels = torch.tensor([[0.3, 0.75, torch.nan]])
    right = torch.sigmoid(torch.tensor(2.0))
    losses = [torch.log(torch.tensor(2.0)), -(0.75 * right.log() + 0.25 * (1 - right).log())]

    loss = process_reward_loss(logits, labels)
    torch.testing.assert_close(loss, (losses[0] + losses[1]) / 2)
    loss.backward()
    # The padding's logits are NaN and must not reach any gradient
    assert torch.equal(logits.grad[0, 2], torch.zeros(2))
    weights = torch.tensor([[1.0, 3.0, torch.nan]])
    weighted = process_reward_loss(logits, labels, label_weights=weights)
    torch.testing.assert_close(weighted, (losses[0] + 3 * losses[1]) / 4)
    shared = process_reward_loss(logits, labels, label_weights=weights, num_items_in_batch=10)
    torch.testing.assert_close(shared, (losses[0] + 3 * losses[1]) / 10)


def test_loss_without_labels_is_a_zero_with_gradients():
    logits = torch.randn(1, 3, 2, requires_grad=True)
    loss = process_reward_loss(logits, torch.full((1, 3), torch.nan))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_labels_off_the_step_tokens_are_ignored():
    model = AutoModelForProcessReward.from_config(build_config("qwen2", True)).eval()
    inputs = build_inputs("qwen2")
    labels = torch.full((2, 24), torch.nan)
    labels[0, 5], labels[0, 6] = 1.0, 0.0
    step_mask = torch.zeros(2, 24, dtype=torch.bool)
    step_mask[0, 5] = True
    only_step = labels.clone()
    only_step[0, 6] = torch.nan
    loss = model(**inputs, labels=labels, step_mask=step_mask).loss
    assert loss == model(**inputs, labels=only_step).loss
    assert loss != model(**inputs, labels=labels).loss


def test_scores_stay_in_float32_in_a_bfloat16_model():
    model = AutoModelForProcessReward.from_config(build_config("qwen2", True), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model(**build_inputs("qwen2")).logits.dtype == torch.float32


def test_pickle_and_deepcopy_make_the_class_again():
    model = AutoModelForProcessReward.from_config(build_config("qwen2", True)).eval()
    inputs = build_inputs("qwen2")
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(twin) is type(model)
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)


def test_resizing_keeps_the_head_a_reward_head():
    for tied in (True, False):
        model = AutoModelForProcessReward.from_config(build_config("qwen2", tied)).eval()
        inputs = build_inputs("qwen2")
        before = model(**inputs).logits
        model.resize_token_embeddings(150, mean_resizing=False)
        assert model.get_output_embeddings().weight.shape[0] == 150
        torch.testing.assert_close(model(**inputs).logits, before)


def test_no_cache_unless_asked_for():
    model = AutoModelForProcessReward.from_config(build_config("qwen2", True)).eval()
    inputs = build_inputs("qwen2")
    assert model(**inputs).past_key_values is None
    assert model(**inputs, use_cache=True).past_key_values.get_seq_length() == 24
    assert isinstance(model(**inputs, return_dict=False), tuple)


def test_a_process_reward_model_does_not_generate():
    model = AutoModelForProcessReward.from_config(build_config("qwen2", True))
    with pytest.raises(TypeError, match="AutoModelForImageTextToText"):
        model.generate(**build_inputs("qwen2"))


def test_a_state_space_model_has_no_attentions():
    config = MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=120)
    config.reward_token_ids = list(REWARD_TOKEN_IDS)
    model = AutoModelForProcessReward.from_config(config).eval()
    stock = AutoModelForCausalLM.from_config(config).eval()
    stock.load_state_dict(model.state_dict())
    inputs = build_inputs("mamba")
    with torch.no_grad():
        outputs = model(**inputs)
        expected = stock(**inputs).logits[..., list(REWARD_TOKEN_IDS)]
    assert outputs.attentions is None
    torch.testing.assert_close(outputs.logits, expected, rtol=0, atol=1e-5)


_MUSIC = {
    "text_encoder": {"model_type": "t5"},
    "audio_encoder": {"model_type": "encodec"},
    "decoder": {"model_type": "musicgen_decoder"},
}
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 2000,
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "'t5'.*encoder-decoder"),
        (ChameleonConfig(), "'chameleon'.*logits of the whole vocabulary"),
        (Blip2Config(), "'blip-2'.*one image with every text"),
        (PaliGemmaConfig(), "'paligemma'.*later steps would change the scores of earlier ones"),
        (Kosmos2Config(), "'kosmos-2'.*image of every token"),
        (MusicgenConfig(**_MUSIC), "'musicgen'.*writes audio"),
        (BertConfig(), "'bert'.*is_decoder = true"),
        (IdeficsConfig(**_SMALL), "IdeficsForVisionText2Text.*IdeficsDecoupledLinear"),
        (BlipConfig(), "BlipForConditionalGeneration.*no output head"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_an_architecture_that_cannot_work_says_so_at_load(config, reason):
    config.reward_token_ids = [1000, 1001]
    with torch.device("meta"), pytest.raises(ValueError, match=reason):
        AutoModelForProcessReward.from_config(config)


def test_an_architecture_without_a_class_says_so():
    with pytest.raises(ValueError, match=r"'clip'.*neither an image-text-to-text nor a causal language model class"):
        AutoModelForProcessReward.from_config(CLIPConfig())


def test_from_config_needs_reward_tokens():
    with pytest.raises(ValueError, match="reward_token_ids"):
        AutoModelForProcessReward.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20))


def test_reward_tokens_must_be_rows_of_the_head():
    config = build_config("qwen2", True)
    config.reward_token_ids = [3, 4000]
    with pytest.raises(ValueError, match=r"\[3, 4000\].*has 120"):
        AutoModelForProcessReward.from_config(config)


def test_a_plain_checkpoint_without_reward_tokens_names_the_way_out(tiny_vlm_path):
    with pytest.raises(ValueError, match="create_process_reward_model"):
        AutoModelForProcessReward.from_pretrained(tiny_vlm_path)


def test_a_plain_checkpoint_takes_reward_tokens_from_the_call(tiny_vlm_path):
    model = AutoModelForProcessReward.from_pretrained(tiny_vlm_path, reward_token_ids=[40, 41])
    assert model.get_output_embeddings().reward_token_ids == (40, 41)
