"""Which process reward model a command uses: its settings, and the scorer they stand for."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from mm_prm.commands import reading_input

if TYPE_CHECKING:
    from mm_prm.inference import Scorer, ServedScorer, VLLMScorer

_DEFAULT_MODEL = "mini-prm"
# What each engine alone understands: a setting of another engine would be ignored in silence.
_OF_ENGINE = {
    "transformers": ("device", "max_tokens", "share_prefix", "compile_layers"),
    "vllm": ("max_model_len", "gpu_memory_utilization", "tensor_parallel_size"),
    "server": ("base_url", "max_concurrency"),
}


@dataclass(kw_only=True)
class ScorerSettings:
    """
    Which process reward model gives the scores.

    Args:
        model (`str`, *optional*):
            Process reward model: a folder, a Hub repository, or mini-prm for the embedded one, which is taken if none is
            given. With a server, where its processor lies; where the server has the model from if not given.
        engine (`str`, *optional*):
            What runs the model: transformers, vllm in this process, or a server that `mm-prm serve` started. If not
            given, the server where there is a base_url, else transformers.
        dtype (`str`, *optional*):
            Type of the weights; that of the checkpoint if not given. A server decides that itself.
        device (`str`, *optional*):
            transformers: where to compute, for example cuda:0; the GPU if there is one.
        max_tokens (`int`, *optional*, defaults to `16384`):
            transformers: largest number of tokens of a batch, padding included.
        share_prefix (`bool`, *optional*, defaults to `True`):
            transformers: whether what the candidates of a problem share is computed once. Small models on fast GPUs may
            do better without.
        compile_layers (`bool`, *optional*):
            transformers: whether the language model's layers are compiled: some seconds before the first scores, and faster
            from then on. If not given, on a GPU.
        max_model_len (`int`, *optional*):
            vllm: longest sequence in tokens; the model's own limit, but not above 16384, if not given.
        gpu_memory_utilization (`float`, *optional*):
            vllm: share of the GPU's memory that the engine takes.
        tensor_parallel_size (`int`, *optional*, defaults to `1`):
            vllm: number of GPUs over which the model is spread.
        base_url (`str`, *optional*):
            server: its address.
        max_concurrency (`int`, *optional*, defaults to `16`):
            server: most requests at once.
    """

    model: str | None = None
    engine: Literal["transformers", "vllm", "server"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    max_tokens: int = 16384
    share_prefix: bool = True
    compile_layers: bool | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    tensor_parallel_size: int = 1
    base_url: str | None = None
    max_concurrency: int = 16

    def check_scorer(self) -> None:
        """Raises `ValueError` where settings do not go together."""
        engine = self._model_engine()
        if engine == "server" and self.base_url is None:
            raise ValueError("base_url: is needed where engine is 'server'")
        if engine == "server" and self.dtype is not None:
            raise ValueError("dtype: the server decides that; leave it out")
        defaults = ScorerSettings()
        for owner, names in _OF_ENGINE.items():
            for name in names:
                if owner != engine and getattr(self, name) != getattr(defaults, name):
                    raise ValueError(f"{name}: is a setting of engine {owner!r}, not of {engine!r}")

    def open_scorer(self) -> "Scorer | VLLMScorer | ServedScorer":
        """Opens the scorer: loads the model, or asks the server; what cannot be had is told with its name."""
        from mm_prm.embedded import model_path
        from mm_prm.inference import Scorer, ServedScorer, VLLMScorer

        with self._reading_model():
            if self.base_url is not None:
                return ServedScorer(self.base_url, self.model, max_concurrency=self.max_concurrency)
            path = model_path(self.model or _DEFAULT_MODEL)
            if self._model_engine() == "vllm":
                engine: dict[str, Any] = {
                    "gpu_memory_utilization": self.gpu_memory_utilization,
                    "tensor_parallel_size": self.tensor_parallel_size,
                }
                given = {name: value for name, value in engine.items() if value is not None}
                try:
                    return VLLMScorer(path, dtype=self.dtype, max_model_len=self.max_model_len, **given)
                except ImportError as error:
                    raise ValueError(str(error)) from error
            return Scorer.from_pretrained(
                path,
                dtype=self.dtype,
                device=self.device,
                compile_layers=self.compile_layers,
                max_tokens=self.max_tokens,
                share_prefix=self.share_prefix,
            )

    def find_model(self) -> str:
        """The model's name: the one that is set, that of the server, or else of the embedded one."""
        from mm_prm.inference import ServedScorer

        if self.model is not None or self.base_url is None:
            return self.model or _DEFAULT_MODEL
        with self._reading_model():
            return ServedScorer(self.base_url).model

    def check_model(self) -> None:
        """Says, without its weights, where a model cannot be had or is no process reward model."""
        from mm_prm.embedded import model_path
        from mm_prm.models import ProcessRewardProcessor

        if self.base_url is not None:
            return
        _ = self.model_checkpoint  # a folder that is not there has no digest
        with self._reading_model():
            ProcessRewardProcessor.from_pretrained(model_path(self.model or _DEFAULT_MODEL))

    def scorer_identity(self) -> str:
        """What gives the scores, for the journal's key. A server is asked which model it has, if none is given."""
        from mm_prm.evaluation import scorer_identity

        return scorer_identity(self.model_checkpoint, self._model_engine(), self.dtype)

    @cached_property
    def model_checkpoint(self) -> str | list[str]:
        """What the model's checkpoint is: its digest, for which a local one is read once, or name and revision."""
        from mm_prm.annotation.identity import checkpoint_identity
        from mm_prm.embedded import model_path

        model = self.find_model()
        with self._reading_model():
            return checkpoint_identity(model_path(model))

    def _model_engine(self) -> str:
        return self.engine or ("transformers" if self.base_url is None else "server")

    def _reading_model(self) -> AbstractContextManager[None]:
        if self.base_url is not None:
            return reading_input("base_url", self.base_url)
        return reading_input("model", self.model or _DEFAULT_MODEL)
