"""Sharded policies on two CPU ranks: both engines and both modes against the unsharded oracle, unequal ranks, failures.

Two processes are started once and run all cases; each case asserts on both ranks.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from cepo.jacobian import sharding
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group import swaps
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.layers import decoder_layers
from cepo.jacobian.protocol import Request
from cepo.jacobian.records import Group
from cepo.jacobian.sharding import Mode, RankFailedError, readable, sharding_of
from tests.jacobian.group import test_engine, test_paths
from tests.jacobian.test_autograd import link
from tests.models import InDouble, judge_rollout, randomise, tiny_model
from tests.two_ranks import run_on_two_ranks

LINKS = tuple(link(text) for text in ("Z->X", "X->Y@margin", "Z->Y:direct"))
MODES: tuple[Mode, ...] = ("gather", "step")
ENGINES = (JacobianEngine, GroupEngine)


def policy(kind: str, seed: int = 0) -> Any:
    """Return a whole float64 model, the same on both ranks."""
    if kind == "tied llama":
        return tiny_model("llama", tied=True, seed=seed)
    model = tiny_model("qwen3", seed=seed)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])).double()
        randomise(model, seed)
    return model


def sharded(model: Any) -> Any:
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in decoder_layers(bare):
        fully_shard(layer)
    fully_shard(model)
    return model


def requests(rank: int, count: int) -> list[Request]:
    return [Request(Group((judge_rollout(10 * rank + place),)), LINKS) for place in range(count)]


def assert_reads_like(model: Any, plain: Any, mode: Mode, rank: int, count: int = 1) -> None:
    """Compare Jacobians and paths of both engines on the sharded model with the oracle on the whole one."""
    oracle = JacobianEngine(plain)
    asked = requests(rank, count)
    paths = [test_paths.request(request.group.rollouts, "X->Y", nodes=1) for request in asked]
    for make in ENGINES:
        with readable(model, mode):
            engine = make(model)
            found, found_paths = list(engine.compute(asked)), list(engine.paths(paths))
            assert not isinstance(engine, GroupEngine) or count == 0 or engine.unserved is None
        for answer, wanted in zip(found, oracle.compute(asked), strict=True):
            test_engine.assert_same(answer, wanted, 1e-6)
        for path, wanted_path in zip(found_paths, oracle.paths(paths), strict=True):
            test_paths.assert_same(path, wanted_path, 1e-6)
    assert_sharded(model)


def assert_sharded(model: Any) -> None:
    """Nothing stays whole, no hook is missing, and nothing is left frozen or in another mode."""
    if sharding_of(model) == "zero3":
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        return
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    for group in (group for module in model.modules() for group in groups_of(module)):
        for each in group.fsdp_params:
            assert all(output.untyped_storage().size() == 0 for output in each.all_gather_outputs)
    assert sum(len(module._forward_hooks) for module in model.modules()) == 3  # of two layers and the root
    assert not any(parameter.grad is not None for parameter in model.parameters())


def groups_of(module: nn.Module) -> Sequence[Any]:
    return module._get_fsdp_state()._fsdp_param_groups if hasattr(module, "_get_fsdp_state") else ()


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the collectives that this rank takes part in."""
    counts: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # newer torch
        for name in ("all_reduce", gather):
            stack.enter_context(mock.patch.object(dist, name, _counting(getattr(dist, name), counts, name)))
        yield counts


def _counting(collective: Any, counts: dict[str, int], name: str) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        counts[name] = counts.get(name, 0) + 1
        return collective(*args, **options)

    return call


def assert_same_on_both_ranks(value: Any) -> None:
    both: list[Any] = [None, None]
    dist.all_gather_object(both, value)
    assert both[0] == both[1], both


def case_engines_and_modes(rank: int, folder: Path) -> None:
    with InDouble():
        for kind in ("qwen3", "tied llama", "lora"):
            plain, model = policy(kind), sharded(policy(kind))
            assert sharding_of(model) == "fsdp2"
            for mode in MODES:
                assert_reads_like(model, plain, mode, rank)
            if kind == "lora":
                asked, base = requests(rank, 1), JacobianEngine(plain, adapters=False)
                with readable(model, "step"):
                    found = list(JacobianEngine(model, adapters=False).compute(asked))
                for answer, wanted in zip(found, base.compute(asked), strict=True):
                    test_engine.assert_same(answer, wanted, 1e-6)
            assert [parameter.requires_grad for parameter in model.parameters()] == [
                parameter.requires_grad for parameter in plain.parameters()
            ]
            for one, other in zip(model.modules(), plain.modules(), strict=True):
                assert one.training == other.training


