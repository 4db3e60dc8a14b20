from .mesh import DATA_AXIS, REPLICATED, SHARDED, data_mesh, describe_devices, parallelize, replicate, sweep_mesh

__all__ = [
    "DATA_AXIS",
    "REPLICATED",
    "SHARDED",
    "data_mesh",
    "describe_devices",
    "parallelize",
    "replicate",
    "sweep_mesh",
]
