"""How the members of a sweep share a program, from what was measured and counted."""

from bsvae_jax.config import Config
from bsvae_jax.distributed.mesh import Execution

MANY_PIXELS = 2**18
"""Of a batch, from which on a step of one member of a convolutional network fills a GPU in float32."""


def choose_execution(config: Config, platform: str, pixels: int = 0) -> Execution:
    """How to drive a stack, from measurement on CPU and by the compiler's counts elsewhere.

    On CPU, XLA runs convolutions slowly under `vmap` and inside loops, so such members take turns, one compiled step for all.
    Dense networks run there at least as fast one after the other in one call as side by side, with results that do not depend
    on how many there are; with a CPU device for each core, which `bsvae sweep` makes, as many at a time. Accelerators are
    filled by batched products; but on a GPU convolutions side by side move half as many bytes more, which does not pay where
    one member's arithmetic takes longer than its launches (`Execution`).

    Args:
      config: of any member.
      platform: of the devices.
      pixels: of one image; 0: not known yet.
    """
    if platform == "cpu":
        return "loop" if config.network.convolutional else "scan"
    fills = config.precision != "bfloat16" and config.batch_size * pixels >= MANY_PIXELS
    return "scan" if platform == "gpu" and config.network.convolutional and fills else "vmap"
