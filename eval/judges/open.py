"""Open a judge on the backend that its settings name."""

from __future__ import annotations

from cepo.eval.judges.server import ServerJudge
from cepo.eval.judges.settings import Judge, JudgeSettings, check_judge
from cepo.jacobian.loading import load_model, resolve_model


def open_judge(settings: JudgeSettings) -> Judge:
    """Return the judge with its weights loaded; a server is not called yet.

    Raises:
        ValueError: for settings or a model that cannot be used.
    """
    check_judge(settings)
    if settings.backend == "server":
        return ServerJudge(settings)
    source = resolve_model(settings.model)
    # Imported here, since a judge on a server needs neither torch nor transformers, which take seconds to import.
    if settings.backend == "vllm":
        from cepo.eval.judges.vllm import VllmJudge

        return VllmJudge(source, settings)
    from cepo.eval.judges.transformers import TransformersJudge

    model, tokenizer = load_model(
        source, dtype=settings.dtype, device=settings.device, trust_remote_code=settings.trust_remote_code
    )
    return TransformersJudge(model, tokenizer, settings)
