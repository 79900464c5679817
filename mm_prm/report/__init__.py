"""What a person looks at: one HTML page, the curve as a picture, and the lines of the table."""

from .plots import plot_curve
from .render import render_report
from .summary import SummaryRow, curve_lines, format_difference, format_estimate, summary_rows

__all__ = [
    "SummaryRow",
    "curve_lines",
    "format_difference",
    "format_estimate",
    "plot_curve",
    "render_report",
    "summary_rows",
]
