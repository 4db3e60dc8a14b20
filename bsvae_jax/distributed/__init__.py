"""Devices and processes: the mesh, a step run on all of them, several hosts, and signals that ask to stop.

Begin with `mesh`; `multihost` joins processes, `preemption` catches SIGTERM, `hardware` knows the chips.

Of several processes, one a machine, every one needs the data and the same command; configs, libraries or images that differ
are refused before anything is computed, with what differs. SIGTERM to any of them stops and saves all. A process that is
missing at the start, or a port that is taken, is said within `--connect-timeout` seconds (60). If one dies later, JAX's
heartbeat (30 s) ends the others with a stack trace and, below it, a sentence; the same command continues from the last
checkpoint, on any number of devices or processes. On a Cloud TPU pod:

    gcloud compute tpus tpu-vm ssh POD --worker=all --command "bsvae train configs/celeba_paper.py --distributed"
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
