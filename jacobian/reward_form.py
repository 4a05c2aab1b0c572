"""The two forms of reward models, see `cepo.jacobian.reward_model`; apart from it, to be checked without torch."""

from typing import Literal

Form = Literal["bradley-terry", "pairwise"]
