"""Policies: who computes what. A router takes rows and a context and gives a `RoutingPlan`; it computes no expert.

| router | chooses | paper |
|---|---|---|
| `TopKRouter`, `NoisyTopKRouter` | the k best scores, without or with learned noise | Shazeer et al., MoKGR |
| `AdaptiveRouter` | one expert where it leads by far, else two | adaptive gating |
| `ExpertChoiceRouter` | each expert its best rows | expert choice |
| `LanguageRouter` | the expert of the language, or of its family, and the agnostic one by reliability | MoLE |
| `LanguageGroupRouter` | the group of the language, and top-k inside it | DLG-MoE |
| `ForcedLabelRouter` | top-k with the expert of the true language among them | Post-MoE |
| `CentroidRouter`, `MLPRouter`, `OracleRouter` | slices of a dense FFN that fire most | MoEfication |
| `PseudoLabelRouter` | slices of a dense FFN that come closest to its output | FactorLLM |
"""

from mole_asr.moe.routers.adaptive import AdaptiveRouter
from mole_asr.moe.routers.base import LinearRouter, Router, RoutingContext
from mole_asr.moe.routers.expert_choice import ExpertChoiceRouter
from mole_asr.moe.routers.families import Families
from mole_asr.moe.routers.forced_label import ForcedLabelRouter
from mole_asr.moe.routers.language import LanguageRouter, Reliability
from mole_asr.moe.routers.language_group import LanguageGroupRouter
from mole_asr.moe.routers.slices import (
    CentroidRouter,
    MLPRouter,
    OracleRouter,
    PseudoLabelRouter,
    expert_centroids,
)
from mole_asr.moe.routers.top_k import NoisyTopKRouter, TopKRouter

__all__ = [
    "AdaptiveRouter",
    "CentroidRouter",
    "ExpertChoiceRouter",
    "Families",
    "ForcedLabelRouter",
    "LanguageGroupRouter",
    "LanguageRouter",
    "LinearRouter",
    "MLPRouter",
    "NoisyTopKRouter",
    "OracleRouter",
    "PseudoLabelRouter",
    "Reliability",
    "Router",
    "RoutingContext",
    "TopKRouter",
    "expert_centroids",
]
