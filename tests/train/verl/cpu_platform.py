"""verl on a CPU, for tests: verl loads this module by VERL_USE_EXTERNAL_MODULES, and VERL_PLATFORM=cpu chooses it."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def nothing(*_: Any, **__: Any) -> int:
    return 0


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = types.SimpleNamespace(
        **{
            **dict.fromkeys(dir(torch.cuda), nothing),
            **vars(torch.cpu),
            "mem_get_info": lambda *_: (0, 0),
            "get_device_name": lambda *_: "cpu",
        }
    )
    is_available = is_ipc_supported = lambda self: True
    current_device = lambda self: "cpu"  # noqa: E731
    device_count = lambda self: 1  # noqa: E731
    set_device = synchronize = manual_seed = manual_seed_all = set_allocator_settings = empty_cache = nothing
    profiler_start = profiler_stop = cudart = nothing
    get_device_capability = lambda self, index=0: (None, None)  # noqa: E731
    communication_backend_name = lambda self: "gloo"  # noqa: E731
    visible_devices_envvar = lambda self: "CUDA_VISIBLE_DEVICES"  # noqa: E731
    ray_resource_name = lambda self: "GPU"  # of which Ray is told that there are two  # noqa: E731
    ray_noset_envvars = lambda self: []  # noqa: E731

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield


from verl.utils import distributed  # noqa: E402

distributed.initialize_global_process_group_ray = functools.partial(
    distributed.initialize_global_process_group_ray, backend="gloo"
)

from verl.workers.engine.base import EngineRegistry  # noqa: E402
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead  # noqa: E402

EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")(FSDPEngineWithLMHead)
