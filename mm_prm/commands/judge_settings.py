"""Which judge a command uses: the settings that commands share, and the judge they stand for."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mm_prm.annotation.protocols import Judge


@dataclass(kw_only=True)
class JudgeSettings:
    """
    Who checks the answers.

    Args:
        judge (`str`, *optional*, defaults to `"rules"`):
            Rules (math-verify and choice letters), a language model (`llm`) behind an OpenAI-compatible server, or a
            `cascade`: rules, and the language model for what they leave open.
        judge_timeout_seconds (`float`, *optional*, defaults to `5.0`):
            Time limit of one comparison of formulas.
        judge_model (`str`, *optional*):
            Name under which the servers serve the language model.
        judge_base_urls (`list[str]`, *optional*):
            Addresses of its servers, up to and including /v1. The key is read from OPENAI_API_KEY.
        judge_cache (`str`, *optional*):
            SQLite file that keeps the language model's verdicts from run to run.
        judge_max_concurrency (`int`, *optional*, defaults to `64`):
            Most requests to the language model under way at once.
        judge_request_seconds (`float`, *optional*, defaults to `60.0`):
            Time limit of one attempt at a request to the language model.
        judge_max_retries (`int`, *optional*, defaults to `5`):
            Most attempts at a request to the language model after the first.
    """

    judge: Literal["rules", "llm", "cascade"] = "rules"
    judge_timeout_seconds: float = 5.0
    judge_model: str | None = None
    judge_base_urls: list[str] | None = None
    judge_cache: str | None = None
    judge_max_concurrency: int = 64
    judge_request_seconds: float = 60.0
    judge_max_retries: int = 5

    def check_judge(self) -> None:
        """Raises `ValueError` where settings are missing that the judge needs."""
        if self.judge == "rules":
            for name in ("judge_model", "judge_base_urls", "judge_cache"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: rules ask no language model: set judge to 'cascade' or 'llm'")
        elif self.judge_model is None or not self.judge_base_urls:
            missing = "judge_base_urls" if self.judge_model else "judge_model"
            raise ValueError(f"{missing}: is needed where judge is {self.judge!r}")

    def open_judge(self) -> "Judge":
        """Opens the judge; the servers of a language model have to answer."""
        from mm_prm.judges import CascadeJudge, RulesJudge

        self.check_judge()
        if self.judge == "rules":
            return RulesJudge(self.judge_timeout_seconds)
        if self.judge == "llm":
            return self.open_language_model()
        return CascadeJudge(RulesJudge(self.judge_timeout_seconds), self.open_language_model())

    def open_language_model(self) -> "Judge":
        """Opens the language model, behind its cache if there is one."""
        from mm_prm.judges import CachedJudge
        from mm_prm.judges.llm import LLMJudge

        judge = LLMJudge(
            self.judge_model or "",
            self.judge_base_urls or [],
            max_concurrency=self.judge_max_concurrency,
            timeout_seconds=self.judge_request_seconds,
            max_retries=self.judge_max_retries,
        )
        return judge if self.judge_cache is None else CachedJudge(judge, self.judge_cache, judge.identity)

    def judge_identity(self) -> str:
        """What the judge is, for the journal's key: whatever changes a verdict."""
        from mm_prm.annotation.identity import describe
        from mm_prm.judges import CascadeJudge, RulesJudge

        settings: dict[str, Any] = {"timeout_seconds": self.judge_timeout_seconds}
        if self.judge == "rules":
            return describe(RulesJudge, None, settings, RulesJudge.packages)
        from mm_prm.judges.llm import LLMJudge, language_model_identity

        model = {"language_model": language_model_identity(self.judge_model or "")}
        if self.judge == "llm":
            return describe(LLMJudge, None, model)
        return describe(CascadeJudge, None, settings | model, RulesJudge.packages)
