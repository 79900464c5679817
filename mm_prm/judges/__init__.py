"""Who checks answers: judges that compare the final answer of a solution with the gold answer."""

from .rules import RulesJudge

__all__ = ["RulesJudge"]
