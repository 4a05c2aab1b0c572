"""Replace parts of a live model by kernels while the group engine runs it, and put everything back afterwards.

| operation | replaced if | otherwise |
| --- | --- | --- |
| attention | the head size is 16 to 128 | plain PyTorch, also batched |
| RMS norm, also per head | its class is a ...RMSNorm, and a trial finds h / rms(h) * w, or (1 + w) | its own forward |
| gated MLP | it has gate_proj, up_proj and down_proj, and a trial finds down(silu(gate) * up) | its own forward |
| head | a plain nn.Linear without bias whose output is the model's, unchanged, in a trial | logits and autograd |

In an MLP only silu(gate) * up is replaced: its linear layers are called as modules, so their adapters and hooks work.
Rotary embeddings are not replaced: layers call a function for them, not a module. In a sharded policy that is gathered
in step, the weights of norms and MLPs are not there to be tried, so these keep their own forwards.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cepo.kernels.attention.blocks import KEPT_BYTES
from cepo.kernels.attention.dispatch import HEAD_SIZES
from cepo.kernels.head.dispatch import head_log_likelihood, head_log_odds
from cepo.kernels.launch import Implementation, takes_over
from cepo.kernels.norm.dispatch import MAX_NORM_SIZE, rms_norm
from cepo.kernels.swiglu.dispatch import swiglu

logger = logging.getLogger("cepo")

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Swaps:
    """What the kernels replace in one model; by default nothing.

    Attributes:
        attention: the implementation of attention.
        head: the implementation of target functions at the head; "torch" goes through the model's logits.
        forwards: modules, each with the function that replaces its forward.
        kept_bytes: attention keeps its weights if a layer's scores take at most this many bytes, see `attend`.
    """

    attention: Implementation = "torch"
    head: Implementation = "torch"
    forwards: tuple[tuple[nn.Module, Forward], ...] = ()
    kept_bytes: int = KEPT_BYTES


def find_swaps(model: Any, forward: Callable[..., Any], implementation: Implementation) -> Swaps:
    """Find what the kernels can replace, by trials on the model's own modules.

    The model must be in eval mode. A trial compares values, so a norm with another formula is not replaced.

    Args:
        model: a causal LM, without PEFT's wrapper.
        forward: its class's forward method, called with the model.
        implementation: "torch" replaces nothing, and neither does "auto" if the model is not on CUDA or is in float64,
            the GPU is too old, or Triton is not installed. "triton" replaces everything that the kernels can serve.

    Raises:
        ValueError: if Triton is asked for by name and the model is in float64, or not on CUDA and not interpreted.
        RuntimeError: if Triton is needed and is missing.
    """
    embedding_VD = model.get_input_embeddings().weight
    if not takes_over(implementation, embedding_VD):
        return Swaps()
    with torch.no_grad():
        modules = [module for module in model.modules() if _is_whole(module)]
        norms = [(module, _norm_forward(module, embedding_VD.dtype, implementation)) for module in modules]
        mlps = [(module, _mlp_forward(module, embedding_VD.dtype, implementation)) for module in modules]
        plain_head = _head_is_plain(model, forward)
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # "triton" is passed on as it is: the kernel's entry point refuses what it can't serve.
    fits = implementation == "triton" or HEAD_SIZES[0] <= size <= HEAD_SIZES[1]
    swaps = Swaps(
        implementation if fits else "torch",
        implementation if plain_head else "torch",
        tuple((module, found) for module, found in [*norms, *mlps] if found is not None),
    )
    logger.info(
        "kernels take over %s, %s, %d norms, %d MLPs of %s",
        "attention" if fits else "no attention",
        "the head" if plain_head else "no head",
        sum(found is not None for _, found in norms),
        sum(found is not None for _, found in mlps),
        type(model).__name__,
    )
    return swaps


@contextlib.contextmanager
def swapped(swaps: Swaps) -> Iterator[None]:
    """Set the replacing forwards on the module instances inside this context.

    A module instance that already has its own forward (from an offloading hook, for example) keeps it.
    """
    taken = []
    try:
        for module, forward in swaps.forwards:
            if "forward" not in module.__dict__:
                module.__dict__["forward"] = forward
                taken.append(module)
        yield
    finally:
        for module in taken:
            del module.__dict__["forward"]


@dataclass(frozen=True)
class KernelHead:
    """The head W through the kernels, which never store all logits; see `cepo.jacobian.targets.Head`.

    Attributes:
        hidden_PD: the rows that enter the head.
        weight_VD: its weight.
        implementation: implementation of the kernels, see `cepo.kernels.launch`.
    """

    hidden_PD: Tensor
    weight_VD: Tensor
    implementation: Implementation

    def log_likelihood(self, rows: Sequence[int], ids_P: Tensor) -> Tensor:
        return head_log_likelihood(self.hidden_PD[rows], self.weight_VD, ids_P, implementation=self.implementation)

    def log_odds(self, rows: Sequence[int], ids_P: Tensor) -> Tensor:
        return head_log_odds(self.hidden_PD[rows], self.weight_VD, ids_P, implementation=self.implementation)

    def logits(self, row: int, ids_N: Tensor) -> Tensor:
        wide = torch.promote_types(self.hidden_PD.dtype, torch.float32)
        return self.weight_VD[ids_N].to(wide) @ self.hidden_PD[row].to(wide)


def _is_whole(module: nn.Module) -> bool:
    """Tell whether all weights of a module are whole on this rank, not sharded by FSDP2 or emptied by ZeRO-3."""
    return not any(isinstance(weight, DTensor) or weight.numel() == 0 for weight in module.parameters())


def _norm_forward(module: nn.Module, dtype: torch.dtype, implementation: Implementation) -> Forward | None:
    """Return a norm's forward through the kernels, or None if the module computes something else."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight_D = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(epsilon, float):
        return None
    if not isinstance(weight_D, Tensor) or weight_D.ndim != 1 or len(weight_D) > MAX_NORM_SIZE:
        return None

    def forward(offset: float, hidden_ND: Tensor, implementation: Implementation = implementation) -> Tensor:
        weight: Any = module.weight  # read on every call, since training may replace it
        return rms_norm(hidden_ND, weight, epsilon=epsilon, offset=offset, implementation=implementation)

    # Rows so small that epsilon matters, and larger ones.
    sizes = torch.tensor([1.0, epsilon**0.5, 100.0], device=weight_D.device)
    trial_PD = (_noise(3, len(weight_D), weight_D.device) * sizes[:, None]).to(dtype)
    for offset in (0.0, 1.0):  # Gemma's norms scale by 1 + w
        if _agree(module, partial(forward, offset, implementation="torch"), trial_PD):
            return partial(forward, offset)
    return None