def case_wrong_weights(rank: int, folder: Path) -> None:
    model = sharded(policy("qwen3", seed=1))
    for mode in MODES:
        with pytest.raises(AssertionError):
            assert_reads_like(model, policy("qwen3"), mode, rank)


def case_unequal_ranks(rank: int, folder: Path) -> None:
    """Ranks with other numbers of rollouts finish, exactly, with as many collectives."""
    with InDouble():
        plain, model = policy("qwen3"), sharded(policy("qwen3"))
        step: list[tuple[Mode, tuple[int, int]]] = [("step", counts) for counts in ((3, 1), (2, 0), (1, 4), (0, 0))]
        for mode, counts in [*step, ("gather", (2, 0))]:
            with counted() as collectives:
                assert_reads_like(model, plain, mode, rank, counts[rank])
            assert_same_on_both_ranks(collectives)
            if mode == "gather":  # for each engine three groups, and a vote
                assert sum(collectives.values()) == 2 * (3 + 1)


def case_failures(rank: int, folder: Path) -> None:
    """Rank 1 fails after a pass, within a layer, and within a backward pass: both raise, and the next call works."""
    plain, model = policy("qwen3"), sharded(policy("qwen3"))

    def fail(*_: Any) -> None:
        raise ValueError("out of luck")

    def fail_backward(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(fail)

    def read(mode: Mode, breaks: Any) -> None:
        with readable(model, mode):
            list(JacobianEngine(model).compute(requests(rank, 2 - rank)))
            if rank:
                handle = breaks and decoder_layers(model)[1].mlp.register_forward_hook(breaks)
                try:
                    list(JacobianEngine(model).compute(requests(rank, 1)))
                finally:
                    if handle:
                        handle.remove()
                fail()

    for mode in MODES:
        for breaks in (None, fail, fail_backward):
            with pytest.raises(ValueError if rank else RankFailedError, match="luck" if rank else "another rank"):
                read(mode, breaks)
            assert_sharded(model)
        assert_reads_like(model, plain, mode, rank)


def case_training_afterwards(rank: int, folder: Path) -> None:
    """Gradients and a step after reading are those of a model that was never read."""
    ids = torch.tensor([judge_rollout(rank).token_ids])
    for kind in ("tied llama", "lora"):
        never, read = sharded(policy(kind)), sharded(policy(kind))
        for model in (never, read):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(kind != "lora" or "lora_" in name)
        for mode in MODES:
            with readable(read, mode):
                list(JacobianEngine(read).compute(requests(rank, 1 + rank)))
            for model in (never, read):
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                for _ in range(2):
                    model.train()
                    model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
            for one, other in zip(never.parameters(), read.parameters(), strict=True):
                if one.requires_grad:
                    assert torch.equal(one.grad.to_local(), other.grad.to_local())
                else:
                    assert (one.grad, other.grad) == (None, None)
                assert torch.equal(one.to_local(), other.to_local())
                one.grad = other.grad = None


def case_the_mode_is_agreed(rank: int, folder: Path) -> None:
    """The rank with the least free memory decides for all; in step, one layer is whole at a time."""
    model = sharded(policy("qwen3"))
    layers = decoder_layers(model)
    layer: Any = layers[0]
    for free, whole in (((1e9, 1e9), True), ((1e9, 1e3), False), ((1e3, 1e9), False)):
        with mock.patch.object(sharding, "free_memory", lambda _, free=free: free[rank]), readable(model):
            assert isinstance(layer.mlp.up_proj.weight, DTensor) is not whole
    seen = []
    handle = layers[1].mlp.register_forward_hook(
        lambda *_: seen.append([isinstance(each.mlp.up_proj.weight, DTensor) for each in layers])
    )
    with readable(model, "step"):
        list(JacobianEngine(model).compute(requests(rank, 1)))
    handle.remove()
    assert seen
    assert all(one == [True, False] for one in seen)


def case_not_made_readable(rank: int, folder: Path) -> None:
    model = sharded(policy("qwen3"))
    for make in ENGINES:
        with pytest.raises(ValueError, match="sharded .fsdp2.*readable"):
            list(make(model).compute(requests(rank, 1)))


def case_what_kernels_take_over(rank: int, folder: Path) -> None:
    """In step, layers are in shards when the trials are made: attention, the final norm and the head are replaced."""
    model = sharded(tiny_model("qwen3", head_dim=16))
    for mode, count in (("gather", 2 * (4 + 1) + 1), ("step", 1)):
        with readable(model, mode), mock.patch.object(swaps, "takes_over", return_value=True):
            found = swaps.find_swaps(model, type(model).forward, "auto")
        assert (found.attention, found.head, len(found.forwards)) == ("auto", "auto", count)


def case_fsdp1(rank: int, folder: Path) -> None:
    model = FullyShardedDataParallel(policy("qwen3"), device_id=torch.device("cpu"))
    for refuses in (sharding_of, JacobianEngine, GroupEngine):
        with pytest.raises(ValueError, match="FSDP1"):
            refuses(model)


def case_tensor_parallel(rank: int, folder: Path) -> None:
    """Layers split over ranks: both engines give the oracle's Jacobians, the group engine by the oracle itself."""
    plain = policy("qwen3")
    if rank == 0:
        plain.save_pretrained(folder / "model")
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", tp_plan="auto", dtype=torch.float64)
    model.set_attn_implementation("eager")
    assert sharding_of(model) == "tensor parallel"
    group = GroupEngine(model)
    assert "split over ranks" in str(group.unserved)
    wanted = list(JacobianEngine(plain).compute(requests(0, 2)))
    for engine in (JacobianEngine(model), group):
        for answer, one in zip(engine.compute(requests(0, 2)), wanted, strict=True):
            test_engine.assert_same(answer, one, 1e-6)


def case_zero3(rank: int, folder: Path) -> None:
    """DeepSpeed ZeRO-3, tied and with parameters that it would keep whole: reading, and the gradients of training."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles one
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    with InDouble():
        for kind, persistent in (("qwen3", 0), ("tied llama", 100_000)):
            plain, model = policy(kind), policy(kind)
            zero = {"stage": 3, "stage3_param_persistence_threshold": persistent}
            settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config={**settings, "zero_allow_untested_optimizer": True}
            )
            assert sharding_of(model) == "zero3"
            for mode in MODES:
                for count in (2 * rank, 1):
                    assert_reads_like(model, plain, mode, rank, count)
                ids = torch.tensor([judge_rollout(rank).token_ids])
                engine.backward(engine(input_ids=ids, labels=ids).loss)
                for each in (judge_rollout(0), judge_rollout(1)):
                    one = torch.tensor([each.token_ids])
                    (plain(input_ids=one, labels=one).loss / 2).backward()
                for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
                    found = deepspeed.utils.safe_get_full_grad(parameter)
                    torch.testing.assert_close(found, other.grad.to(found.dtype), rtol=1e-5, atol=1e-5)
                    other.grad = None
                engine.optimizer.zero_grad()


def case_memory_of_each_mode(rank: int, folder: Path) -> None:
    """Beside its shards, a rank holds the whole model gathered; in step one layer, the embeddings, norm and head."""
    model, plain = sharded(policy("qwen3")), policy("qwen3")
    whole, *layers = (bytes_of(list(part.parameters())) for part in (plain, *decoder_layers(plain)))
    shards = bytes_of([parameter.to_local() for parameter in model.parameters()])
    assert shards == whole // 2
    for mode, expected in (("gather", whole), ("step", whole - sum(layers) + max(layers))):
        held: list[int] = []
        handles = [
            module.register_forward_hook(lambda *_, held=held: held.append(bytes_gathered(model)))
            for module in model.modules()
        ]
        with readable(model, mode):
            list(JacobianEngine(model).compute(requests(rank, 1)))
        for handle in handles:
            handle.remove()
        assert max(held) == expected
        assert bytes_gathered(model) == 0


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def bytes_gathered(model: nn.Module) -> int:
    """What FSDP2 holds beside the shards."""
    groups = [group for module in model.modules() for group in groups_of(module)]
    return bytes_of([output for group in groups for each in group.fsdp_params for output in each.all_gather_outputs])


CASES = [value for name, value in list(globals().items()) if name.startswith("case_")]
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cases = [case for case in CASES if case is not case_zero3 or HAS_DEEPSPEED]
    return run_on_two_ranks(cases, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_two_ranks(case: str, problems: dict[str, str]) -> None:
    if case == "case_zero3" and not HAS_DEEPSPEED:
        pytest.skip("deepspeed is an extra, pip install 'cepo[deepspeed]': make test-deepspeed")
    assert not problems[case], problems[case]
