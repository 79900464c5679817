"""The configuration of the released InternVLChat layout, and what it becomes in transformers: model and image settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL.Image import Resampling
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLVideoProcessor,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

_IMAGE_MEAN = (0.485, 0.456, 0.406)
_IMAGE_STD = (0.229, 0.224, 0.225)


def read_json(file: Path) -> dict[str, Any]:
    """
    Read a JSON file that holds an object, or say in one line why it cannot be used.

    Args:
        file (`Path`):
            The file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: broken or truncated JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold a JSON object")
    return content


class Released:
    """
    The released `config.json`.

    Args:
        file (`Path`):
            The file, for messages.
        values (`Mapping[str, Any]`):
            What it holds.
    """

    def __init__(self, file: Path, values: Mapping[str, Any]):
        self.file = file
        self.values = values

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The value under a dotted key, which must be there and be of that type."""
        value: Any = self.values
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise ValueError(f"{self.file}: the key '{key}' is missing")
            value = value[part]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join("null" if one is type(None) else one.__name__ for one in kinds)
            raise ValueError(f"{self.file}: {key} = {value!r}: must be {names}")
        return value

    def refuse(self, key: str, problem: str) -> ValueError:
        """The error that says why the value under a dotted key cannot be converted."""
        value: Any = self.values
        for part in key.split("."):
            value = value[part]
        return ValueError(f"{self.file}: {key} = {value!r}: {problem}")


def read_config(file: Path) -> Released:
    """Read a released `config.json`, and refuse what transformers' InternVL cannot do."""
    values = read_json(file)
    released = Released(file, values)
    if values.get("model_type") != "internvl_chat":
        raise ValueError(
            f"{file}: model_type = {values.get('model_type')!r}: only the released InternVLChat layout "
            "('internvl_chat') is converted"
        )
    if _architecture(released) not in ("InternLM2ForCausalLM", "Qwen2ForCausalLM"):
        raise released.refuse(
            "llm_config.architectures", "InternLM2ForCausalLM and Qwen2ForCausalLM language models are converted"
        )
    if released.get("ps_version", str) != "v2":
        raise released.refuse("ps_version", "transformers shuffles pixels as version 'v2' only")
    if released.get("pad2square", bool):
        raise released.refuse("pad2square", "transformers' processor does not pad images to squares")
    if released.get("dynamic_image_size", bool) and not released.get("use_thumbnail", bool):
        raise released.refuse("use_thumbnail", "transformers' processor always adds a thumbnail to tiles")
    return released


def _architecture(released: Released) -> str:
    architectures = released.get("llm_config.architectures", list)
    return str(architectures[0]) if architectures else ""


def head_name(released: Released) -> str:
    """Name of the output head's tensor in the released layout."""
    output = "output" if _architecture(released) == "InternLM2ForCausalLM" else "lm_head"
    return f"language_model.{output}.weight"


def _image_size(released: Released) -> int:
    forced = released.get("force_image_size", (int, type(None)))
    return forced or released.get("vision_config.image_size", int)


