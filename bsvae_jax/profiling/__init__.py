"""How fast it trains: measured here, and computed for machines that are not at hand.

Begin with `benchmark`, which times the training program on this machine; `aot` compiles it ahead of time for others;
`cost_analysis` reads what a compiled program costs. Numbers measured are in the first lines of the configs, computed ones for
TPUs in `notebooks/scaling.ipynb`.
"""
