"""The README's first Python example runs as it stands, and tells right from wrong."""

import contextlib
import io
import re
from pathlib import Path


def test_scoring_example():
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "Scorer" in block)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    right, wrong = (
        [float(score) for score in re.findall(r"  (\d\.\d\d)", line)] for line in printed.getvalue().splitlines()
    )
    assert min(right) > min(wrong)