def convert_config(released: Released, image_token_id: int, tied: bool) -> InternVLConfig:
    """
    Write the released configuration as transformers' own.

    Args:
        released ([`Released`]):
            The released configuration.
        image_token_id (`int`):
            Id of the token that image features take the place of.
        tied (`bool`):
            Whether the output head is the embedding matrix; the released weights say so by leaving it out.
    """
    if tied and not released.get("llm_config.tie_word_embeddings", bool):
        raise ValueError(f"{released.file.parent}: the tensor '{head_name(released)}' is missing")
    patch_size = released.get("vision_config.patch_size", int)
    ratio = released.get("downsample_ratio", (int, float))
    vision = {
        "hidden_size": released.get("vision_config.hidden_size", int),
        "intermediate_size": released.get("vision_config.intermediate_size", int),
        "num_hidden_layers": released.get("vision_config.num_hidden_layers", int),
        "num_attention_heads": released.get("vision_config.num_attention_heads", int),
        "num_channels": released.get("vision_config.num_channels", int),
        "image_size": released.get("vision_config.image_size", int),
        "patch_size": patch_size,
        "attention_bias": released.get("vision_config.qkv_bias", bool),
        "use_qk_norm": released.get("vision_config.qk_normalization", bool),
        "hidden_act": released.get("vision_config.hidden_act", str),
        "norm_type": released.get("vision_config.norm_type", str),
        "layer_norm_eps": released.get("vision_config.layer_norm_eps", float),
        "attention_dropout": released.get("vision_config.attention_dropout", (int, float)),
        "projection_dropout": released.get("vision_config.dropout", (int, float)),
    }
    return InternVLConfig(
        vision_config=vision,
        text_config=_convert_text_config(released, tied),
        image_token_id=image_token_id,
        image_seq_length=int((_image_size(released) // patch_size) ** 2 * ratio**2),
        downsample_ratio=ratio,
        vision_feature_layer=released.get("select_layer", int),
        tie_word_embeddings=tied,
        architectures=["InternVLForConditionalGeneration"],
    )


def _convert_text_config(released: Released, tied: bool) -> PreTrainedConfig:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": released.get("llm_config.rope_theta", (int, float))}
    scaling = released.values["llm_config"].get("rope_scaling")
    if scaling is not None:
        rope["rope_type"] = released.get("llm_config.rope_scaling.type", str)
        rope["factor"] = released.get("llm_config.rope_scaling.factor", (int, float))
        if rope["rope_type"] not in ("dynamic", "linear") or set(scaling) != {"type", "factor"}:
            raise released.refuse(
                "llm_config.rope_scaling", "only types 'dynamic' and 'linear' with a factor are known"
            )
    common: dict[str, Any] = {
        "vocab_size": released.get("llm_config.vocab_size", int),
        "hidden_size": released.get("llm_config.hidden_size", int),
        "intermediate_size": released.get("llm_config.intermediate_size", int),
        "num_hidden_layers": released.get("llm_config.num_hidden_layers", int),
        "num_attention_heads": released.get("llm_config.num_attention_heads", int),
        "num_key_value_heads": released.get("llm_config.num_key_value_heads", int),
        "hidden_act": released.get("llm_config.hidden_act", str),
        "max_position_embeddings": released.get("llm_config.max_position_embeddings", int),
        "initializer_range": released.get("llm_config.initializer_range", (int, float)),
        "rms_norm_eps": released.get("llm_config.rms_norm_eps", float),
        "bos_token_id": released.get("llm_config.bos_token_id", (int, type(None))),
        "eos_token_id": released.get("llm_config.eos_token_id", (int, type(None))),
        "pad_token_id": released.get("llm_config.pad_token_id", (int, type(None))),
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
    }
    if _architecture(released) == "InternLM2ForCausalLM":
        return LlamaConfig(**common, attention_bias=released.get("llm_config.bias", bool))
    return Qwen2Config(
        **common,
        attention_dropout=released.get("llm_config.attention_dropout", (int, float)),
        use_sliding_window=released.get("llm_config.use_sliding_window", bool),
        sliding_window=released.get("llm_config.sliding_window", (int, type(None))),
        max_window_layers=released.get("llm_config.max_window_layers", int),
    )


def image_processors(released: Released) -> tuple[GotOcr2ImageProcessor, InternVLVideoProcessor]:
    """Dynamic tiling: the grid of tiles whose aspect ratio is closest to the image's, and a thumbnail behind them."""
    size = _image_size(released)
    dynamic = released.get("dynamic_image_size", bool)
    common: dict[str, Any] = {
        "size": {"height": size, "width": size},
        "image_mean": _IMAGE_MEAN,
        "image_std": _IMAGE_STD,
        "resample": Resampling.BICUBIC,
    }
    image_processor = GotOcr2ImageProcessor(
        **common,
        crop_to_patches=True,
        # The processor asks for tiles in any case: one tile is the whole picture.
        min_patches=released.get("min_dynamic_patch", int) if dynamic else 1,
        max_patches=released.get("max_dynamic_patch", int) if dynamic else 1,
    )
    return image_processor, InternVLVideoProcessor(**common)
