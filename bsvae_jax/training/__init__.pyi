from .state import build_model, create_state
from .step import TrainState, train_step

__all__ = [
    "TrainState",
    "build_model",
    "create_state",
    "train_step",
]
