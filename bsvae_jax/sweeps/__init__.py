"""Sweeps: many runs of one experiment, trained as one program, and their report.

Begin with `grid`, which says what the members are, and `fit_sweep`, which trains them; `results` reads them from their folder,
`table` tables them, and `report` writes the table, the figures and the page. A new figure is a function of arrays in `plots`,
called in `report`.

Members that differ only in beta, seed, learning rate or a constant variance are arrays of one compiled program. How they are
executed is chosen from measurement (`--execution` forces it): on accelerators side by side (`vmap`), but one after the other
inside one call (`scan`) where one fills a GPU in float32, by the compiler's counts, and on CPU; or there call by call for
convolutions (`loop`), which XLA's CPU backend runs slowly inside loops and under `vmap`. Several devices share the members
first, then the batch; as many members are stacked as fit into memory. Measured on 2 CPU cores with `python
tests/benchmarks/stack_against_separate.py configs/digits.py --members 5 15 50 --epochs 100`: five members 26 s against 56 s in
processes of their own, fifteen 56 s against 167 s (compilation 7 s against 55 s), fifty of 30 epochs 54 s against 437 s.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
