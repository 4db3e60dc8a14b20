"""Devices and processes: the mesh, a step run on all of them, several hosts, and signals that ask to stop.

Begin with `mesh`; `multihost` joins processes, `preemption` catches SIGTERM, `hardware` knows the chips.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
