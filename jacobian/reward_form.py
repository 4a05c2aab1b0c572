"""The two forms of reward models, see `cepo.jacobian.reward_model`; without torch, so that others are refused early."""

from typing import Literal

Form = Literal["bradley-terry", "pairwise"]
