"""
The process in which math-verify runs: reads one JSON line [gold, answer], writes one JSON line back.

It is started as a file with the time limit of a comparison in seconds, imports nothing of this package, and is killed when
it takes too long: a LaTeX bomb can keep computer algebra busy, or eat all memory, in code that no signal and no thread can
interrupt. If the process that would kill it was killed itself, the system's own limit of processor time ends it.
"""

import contextlib
import json
import logging
import os
import sys
import time

_MOST_MEMORY = 4 * 2**30


def _limit(name: str, most: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError, OverflowError):  # not every system can limit a process
        import resource

        kind = getattr(resource, name)
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


def main() -> None:
    timeout_seconds = float(sys.argv[1])
    _limit("RLIMIT_AS", _MOST_MEMORY)
    replies = sys.stdout
    sys.stdout = sys.stderr  # nothing but replies goes into the pipe
    logging.disable(logging.WARNING)
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Basic, MatrixBase

    # Units were compared before; removed here, 40 cm and 40 m would be equal.
    config = LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
        )
    )

    def expressions(latex: str) -> list:
        # The whole answer as one formula, never a part of it: "2" is not the answer "12 or 2".
        found = parse(f"${latex}$", [config], fallback_mode="no_fallback", parsing_timeout=None)
        return [item for item in found if isinstance(item, Basic | MatrixBase)]

    def compare(gold_latex: str, answer_latex: str) -> str:
        gold = expressions(gold_latex)
        if not gold:
            return "gold"
        answer = expressions(answer_latex)
        if not answer:
            return "answer"
        return "equal" if verify(gold, answer, timeout_seconds=None) else "different"

    print("ready", file=replies, flush=True)
    with contextlib.suppress(OSError):  # whatever sympy says from now on would fill a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for line in sys.stdin:
        _limit("RLIMIT_CPU", int(time.process_time() + timeout_seconds) + 2)
        try:
            outcome = compare(*json.loads(line))
        except (Exception, RecursionError, MemoryError) as error:  # sympy raises anything
            outcome = f"error: {type(error).__name__}"
        print(json.dumps(outcome), file=replies, flush=True)


if __name__ == "__main__":
    main()
