"""The losses, one a file, behind one registry."""

from prefkern.losses.autoregressive_dpo import AutoregressiveDPO
from prefkern.losses.base import Loss, PairLoss, get, loss_class, names, options, register
from prefkern.losses.dpo import DPO
from prefkern.losses.ipo import IPO
from prefkern.losses.nll import NLL
from prefkern.losses.simpo import SimPO

__all__ = [
    "DPO", "IPO", "NLL", "AutoregressiveDPO", "Loss", "PairLoss", "SimPO", "get", "loss_class", "names", "options",
    "register",
]  # fmt: skip
