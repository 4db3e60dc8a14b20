"""Devices and processes: the mesh, a step run on all of them, several hosts, and signals that ask to stop.

Begin with `mesh`; `multihost` joins processes, `preemption` catches SIGTERM, `hardware` knows the chips.
"""
