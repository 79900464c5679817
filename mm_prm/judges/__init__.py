"""Who checks answers: judges that compare the final answer of a solution with the gold answer."""

from .cache import CachedJudge
from .cascade import CascadeJudge
from .rules import RulesJudge

__all__ = ["CachedJudge", "CascadeJudge", "RulesJudge"]
