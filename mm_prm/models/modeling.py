# Copyright the mm-prm authors. Licensed under the Apache License, Version 2.0.
"""
The process-reward forward, written once as a mixin and combined with every architecture's own class.

A copy of this file lies in the repository of every process reward model, so that
`AutoModelForTokenClassification.from_pretrained(repository, trust_remote_code=True)` loads it where mm-prm is not
installed. So it imports torch and transformers only. The score of a step is `logits.softmax(-1)[..., 1]` at the step
token, whose id is `config.step_token_id`.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    __version__,
)
from transformers.utils import ModelOutput, can_return_tuple

# Name of this file in a model's repository
CODE_FILE = "modeling_process_reward.py"

# Tokens in a block of FlexAttention's masks
_BLOCK_SIZE = 128

# Architectures with a stock class whose forward does not fit, with the reason that the error gives.
_UNSUPPORTED_MODEL_TYPES = {
    "blip-2": "it takes one image with every text",
    "chameleon": "its forward edits the logits of the whole vocabulary",
    "diffusion_gemma": "it does not read text from left to right",
    "git": "its logits begin with those of image tokens that its inputs do not have",
    "instructblip": "it takes one image with every text",
    "instructblipvideo": "it takes one video with every text",
    "kosmos-2": "its inputs describe the image of every token (`image_embeds_position_mask`)",
    "kosmos-2.5": "its inputs describe the image of every token (`image_embeds_position_mask`)",
    "mllama": "its inputs describe the image of every token (`cross_attention_mask`)",
    "musicgen": "it writes audio",
    "musicgen_melody": "it writes audio",
    "paligemma": "it reads a prompt in both directions, so that later steps would change the scores of earlier ones",
    "xlm": "it reads in both directions, so that later steps would change the scores of earlier ones",
    "xlnet": "it reads in both directions, so that later steps would change the scores of earlier ones",
}
# Encoders that are causal language models with `is_decoder = true` only.
_ENCODER_MODEL_TYPES = frozenset(
    {
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)


@dataclass
class ProcessRewardOutput(ModelOutput):
    """
    Output of a process reward model.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
            Two-way cross-entropy, if labels were given.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, 2)`):
            Logits [wrong, right] in float32 at every position; they mean something at the step tokens. The score of a
            step is `logits.softmax(-1)[..., 1]` there.
        past_key_values ([`~transformers.Cache`], *optional*):
            Keys and values, if `use_cache=True` was passed.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*):
            Hidden states of every layer, if asked for.
        attentions (`tuple[torch.FloatTensor]`, *optional*):
            Attentions of every layer, if asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class RewardHead(nn.Linear):
    """
    An output head that computes only the two rows of the reward tokens, in the order of `reward_token_ids`.

    It holds the weights of the whole head, tied or not, so that the state dict stays that of the stock model. Computing
    inside the head's own forward lets FSDP and DeepSpeed gather its weights as usual, and leaves what the architecture
    does to its logits (soft-capping, scaling) to the architecture.
    """

    reward_token_ids: tuple[int, int]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = torch.tensor(self.reward_token_ids, device=self.weight.device)
        bias = None if self.bias is None else self.bias.index_select(0, rows).float()
        # Two columns cost nothing in float32; in bfloat16 their difference would be rounded to about 1/10.
        with torch.autocast(input.device.type, enabled=False):
            return functional.linear(input.float(), self.weight.index_select(0, rows).float(), bias)


def process_reward_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_weights: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """
    Computes Σ w·ℓ / Σ w over the labelled steps, where ℓ is the cross-entropy between (1 - label, label) and the softmax
    of the logits [wrong, right].

    Without a labelled step the loss is a zero that still belongs to the graph, so that backward runs everywhere.

    Args:
        logits (`torch.Tensor` of shape `(..., 2)`):
            Logits in the order [wrong, right].
        labels (`torch.Tensor` of shape `(...)`):
            Probability that the step is right, in [0, 1]. NaN where there is no label.
        label_weights (`torch.Tensor` of shape `(...)`, *optional*):
            Weight of each label. Defaults to 1 for all.
        num_items_in_batch (`torch.Tensor` or `float`, *optional*):
            Σ w over everything that one optimizer step sees. Defaults to Σ w over these labels.
    """
    # Selecting (not masking) keeps the logits of padding out of the graph: they may be NaN, and 0 · NaN is NaN.
    labelled = ~labels.isnan()
    labels = labels[labelled].float()
    logits = logits[labelled].float()
    # softmax over two logits is the sigmoid of their difference
    losses = functional.binary_cross_entropy_with_logits(logits[:, 1] - logits[:, 0], labels, reduction="none")
    if label_weights is None:
        weights = torch.ones_like(losses)
    else:
        weights = label_weights[labelled].to(losses)
    total_weight = weights.sum() if num_items_in_batch is None else num_items_in_batch
    if labels.numel() == 0:
        return losses.sum()
    return (losses * weights).sum() / total_weight


def packed_attention_mask(
    subtree_ends: torch.Tensor, attn_implementation: str, dtype: torch.dtype
) -> torch.Tensor | BlockMask:
    """
    Returns the mask with which each token of packed sequences attends to itself and to what precedes it in its rows: token
    j is seen by token i if j ≤ i < `subtree_ends[j]`.

    Args:
        subtree_ends (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            Where the last row that a token belongs to ends, in trees laid out depth first.
        attn_implementation (`str`):
            What the mask is for: a dense one for `sdpa` and `eager`, one of blocks for FlexAttention, of which no part is
            as large as the sequence is long, squared.
        dtype (`torch.dtype`):
            Type of a mask for `eager`, which is added to the scores.
    """
    if "flex" in attn_implementation:
        return _block_mask(subtree_ends)
    if attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation = {attn_implementation!r} cannot hide branches of packed trees from each other; load the "
            "model with 'sdpa' or 'flex_attention'"
        )
    places = torch.arange(subtree_ends.shape[1], device=subtree_ends.device)
    mask = ((places[:, None] >= places) & (places[:, None] < subtree_ends[:, None])).unsqueeze(1)
    if attn_implementation == "eager":
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return mask


def _block_mask(subtree_ends: torch.Tensor) -> BlockMask:
    """What `create_block_mask` gives for the same tokens, without looking at each pair of them."""
    batch_size, length = subtree_ends.shape
    if length % _BLOCK_SIZE:
        raise ValueError(
            f"packed sequences of {length} tokens: FlexAttention takes multiples of {_BLOCK_SIZE}; pack with a TreePacker "
            "that was made for this model with this attn_implementation"
        )

    def is_seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (query < subtree_ends[batch, key])

    ends = subtree_ends.view(batch_size, 1, 1, -1, _BLOCK_SIZE)
    keys = torch.arange(0, length, _BLOCK_SIZE, device=subtree_ends.device)
    queries = keys[:, None]
    whole = (queries > keys) & (ends.amin(-1) >= queries + _BLOCK_SIZE)
    some = ((queries > keys) & (ends.amax(-1) > queries) | (queries == keys)) & ~whole
    return BlockMask.from_kv_blocks(*_numbered(some), *_numbered(whole), BLOCK_SIZE=_BLOCK_SIZE, mask_mod=is_seen)


def _numbered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of keys there are for each block of queries, and their indices, before those of the others."""
    return blocks.sum(-1, dtype=torch.int32), blocks.int().argsort(dim=-1, descending=True, stable=True).int()


class ProcessRewardMixin:
    """
    Turns a stock language model class into a process reward model: `forward` returns logits [wrong, right].

    Everything else — weights, names, saving, quantisation, adapters — is that of the stock class. Get such a model from
    [`AutoModelForProcessReward`] or [`create_process_reward_model`].
    """

    config: Any
    dtype: torch.dtype
    # Of transformers.PreTrainedModel
    should_save_on_this_rank: Callable[[bool], bool]
    _hf_peft_config_loaded: bool

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        check_config(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.install_reward_head()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        _check_reward_head(loaded[0] if kwargs.get("output_loading_info") else loaded)
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs) -> None:
        """
        Saves the stock class's checkpoint, and beside it the file that makes it a process reward model without mm-prm.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to write.
            is_main_process (`bool`, *optional*, defaults to `True`):
                Whether this process writes files.
            kwargs:
                Arguments of [`~transformers.PreTrainedModel.save_pretrained`].
        """
        # With `load_adapter`, only the adapter is saved: the code lies beside its base model
        if not self._hf_peft_config_loaded:
            code = {"AutoModelForTokenClassification": f"{Path(CODE_FILE).stem}.{ProcessRewardModel.__name__}"}
            self.config.auto_map = {**(vars(self.config).get("auto_map") or {}), **code}
            if self.should_save_on_this_rank(is_main_process):
                _write_code(save_directory)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]

    def load_adapter(self, *args, **kwargs):
        loaded = super().load_adapter(*args, **kwargs)  # type: ignore[misc]
        if loaded.unexpected_keys:
            # transformers 5.17 has no place for what `trainable_token_indices` and `modules_to_save` trained
            raise ValueError(
                f"weights of the adapter found no place in the model: {sorted(loaded.unexpected_keys)}; transformers "
                f"{__version__} cannot load them: put the adapter on its base model with peft.PeftModel.from_pretrained, or "
                "use a newer transformers"
            )
        return loaded

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args, **kwargs):
        # `save_pretrained(push_to_hub=True)` uploads what was written since it began, which the file was not
        if not self._hf_peft_config_loaded:
            _write_code(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]

    def install_reward_head(self) -> None:
        """Makes the output head compute the reward tokens' rows only, as `config.reward_token_ids` names them."""
        head = get_output_head(cast(PreTrainedModel, self))
        token_ids = tuple(self.config.reward_token_ids)
        # Not the weight's shape: ZeRO-3 scatters weights as they are made, and leaves none of it
        if len(token_ids) != 2 or not all(0 <= token_id < head.out_features for token_id in token_ids):
            raise ValueError(
                f"reward_token_ids = {list(token_ids)}: must be two rows of the output head, which has "
                f"{head.out_features}"
            )
        # The head changes its class, not its place: parameters, ties and hooks stay as they are.
        head.__class__ = RewardHead
        head.reward_token_ids = token_ids

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        # `resize_token_embeddings` builds a new head
        super().set_output_embeddings(new_embeddings)  # type: ignore[misc]
        self.install_reward_head()

    @can_return_tuple
    def forward(
        self,
        *args,
        labels: torch.Tensor | None = None,
        step_mask: torch.Tensor | None = None,
        label_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        subtree_ends: torch.Tensor | None = None,
        row_borders: torch.Tensor | None = None,
        longest_row: int | None = None,
        use_cache: bool = False,
        **kwargs,
    ) -> ProcessRewardOutput:
        """
        Computes the logits [wrong, right].

        Args:
            labels (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Probability in [0, 1] that the step which ends at this token is right. NaN where there is no label.
            step_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Where the step tokens are. If given, labels elsewhere are ignored. The logits are not changed by it.
            label_weights (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Weight of each label in the loss.
            num_items_in_batch (`torch.Tensor` or `float`, *optional*):
                Sum of the weights over the whole optimizer step. Defaults to the sum over this batch.
            subtree_ends (`torch.IntTensor` of shape `(batch_size, sequence_length)`, *optional*):
                For packed trees or rows, instead of `attention_mask`; see [`packed_attention_mask`].
            row_borders (`torch.IntTensor` of shape `(num_rows + 1,)`, *optional*):
                For packed rows under FlashAttention, instead of `subtree_ends`: where rows begin and end, the sequences of
                the batch one behind another.
            longest_row (`int`, *optional*):
                Length of the longest of these rows.
            use_cache (`bool`, *optional*, defaults to `False`):
                Whether to return keys and values. Off, since nothing is generated.
            kwargs:
                What the stock forward takes: `input_ids`, `attention_mask`, `pixel_values`, …

        Returns:
            [`ProcessRewardOutput`]
        """
        head = cast(PreTrainedModel, self).get_output_embeddings()
        if not isinstance(head, RewardHead):
            _check_adapter(head)
        if subtree_ends is not None:
            implementation = self.config.get_text_config()._attn_implementation
            kwargs["attention_mask"] = packed_attention_mask(subtree_ends, implementation, self.dtype)
        with self._rows_for_decoder(row_borders, longest_row):
            outputs = super().forward(*args, use_cache=use_cache, return_dict=True, **kwargs)  # type: ignore[misc]
        logits = outputs.logits
        if logits.shape[-1] != 2 and not isinstance(head, RewardHead):
            # An adapter around the head computes all rows: PEFT's trainable tokens, if input and output share weights
            logits = logits[..., list(self.config.reward_token_ids)].float()
        if logits.shape[-1] != 2:
            raise ValueError(
                f"{type(self).__name__} cannot be a process reward model: its forward does not read its output head "
                f"(logits of shape {tuple(logits.shape)})"
            )
        loss = None
        if labels is not None:
            if step_mask is not None:
                labels = labels.masked_fill(~step_mask, torch.nan)
            loss = process_reward_loss(logits, labels, label_weights, num_items_in_batch)
        return ProcessRewardOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values if use_cache else None,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),  # state space models have none
        )

    def _rows_for_decoder(self, borders: torch.Tensor | None, longest: int | None) -> AbstractContextManager:
        """Gives the language model FlashAttention's borders; vision towers, which get all other arguments, have their own."""
        if borders is None:
            return nullcontext()
        rows = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}

        def add_rows(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return args, kwargs | rows

        return cast(PreTrainedModel, self).get_decoder().register_forward_pre_hook(add_rows, with_kwargs=True)

    def generate(self, *args, **kwargs):
        raise TypeError(
            "a process reward model scores steps and does not generate; load the same folder with "
            "AutoModelForImageTextToText (or AutoModelForCausalLM) to generate"
        )

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so a pickle names the stock class and makes it again.
        reduced = super().__reduce_ex__(protocol)
        stock = type(self).__mro__[2]
        if type(self) is not process_reward_class(stock):
            return reduced
        return _new_instance, (stock,), *reduced[2:]


def _new_instance(stock: type[PreTrainedModel]) -> PreTrainedModel:
    model_class = process_reward_class(stock)
    return model_class.__new__(model_class)


_CLASSES: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


def process_reward_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """
    Returns the process reward model class of a stock class.

    It keeps the stock class's name and module. transformers writes the name into `architectures` on every save, whoever
    saves (trainer, FSDP, merged adapter), and maps the names of weights for classes of its own modules only: so the
    checkpoint stays one of the stock class.

    Args:
        stock (`type[PreTrainedModel]`):
            A `…ForConditionalGeneration` or `…ForCausalLM` class.
    """
    if stock not in _CLASSES:
        namespace = {"__module__": stock.__module__, "__doc__": stock.__doc__}
        _CLASSES[stock] = type(stock.__name__, (ProcessRewardMixin, stock), namespace)
    return _CLASSES[stock]


def get_output_head(model: PreTrainedModel) -> RewardHead:
    """Returns the output head, and refuses, by name, a model with a head whose rows cannot be read."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} cannot become a process reward model: it has no output head")
    if type(head).forward not in (nn.Linear.forward, RewardHead.forward):
        raise ValueError(
            f"{type(model).__name__} cannot become a process reward model: its output head is a "
            f"{type(head).__name__}, not a torch.nn.Linear whose rows can be read"
        )
    return cast(RewardHead, head)


def _check_reward_head(model: PreTrainedModel) -> None:
    """Refuses a head that quantisation replaced, or filled with numbers that are not its weights."""
    head = model.get_output_embeddings()
    own = [module for module in head.modules() if isinstance(module, RewardHead)]
    if own and all(module.weight.is_floating_point() for module in own):
        return
    name = next(name for name, module in model.named_modules() if module is head)
    what = f"{own[0].weight.dtype} weights" if own else f"a {type(head).__name__}"
    raise ValueError(
        f"the output head {name!r} is quantised ({what}), so its rows cannot be read; leave {name!r} out of the "
        "quantisation, as transformers does by default (bitsandbytes: `llm_int8_skip_modules`)"
    )


def _check_adapter(head: nn.Module) -> None:
    """Refuses an adapter that adds to the head's output, of which there are two columns only."""
    if any(name == "base_layer" and isinstance(module, RewardHead) for name, module in head.named_modules()):
        raise ValueError(
            f"the output head of a process reward model cannot be a target of {type(head).__module__}; train its rows "
            "with `trainable_token_indices`, or the whole of it with `modules_to_save`"
        )


def stock_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """
    Returns the architecture's own class for generating text from images, or from text alone.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of a checkpoint.
    """
    check_config(config)
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            classes: Any = mapping[type(config)]
            return classes[0] if isinstance(classes, tuple) else classes
    raise ValueError(
        f"{config.model_type!r} models cannot become process reward models: transformers {__version__} has neither an "
        "image-text-to-text nor a causal language model class for them"
    )


def check_config(config: PreTrainedConfig) -> None:
    """Refuses, by name, an architecture that cannot become a process reward model."""
    reason = _UNSUPPORTED_MODEL_TYPES.get(config.model_type)
    if reason is None and (config.is_encoder_decoder or config.get_text_config().is_encoder_decoder):
        reason = "it is an encoder-decoder"
    if config.model_type in _ENCODER_MODEL_TYPES and not config.is_decoder:
        reason = "it reads in both directions (its configuration does not say `is_decoder = true`)"
    if reason is not None:
        raise ValueError(f"{config.model_type!r} models cannot become process reward models: {reason}")


class ProcessRewardModel:
    """What a repository's `auto_map` names: `AutoModelForTokenClassification` calls it with `trust_remote_code=True`."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *, config: PreTrainedConfig, **kwargs
    ) -> PreTrainedModel:
        """
        Loads the process reward model.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Folder or Hub repository.
            config ([`~transformers.PreTrainedConfig`]):
                Its configuration.
            kwargs:
                Arguments of [`~transformers.PreTrainedModel.from_pretrained`].
        """
        model_class = process_reward_class(stock_class(config))
        return model_class.from_pretrained(pretrained_model_name_or_path, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs) -> PreTrainedModel:
        return process_reward_class(stock_class(config))._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any) -> None:
        """Does nothing: the models that this class makes save their code themselves."""


def _write_code(directory: str | os.PathLike) -> None:
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CODE_FILE).write_bytes(Path(__file__).read_bytes())
