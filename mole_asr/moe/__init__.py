"""The shared mixture-of-experts core; knows nothing of speech or text and imports torch alone.

Router -> RoutingPlan -> dispatch -> rows. Read first: plan.py, dispatch.py, layer.py.
"""

from mole_asr.moe.dispatch import choose_backend, dispatch
from mole_asr.moe.experts import Experts
from mole_asr.moe.layer import MoELayer
from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.routers import (
    AdaptiveRouter,
    CentroidRouter,
    ExpertChoiceRouter,
    ForcedLabelRouter,
    LanguageGroupRouter,
    LanguageRouter,
    MLPRouter,
    NoisyTopKRouter,
    OracleRouter,
    PseudoLabelRouter,
    Router,
    RoutingContext,
    TopKRouter,
)
from mole_asr.moe.rows import PackedRows

__all__ = [
    "AdaptiveRouter",
    "CentroidRouter",
    "ExpertChoiceRouter",
    "Experts",
    "ForcedLabelRouter",
    "LanguageGroupRouter",
    "LanguageRouter",
    "MLPRouter",
    "MoELayer",
    "NoisyTopKRouter",
    "OracleRouter",
    "PackedRows",
    "PseudoLabelRouter",
    "Router",
    "RoutingContext",
    "RoutingPlan",
    "TopKRouter",
    "choose_backend",
    "dispatch",
]
