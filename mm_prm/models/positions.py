"""
Positions of text and image tokens, computed where batches are formed.

Models of the Qwen-VL family derive them from the sizes of the images, image by image, in each forward pass: hundreds of
small operations, and the GPU waits. On the CPU, in a data loader's worker, nobody waits.
"""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import set_zero3_state
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

_MODEL_TYPES = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"})


class PositionPrecomputer:
    """
    Computes a batch's positions with the model's own functions, as inputs that its forward takes instead.

    Get one from [`PositionPrecomputer.for_model`]; it has no weights and may be sent to other processes.

    Args:
        core ([`~transformers.PreTrainedModel`]):
            The model without its head, of a supported family. Its weights are not used.
    """

    def __init__(self, core: PreTrainedModel):
        self.core: Any = core

    @classmethod
    def for_model(cls, model: torch.nn.Module) -> "PositionPrecomputer | None":
        """
        Returns a precomputer for a model, or `None` for an architecture that has nothing to gain from it.

        Args:
            model (`torch.nn.Module`):
                Any model, also with adapters.
        """
        core = cls._core(model)
        if core is None:
            return None
        config = copy.deepcopy(core.config)
        config._attn_implementation = "eager"  # nothing attends here, so no kernel has to be found
        # Under ZeRO-3 transformers would scatter even weights that do not exist
        with set_zero3_state(), torch.device("meta"):
            return cls(type(core)(config))

    @classmethod
    def can_have(cls, model: torch.nn.Module) -> bool:
        """
        Whether there is a precomputer for a model.

        Args:
            model (`torch.nn.Module`):
                Any model, also with adapters.
        """
        return cls._core(model) is not None

    @staticmethod
    def _core(model: torch.nn.Module) -> PreTrainedModel | None:
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module.config.model_type in _MODEL_TYPES:
                return cast(PreTrainedModel, module.base_model)
        return None

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """
        Returns the positions of a batch, to be passed to the model with it.

        Args:
            inputs (`Mapping[str, Any]`):
                What the processor made: tensors on the CPU.

        Returns:
            `dict[str, Any]`: `position_ids` (`torch.LongTensor` of shape `(3, batch_size, sequence_length)`) and, for the
            vision tower, the positions of patches and the borders of images and windows. Empty for a batch without images.
        """
        grid_thw = inputs.get("image_grid_thw")
        if grid_thw is None:
            return {}
        position_ids, _ = self.core.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=grid_thw,
            attention_mask=inputs["attention_mask"],
        )
        tower = self.core.visual
        borders = get_vision_cu_seqlens(grid_thw)
        positions = {
            "position_ids": position_ids,
            "image_position_ids": get_vision_position_ids(grid_thw, tower.spatial_merge_size),
            "image_cu_seqlens": borders,
            "image_max_seqlen": int(borders.diff().max()),
        }
        if hasattr(tower, "window_size"):
            window_index, window_borders = get_vision_window_index(
                grid_thw,
                spatial_merge_size=tower.spatial_merge_size,
                window_size=tower.window_size,
                patch_size=tower.patch_size,
            )
            positions["image_window_index"] = window_index
            positions["image_cu_window_seqlens"] = window_borders
            positions["image_max_window_seqlen"] = int(window_borders.diff().max())
        return positions
