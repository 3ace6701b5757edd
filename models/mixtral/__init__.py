"""Mixtral: the plain model, its sharding table, its loss and the published size."""

from models.inputs import tokens as inputs
from models.mixtral.loss import loss_fn
from models.mixtral.model import Mixtral, MixtralConfig
from models.mixtral.presets import PRESETS, build
from models.mixtral.rules import RULES, WITHOUT_SP

__all__ = ["PRESETS", "RULES", "WITHOUT_SP", "Mixtral", "MixtralConfig", "build", "inputs", "loss_fn"]
