"""Sweeps: many runs of one experiment, trained as one program, and their report.

Begin with `grid`, which says what the members are, and `fit_sweep`, which trains them; `results` reads them from their folder,
and `report` writes the table, the figures and the page.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
