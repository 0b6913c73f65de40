"""Charts."""

CHARTS = ()