def _mlp_forward(module: nn.Module, dtype: torch.dtype, implementation: Implementation) -> Forward | None:
    """Return a gated MLP's forward through the kernels, or None if the module computes something else."""
    gate, up, down = (getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down"))
    width = getattr(gate, "in_features", None)
    if not (isinstance(gate, nn.Module) and isinstance(up, nn.Module) and isinstance(down, nn.Module)):
        return None
    if not isinstance(width, int):
        return None

    def forward(hidden_ND: Tensor, implementation: Implementation = implementation) -> Tensor:
        projections: Any = module
        gate_ND, up_ND = projections.gate_proj(hidden_ND), projections.up_proj(hidden_ND)
        out_ND: Tensor = projections.down_proj(swiglu(gate_ND, up_ND, implementation=implementation))
        return out_ND

    device = next(module.parameters()).device
    trial_BTD = _noise(3, width, device).to(dtype)[None]
    # Near zero all activations look alike, so inputs are scaled to make gates of a few units.
    gates = float(gate(trial_BTD).float().std())
    trial_BTD = trial_BTD * (3.0 / gates if gates > 0 else 1.0)
    return forward if _agree(module, partial(forward, implementation="torch"), trial_BTD) else None


def _head_is_plain(model: Any, forward: Callable[..., Any]) -> bool:
    """Tell whether the model's logits are W h and nothing else."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or "forward" in head.__dict__:
        return False
    put_out: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, inputs, logits: put_out.append(logits))
    try:
        ids_BT = torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]
        logits = forward(model, input_ids=ids_BT, use_cache=False, return_dict=True).logits
    except Exception:  # third-party code may raise anything; the model keeps its own head, or the oracle serves it
        return False
    finally:
        handle.remove()
    return len(put_out) == 1 and torch.equal(logits.to(put_out[0].dtype), put_out[0])


def _agree(module: nn.Module, replacement: Forward, trial: Tensor) -> bool:
    """Tell whether a module's own forward and a plain replacement agree up to the dtype's rounding."""
    if "forward" in module.__dict__:
        return False
    try:
        own = type(module).forward(module, trial)
        other = replacement(trial)
    except Exception:  # it takes other arguments or shapes, so it is not the module that its name suggests
        return False
    if not isinstance(own, Tensor) or own.shape != other.shape or own.dtype != other.dtype:
        return False
    largest = own.float().abs().amax(-1, keepdim=True)
    tolerance = 1e-5 if trial.dtype in (torch.float32, torch.float64) else 3e-2
    return bool(((own.float() - other.float()).abs() <= tolerance * largest).all())


def _noise(rows: int, size: int, device: torch.device) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(0)).to(device)
