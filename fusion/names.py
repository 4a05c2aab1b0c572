"""The names of scores and measures; without torch, so that bad settings are refused before it is imported."""

from __future__ import annotations

from typing import Literal

Score = Literal[
    "effect", "explained", "path", "influence", "phi", "phi_retained", "phi_influence", "influence_retained"
]
Measure = Literal["phi", "influence", "angles", "effect", "path", "order_leak"]
GRADIENT_SCORES: tuple[Score, ...] = ("influence", "phi", "phi_retained", "phi_influence", "influence_retained")
EFFECT_SCORES: tuple[Score, ...] = ("effect", "explained", "path")
PHI_SCORES: tuple[Score, ...] = ("phi", "phi_retained", "phi_influence")
INFLUENCE_SCORES: tuple[Score, ...] = ("influence", "phi_influence", "influence_retained")
