"""Sweeps: many runs of one experiment, trained as one program, and their report.

Begin with `grid`, which says what the members are, and `fit_sweep`, which trains them; `results` reads them from their folder,
and `report` writes the table, the figures and the page.
"""
