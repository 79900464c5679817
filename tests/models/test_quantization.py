import importlib.util
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, BitsAndBytesConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mm_prm.models import AutoModelForProcessReward
from mm_prm.models.modeling import RewardHead

from .tiny_architectures import build_config, build_inputs

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


class WholeLinear(torch.nn.Linear):
    pass


@register_quantization_config("whole")
class WholeConfig(QuantizationConfigMixin):
    """Replaces every linear layer, the output head as well."""

    def __init__(self, **kwargs):
        self.quant_method = "whole"


@register_quantizer("whole")
class WholeQuantizer(HfQuantizer):
    requires_calibration = False
    is_trainable = False

    def is_serializable(self):
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear):
                new = WholeLinear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
                model.set_submodule(name, new)


@pytest.fixture(autouse=True)
def _code_cache(tmp_path, monkeypatch):
    # Code of repositories is copied there, and not where the user keeps it
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(params=["tied", "untied"])
def path(request, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForProcessReward.from_config(build_config("qwen2_vl", request.param == "tied"))
    model.save_pretrained(tmp_path / "prm")
    return tmp_path / "prm"


@torch.no_grad()
def _scores(model):
    return model.eval()(**build_inputs("qwen2_vl")).logits.softmax(-1)[..., 1]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_without_bitsandbytes_the_error_names_it(bits, path):
    with pytest.raises(ImportError, match="pip install -U bitsandbytes"):
        AutoModelForProcessReward.from_pretrained(path, quantization_config=BitsAndBytesConfig(**{bits: True}))


def test_a_quantised_head_is_refused_by_name(path):
    with pytest.raises(
        ValueError, match=r"output head 'lm_head' is quantised \(a WholeLinear\).*out of the quantisation"
    ):
        AutoModelForProcessReward.from_pretrained(path, quantization_config=WholeConfig())


@needs_bitsandbytes
@pytest.mark.parametrize(("bits", "tolerance"), [("load_in_8bit", 5e-3), ("load_in_4bit", 5e-2)])
def test_quantised_scores_are_close_and_the_head_stays_whole(bits, tolerance, path, tmp_path):
    whole = _scores(AutoModelForProcessReward.from_pretrained(path))
    model = AutoModelForProcessReward.from_pretrained(path, quantization_config=BitsAndBytesConfig(**{bits: True}))
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {"RewardHead", "Linear8bitLt" if bits == "load_in_8bit" else "Linear4bit"}
    assert type(model.get_output_embeddings()) is RewardHead
    scores = _scores(model)
    assert 0 < (scores - whole).abs().max() < tolerance

    model.save_pretrained(tmp_path / "quantised")
    assert torch.equal(_scores(AutoModelForProcessReward.from_pretrained(tmp_path / "quantised")), scores)
    travelled = AutoModelForTokenClassification.from_pretrained(tmp_path / "quantised", trust_remote_code=True)
    assert torch.equal(_scores(travelled), scores)


@needs_bitsandbytes
def test_a_stock_checkpoint_with_a_quantised_head_is_refused(tmp_path):
    AutoModelForProcessReward.from_config(build_config("qwen2", False)).save_pretrained(tmp_path / "prm")
    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["none"])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "prm", quantization_config=settings)
    stock.save_pretrained(tmp_path / "quantised")
    with pytest.raises(ValueError, match=r"output head 'lm_head' is quantised \(torch.int8 weights\)"):
        AutoModelForProcessReward.from_pretrained(tmp_path / "quantised")
