"""Which policy a command uses: its settings, and the policy they stand for."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mm_prm.commands import reading_input

if TYPE_CHECKING:
    from mm_prm.annotation.protocols import Policy

# What each engine alone understands: a setting of another engine would be ignored in silence.
_OF_ENGINE = {
    "transformers": ("policy_batch_size", "policy_device"),
    "vllm": (
        "policy_max_model_len",
        "policy_gpu_memory_utilization",
        "policy_tensor_parallel_size",
        "policy_num_engines",
    ),
    "server": (
        "policy_base_urls",
        "policy_tokenizer",
        "policy_max_concurrency",
        "policy_request_seconds",
        "policy_max_retries",
    ),
}


@dataclass(kw_only=True)
class PolicySettings:
    """
    Who writes the solutions.

    Args:
        policy (`str`, *optional*, defaults to `"mini-policy"`):
            Model that writes the solutions: a folder, a Hub repository, or mini-policy for the embedded one; the name
            under which it is served where policy_engine is server.
        policy_engine (`str`, *optional*, defaults to `"transformers"`):
            What runs the model: transformers, vllm in this process, or a server that speaks OpenAI's protocol.
        policy_temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        policy_top_k (`int`, *optional*, defaults to `50`):
            Number of most probable tokens to sample from; 0 takes all, and is for servers that do not know it.
        policy_top_p (`float`, *optional*, defaults to `0.9`):
            Samples from the smallest set of most probable tokens whose probability reaches this; 1 takes all.
        policy_max_new_tokens (`int`, *optional*, defaults to `256`):
            Most tokens of a rollout.
        policy_step_format (`str`, *optional*, defaults to `"paragraphs"`):
            How the policy writes its steps: blank lines between paragraphs, `<step>` tags, or "Step k:".
        policy_dtype (`str`, *optional*):
            Type of the weights, for example bfloat16; that of the checkpoint if not given. vLLM on a CPU can be several
            times faster in float32.
        policy_batch_size (`int`, *optional*, defaults to `256`):
            transformers: most rollouts computed at once. A GPU wants thousands for a small model.
        policy_device (`str`, *optional*):
            transformers: where to compute, for example cuda:0; the GPU if there is one.
        policy_max_model_len (`int`, *optional*):
            vllm: most tokens of prompt and rollout together; what the model allows if not given.
        policy_gpu_memory_utilization (`float`, *optional*):
            vllm: share of a GPU's memory that the engines on it take.
        policy_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            vllm: number of GPUs over which the model is spread.
        policy_num_engines (`int`, *optional*, defaults to `1`):
            vllm: number of engines, each with a copy of the model, that share the GPUs, or the CPU's cores. Several write
            more where the model is small, and one on each of several GPUs.
        policy_base_urls (`list[str]`, *optional*):
            server: addresses of one or more servers, up to and including /v1. The key is read from OPENAI_API_KEY.
        policy_tokenizer (`str`, *optional*):
            server: folder or Hub repository of the tokenizer, whose special tokens questions and steps must not spell.
        policy_max_concurrency (`int`, *optional*, defaults to `64`):
            server: most requests under way at once.
        policy_request_seconds (`float`, *optional*, defaults to `600.0`):
            server: time limit of one attempt at a request.
        policy_max_retries (`int`, *optional*, defaults to `5`):
            server: most attempts at a request after the first.
    """

    policy: str = "mini-policy"
    policy_engine: Literal["transformers", "vllm", "server"] = "transformers"
    policy_temperature: float = 1.0
    policy_top_k: int = 50
    policy_top_p: float = 0.9
    policy_max_new_tokens: int = 256
    policy_step_format: Literal["paragraphs", "tags", "numbered"] = "paragraphs"
    policy_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    policy_batch_size: int = 256
    policy_device: str | None = None
    policy_max_model_len: int | None = None
    policy_gpu_memory_utilization: float | None = None
    policy_tensor_parallel_size: int = 1
    policy_num_engines: int = 1
    policy_base_urls: list[str] | None = None
    policy_tokenizer: str | None = None
    policy_max_concurrency: int = 64
    policy_request_seconds: float = 600.0
    policy_max_retries: int = 5

    def policy_settings(self) -> dict[str, Any]:
        """Settings of the policy that change its rollouts, and so belong to its identity."""
        settings: dict[str, Any] = {
            "temperature": self.policy_temperature,
            "top_k": self.policy_top_k,
            "top_p": self.policy_top_p,
            "max_new_tokens": self.policy_max_new_tokens,
            "step_format": self.policy_step_format,
        }
        if self.policy_engine == "transformers":
            from mm_prm.policies.settings import default_dtype

            return settings | {"dtype": self.policy_dtype or default_dtype(self.policy_device)}
        if self.policy_engine == "vllm":
            settings["dtype"] = self.policy_dtype
            if self.policy_max_model_len is not None:  # it cuts rollouts, too
                settings["max_model_len"] = self.policy_max_model_len
        return settings

    def check_policy(self) -> None:
        """Raises `ValueError` where settings do not go together."""
        if self.policy_engine == "server" and not self.policy_base_urls:
            raise ValueError("policy_base_urls: is needed where policy_engine is 'server'")
        if self.policy_engine == "server" and self.policy_dtype is not None:
            raise ValueError("policy_dtype: the server decides that; leave it out")
        defaults = PolicySettings()
        for engine, names in _OF_ENGINE.items():
            for name in names:
                if engine != self.policy_engine and getattr(self, name) != getattr(defaults, name):
                    raise ValueError(
                        f"{name}: is a setting of policy_engine {engine!r}, not of {self.policy_engine!r}"
                    )

    def policy_identity(self) -> str:
        """What the policy is, for the journal's key."""
        from mm_prm.annotation.identity import checkpoint_identity, describe

        with reading_input("policy", self.policy):
            if self.policy_engine == "server":
                # A server's address says nothing about its model, and may change from run to run.
                settings = {"model": self.policy, **self.policy_settings()}
                if self.policy_tokenizer is not None:  # its special tokens are broken up in what is sent
                    settings["tokenizer"] = checkpoint_identity(self.policy_tokenizer)
                return describe(self._opener(), None, settings)
            return describe(self._opener(), self._path(), self.policy_settings())

    def open_policy(self) -> "Policy":
        """Opens the policy: loads the model, or asks the servers; what cannot be had is told with its name."""
        with reading_input("policy", self.policy):
            self.check_policy()
            opener: Any = self._opener()
            settings = self.policy_settings()
            if self.policy_engine == "server":
                return opener(
                    self.policy,
                    self.policy_base_urls,
                    tokenizer=self.policy_tokenizer,
                    max_concurrency=self.policy_max_concurrency,
                    timeout_seconds=self.policy_request_seconds,
                    max_retries=self.policy_max_retries,
                    **settings,
                )
            if self.policy_engine == "vllm":
                engine: dict[str, Any] = {
                    "gpu_memory_utilization": self.policy_gpu_memory_utilization,
                    "tensor_parallel_size": self.policy_tensor_parallel_size,
                    "num_engines": self.policy_num_engines,
                }
                given = {name: value for name, value in engine.items() if value is not None}
                return opener(self._path(), **settings, **given)
            return opener(self._path(), device=self.policy_device, batch_size=self.policy_batch_size, **settings)

    def _opener(self) -> Any:
        if self.policy_engine == "server":
            from mm_prm.policies.openai import OpenAIPolicy

            return OpenAIPolicy
        if self.policy_engine == "vllm":
            from mm_prm.policies.vllm import VLLMPolicy

            return VLLMPolicy
        from mm_prm.policies.transformers import TransformersPolicy

        return TransformersPolicy.from_pretrained

    def _path(self) -> str:
        from mm_prm.embedded import model_path

        return model_path(self.policy)
