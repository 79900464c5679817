"""The process-reward forward, written once as a mixin and combined with every architecture's own class."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .loss import process_reward_loss

# Architectures with a stock class whose forward does not fit, with the reason that the error gives.
_UNSUPPORTED_MODEL_TYPES = {
    "chameleon": "its forward edits the logits of the whole vocabulary",
    "diffusion_gemma": "it does not read text from left to right",
    "mllama": "its inputs describe the image of every token (`cross_attention_mask`)",
}


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


class ProcessRewardMixin:
    """
    Turns a stock language model class into a process reward model: `forward` returns logits [wrong, right].

    Everything else — weights, names, saving, quantisation, adapters — is that of the stock class. Get such a model from
    [`AutoModelForProcessReward`] or [`create_process_reward_model`].
    """

    config: Any

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        check_config(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.install_reward_head()

    def install_reward_head(self) -> None:
        """Makes the output head compute the reward tokens' rows only, as `config.reward_token_ids` names them."""
        head = get_output_head(cast(PreTrainedModel, self))
        token_ids = tuple(self.config.reward_token_ids)
        if len(token_ids) != 2 or not all(0 <= token_id < head.weight.shape[0] for token_id in token_ids):
            raise ValueError(
                f"reward_token_ids = {list(token_ids)}: must be two rows of the output head, which has "
                f"{head.weight.shape[0]}"
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
            use_cache (`bool`, *optional*, defaults to `False`):
                Whether to return keys and values. Off, since nothing is generated.
            kwargs:
                What the stock forward takes: `input_ids`, `attention_mask`, `pixel_values`, …

        Returns:
            [`ProcessRewardOutput`]
        """
        outputs = super().forward(*args, use_cache=use_cache, return_dict=True, **kwargs)  # type: ignore[misc]
        logits = outputs.logits
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
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

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


def check_config(config: PreTrainedConfig) -> None:
    """Refuses, by name, an architecture that cannot become a process reward model."""
    reason = _UNSUPPORTED_MODEL_TYPES.get(config.model_type)
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        reason = "it is an encoder-decoder"
    if reason is not None:
        raise ValueError(f"{config.model_type!r} models cannot become process reward models: {reason}")
