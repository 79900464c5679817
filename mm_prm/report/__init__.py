"""What a person looks at: one HTML page, its plots as pictures, and the lines of the tables."""

from .render import render_report
from .summary import SummaryRow, curve_lines, format_difference, format_estimate, summary_rows

__all__ = [
    "SummaryRow",
    "curve_lines",
    "format_difference",
    "format_estimate",
    "render_report",
    "summary_rows",
]
