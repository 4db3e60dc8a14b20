"""Devices and processes: the mesh, the lift of a step over it, several hosts, and signals that ask to stop.

Begin with `mesh`; `multihost` joins processes, `preemption` catches SIGTERM, `hardware` knows the chips.
"""
