r"""
When a prefix has enough rollouts: a sequential test, so that prefixes whose value is plain cost a few only.

A prefix begins with 4 rollouts and gets 4 more as long as its label is undecided. With \\( r \\) right among the \\( n \\)
judged rollouts of the tree that pass through it, wherever they began (these are what [`~mm_prm.data.rows.RowConfig`]
pools for the label, too), the label is decided

- at one of the ends, \\( r = 0 \\) or \\( r = n \\), as soon as \\( n \ge 6 \\);
- in between, as soon as \\( n \ge \frac32 N \\), N being `num_rollouts`.

Error bounds, for independent rollouts: a prefix that comes right with probability p is labelled 0 by the first rule with
probability at most \\( (1 - p)^6 \\), whatever comes later (12 % for p = 0.3, 1.6 % for p = 0.5), and 1 with at most
\\( p^6 \\); a label in between has a standard error of at most \\( 1 / (2 \sqrt{3 N / 2}) \\), for N = 16 0.10 where a
fixed 16 has 0.125. What is saved at the ends, where most prefixes of a search lie, pays for the more in between. (The
rollout whose search led to the prefix was wrong, and counts among the n, as it does in pooled labels.)
"""

# Rollouts of the first request and of each further one.
ROLLOUTS_AT_ONCE = 4
_ENOUGH_ALIKE = 6


def is_decided(num_right: int, num_judged: int, num_rollouts: int) -> bool:
    """
    Whether a label needs no more rollouts.

    Args:
        num_right (`int`):
            Judged rollouts through the prefix that end right.
        num_judged (`int`):
            All judged rollouts through the prefix.
        num_rollouts (`int`):
            The setting of that name.
    """
    if num_right in (0, num_judged):
        return num_judged >= _ENOUGH_ALIKE
    return num_judged >= most_rollouts(num_rollouts)


def most_rollouts(num_rollouts: int) -> int:
    """Most rollouts that one prefix gets, and so many through it are always enough."""
    return num_rollouts * 3 // 2
