"""Conversion of the released InternVLChat layout (MM-PRM, VisualPRM, InternVL 2.5) to transformers' own InternVL.

    mm-prm convert internvl-chat SRC DST

The released layout needs its remote code: a fused and grouped `wqkv` (InternLM2), a fused `qkv` in the vision tower, a
SentencePiece tokenizer and tiling in the calling program. The checkpoint written here needs none: it is an
`InternVLForConditionalGeneration` with a Llama or Qwen2 language model, a fast tokenizer and an `InternVLProcessor`.
"""

import os
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from mm_prm.unfinished import unfinished_folder

from .auto import REWARD_TOKENS, STEP_TOKEN, set_process_reward_config
from .convert_internvl_config import Released, convert_config, head_name, image_processors, read_config, read_json
from .convert_internvl_tokenizer import CONTEXT_TOKEN, END_OF_TURN, chat_template, convert_tokenizer
from .processing import ProcessRewardProcessor

logger = logging.get_logger(__name__)

# Names of tensors, transformers' to the released layout's. A `{}` stands for one of q, k and v, which are fused there.
_VISION_NAMES = (
    ("model.vision_tower.", "vision_model."),
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("embeddings.patch_embeddings.projection.", "embeddings.patch_embedding."),
    (".encoder.layer.", ".encoder.layers."),
    (".attention.projection_layer.", ".attn.proj."),
    (".attention.{}_proj.", ".attn.qkv."),
    (".attention.", ".attn."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".lambda_", ".ls"),
)
_PROJECTOR_NAMES = (
    ("model.multi_modal_projector.layer_norm.", "mlp1.0."),
    ("model.multi_modal_projector.linear_1.", "mlp1.1."),
    ("model.multi_modal_projector.linear_2.", "mlp1.3."),
)
_QWEN2_NAMES = (
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
)
_INTERNLM2_NAMES = (
    ("lm_head.", "language_model.output."),
    ("model.language_model.", "language_model.model."),
    (".embed_tokens.", ".tok_embeddings."),
    (".self_attn.{}_proj.", ".attention.wqkv."),
    (".self_attn.o_proj.", ".attention.wo."),
    (".mlp.gate_proj.", ".feed_forward.w1."),
    (".mlp.down_proj.", ".feed_forward.w2."),
    (".mlp.up_proj.", ".feed_forward.w3."),
    (".input_layernorm.", ".attention_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
)
_HEAD = "lm_head.weight"
_EMBEDDINGS = "model.language_model.embed_tokens.weight"


def convert_internvl_chat(
    source: str | os.PathLike, destination: str | os.PathLike, *, image_token_id: int | None = None
) -> InternVLConfig:
    """
    Convert a checkpoint in the released InternVLChat layout to one that transformers loads without remote code.

    Weights keep their dtype. A source whose tokenizer has the step token `<prm>` becomes a process reward model that reads
    the ancestor's text (template style `mm_prm`). The destination appears when it is complete, and not at all after an error.

    Args:
        source (`str` or `os.PathLike`):
            Folder with `config.json`, safetensors files (one, or several with their index) and tokenizer files.
        destination (`str` or `os.PathLike`):
            Folder to write; it must not exist yet, or be empty.
        image_token_id (`int`, *optional*):
            Id of the token that image features take the place of. Needed where the source has no tokenizer files, from
            which it is read otherwise.

    Returns:
        [`~transformers.InternVLConfig`]: Configuration of the checkpoint written.

    Raises:
        `ValueError` or `OSError`: If a file is missing, broken or of another layout; the message names the file and the
        key.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination}: there is something already; name a new folder")
    released = read_config(source / "config.json")
    tokenizer = convert_tokenizer(source)
    image_token_id = _find_image_token(source, released, tokenizer, image_token_id)
    tensors = _Tensors(source)
    config = convert_config(released, image_token_id, tied=head_name(released) not in tensors.files)
    processor: InternVLProcessor | GotOcr2ImageProcessor
    processor, video_processor = image_processors(released)
    if tokenizer is not None:
        processor = InternVLProcessor(
            image_processor=processor,
            tokenizer=tokenizer,
            video_processor=video_processor,
            image_seq_length=config.image_seq_length,
            chat_template=chat_template(released, tokenizer),
        )
    state = _convert_weights(tensors, config)
    if tokenizer is not None:
        _make_room(state, config, source, len(tokenizer))

    reward_processor = None
    if tokenizer is not None and {STEP_TOKEN, *REWARD_TOKENS} <= tokenizer.get_vocab().keys():
        # A released process reward model, to be read as it was evaluated
        reward_processor = ProcessRewardProcessor(cast(InternVLProcessor, processor), template_style="mm_prm")
        set_process_reward_config(config, reward_processor)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    if tokenizer is not None:
        _set_generation_config(model, tokenizer)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_folder(destination) as folder:
        checkpoint = folder / destination.name
        model.save_pretrained(checkpoint, max_shard_size="5GB")
        (reward_processor or processor).save_pretrained(checkpoint)
        checkpoint.rename(destination)
    return config


def _find_image_token(
    source: Path, released: Released, tokenizer: PreTrainedTokenizerFast | None, given: int | None
) -> int:
    if tokenizer is None:
        if given is None:
            raise ValueError(
                f"{source}: there are no tokenizer files (tokenizer.model, or vocab.json and merges.txt), so the image "
                "token's id must be given: --image_token_id N"
            )
        size = released.get("llm_config.vocab_size", int)
        if not 0 <= given < size:
            raise ValueError(f"image_token_id = {given}: must be below the vocabulary's size, {size}")
        logger.warning(
            f"{source} has no tokenizer files: the converted checkpoint has neither tokenizer nor processor, and takes "
            f"{given} for its image token"
        )
        return given
    found = tokenizer.get_vocab()[CONTEXT_TOKEN]
    if given is not None and given != found:
        raise ValueError(f"image_token_id = {given}: the tokenizer of {source} has {CONTEXT_TOKEN} as token {found}")
    return found


class _Tensors:
    """The source's tensors, from one safetensors file or from several with an index; read when asked for."""

    def __init__(self, source: Path):
        index = source / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ValueError(f"{index}: the key 'weight_map' with a file for each tensor is missing")
            outside = [name for name in weight_map.values() if Path(name).name != name]
            if outside:
                raise ValueError(f"{index}: the file {outside[0]!r} lies outside the folder")
            names = set(weight_map.values())
        else:
            weight_map = None
            names = {"model.safetensors"}
        self.source = source
        self._open = {name: self._opened(source / name) for name in sorted(names)}
        held = {key: name for name, file in self._open.items() for key in file.keys()}  # noqa: SIM118
        for key, name in (weight_map or {}).items():
            if held.get(key) != name:
                raise ValueError(f"{source / name}: the tensor '{key}', which {index.name} puts there, is missing")
        self.files: dict[str, str] = held

    @staticmethod
    def _opened(file: Path) -> Any:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: there is no such file (weights are read from safetensors files only)")
        try:
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{file}: broken or truncated safetensors file: {error}") from error

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._open[self.files[key]].get_tensor(key)


def _convert_weights(tensors: _Tensors, config: InternVLConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in InternVLForConditionalGeneration(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[_HEAD]
    text_config = config.text_config
    internlm2 = isinstance(text_config, LlamaConfig)
    parts_of: dict[str, dict[str, str]] = {}
    for name in shapes:
        key, part = _released_name(name, internlm2)
        parts_of.setdefault(key, {})[part] = name
    for key in parts_of:
        if key not in tensors.files:
            raise ValueError(f"{tensors.source}: the tensor '{key}' is missing")
    for key, file in tensors.files.items():
        if key not in parts_of:
            raise ValueError(f"{tensors.source / file}: the tensor '{key}' has no place in the model of config.json")

    state: dict[str, torch.Tensor] = {}
    for key, names in parts_of.items():
        tensor = tensors[key]
        rows = sum(shapes[name][0] for name in names.values())
        expected = (rows, *next(iter(shapes[name] for name in names.values()))[1:])
        if tensor.shape != expected:
            raise ValueError(
                f"{tensors.source / tensors.files[key]}: the tensor '{key}' has the shape {tuple(tensor.shape)}, but "
                f"config.json asks for {expected}"
            )
        if len(names) == 1:
            parts = {"": tensor}
        elif key.startswith("vision_model."):
            parts = dict(zip("qkv", tensor.chunk(3), strict=True))
        else:
            parts = _split_grouped(tensor, text_config)
        state |= {name: parts[part].contiguous() for part, name in names.items()}
    if config.tie_word_embeddings:
        state[_HEAD] = state[_EMBEDDINGS]
    return state


def _released_name(name: str, internlm2: bool) -> tuple[str, str]:
    """The released name of a tensor, and `q`, `k` or `v` where it is one part of a fused tensor there."""
    if name.startswith("model.vision_tower."):
        pairs: tuple[tuple[str, str], ...] = _VISION_NAMES
    elif name.startswith("model.multi_modal_projector."):
        pairs = _PROJECTOR_NAMES
    else:
        pairs = _INTERNLM2_NAMES if internlm2 else _QWEN2_NAMES
    part = ""
    for ours, theirs in pairs:
        if "{}" not in ours:
            name = name.replace(ours, theirs)
            continue
        for letter in "qkv":
            if ours.format(letter) in name:
                name, part = name.replace(ours.format(letter), theirs), letter
    return name, part


def _split_grouped(tensor: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    """InternLM2's `wqkv`: for each key-value head its query heads, then its key, then its value."""
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    grouped = tensor.view(groups, heads // groups + 2, config.hidden_size // heads, *tensor.shape[1:])
    queries, keys, values = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
    return {"q": queries.flatten(0, 2), "k": keys.flatten(0, 1), "v": values.flatten(0, 1)}


def _make_room(state: dict[str, torch.Tensor], config: InternVLConfig, source: Path, num_tokens: int) -> None:
    """
    Give `<video>`, which the processor asks for and the released layout lacks, a row where there is no free one.

    It is the mean of all rows, so that the token has an average logit and is never written.
    """
    text_config = cast(PreTrainedConfig, config.text_config)
    missing = num_tokens - text_config.vocab_size
    if missing <= 0:
        return
    if missing > 1:
        raise ValueError(
            f"{source}: the tokenizer has {num_tokens - 1} tokens, but llm_config.vocab_size of config.json is "
            f"{text_config.vocab_size}: they do not belong together"
        )
    for name in (_EMBEDDINGS,) if config.tie_word_embeddings else (_EMBEDDINGS, _HEAD):
        row = state[name].float().mean(dim=0, keepdim=True).to(state[name].dtype)
        state[name] = torch.cat([state[name], row])
    if config.tie_word_embeddings:
        state[_HEAD] = state[_EMBEDDINGS]
    text_config.vocab_size = num_tokens


def _set_generation_config(model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """The released program stops at the end of a turn, which its `generation_config.json` does not say everywhere."""
    ends = [tokenizer.convert_tokens_to_ids(END_OF_TURN), tokenizer.eos_token_id]
    model.generation_config.eos_token_id = list(dict.fromkeys(end for end in ends if end is not None))
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
