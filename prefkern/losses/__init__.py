"""The losses, one a file, behind one registry."""

from prefkern.losses.adadpo import AdaDPO
from prefkern.losses.alpha_divergence import AlphaDivergence
from prefkern.losses.alphadpo import AlphaDPO
from prefkern.losses.alphas import EffectiveSampleSize, FixedAlpha, RewardConfidenceGuarded
from prefkern.losses.anchored_listwise import AnchoredListwise
from prefkern.losses.anchored_pairwise import AnchoredPairwise
from prefkern.losses.aot import AOT
from prefkern.losses.aot_unpaired import AOTUnpaired
from prefkern.losses.apo_down import APODown
from prefkern.losses.apo_zero import APOZero
from prefkern.losses.autoregressive_dpo import AutoregressiveDPO
from prefkern.losses.base import Loss, PairLoss, get, loss_class, names, options, register
from prefkern.losses.bco import BCO
from prefkern.losses.combination import Combination
from prefkern.losses.cpo import CPO
from prefkern.losses.critical_token_dpo import CriticalTokenDPO
from prefkern.losses.discopop import DiscoPOP
from prefkern.losses.dpo import DPO
from prefkern.losses.exo import EXO
from prefkern.losses.f_divergence import DifferenceLoss
from prefkern.losses.hinge import Hinge
from prefkern.losses.ipo import IPO
from prefkern.losses.kto import KTO
from prefkern.losses.listwise import ListLoss
from prefkern.losses.nca import NCA
from prefkern.losses.nll import NLL
from prefkern.losses.orpo import ORPO
from prefkern.losses.rdpo import RDPO
from prefkern.losses.robust import Robust
from prefkern.losses.sigmoid_norm import SigmoidNorm
from prefkern.losses.simpo import SimPO
from prefkern.losses.sppo import SPPO
from prefkern.losses.targets import KDE, Given, PlackettLuce, RawSoftmax, Softmax
from prefkern.losses.tdpo import TDPO1, TDPO2
from prefkern.losses.temperatures import BatchGuarded, Entropy, Fixed, SmoothHybrid

__all__ = [
    "AOT", "AOTUnpaired", "AdaDPO", "AlphaDPO", "KTO",
    "AlphaDivergence", "AnchoredListwise", "AnchoredPairwise", "BatchGuarded", "EffectiveSampleSize", "Entropy",
    "Fixed", "FixedAlpha", "Given", "KDE", "ListLoss", "PlackettLuce", "RawSoftmax", "RewardConfidenceGuarded",
    "SmoothHybrid", "Softmax",
    "DPO", "IPO", "NLL", "AutoregressiveDPO", "Loss", "PairLoss", "SimPO", "get", "loss_class", "names", "options",
    "register",
    "CriticalTokenDPO", "TDPO1", "TDPO2",
    "APODown", "APOZero", "BCO", "CPO", "Combination", "DifferenceLoss", "DiscoPOP", "EXO", "Hinge", "NCA", "ORPO",
    "RDPO", "Robust", "SPPO", "SigmoidNorm",
]  # fmt: skip
