"""Answers as OpenAI's chat API gives them, whole and as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator

from bifrost_rt.chat import ChatResult
from bifrost_rt.serve import schema
from bifrost_rt.serve.errors import error_type
from bifrost_rt.serve.jobs import Answer, Failure

CANCELLED = Failure("the answer was cancelled", 499, "cancelled")
_END = "data: [DONE]\n\n"


def whole(answer: Answer, model: str) -> schema.ChatCompletion:
    """Return a finished answer."""
    result = answer.result
    assert result is not None
    message = schema.Message(content=result.text)
    return schema.ChatCompletion(
        id=_id(answer),
        created=int(answer.created),
        model=model,
        choices=[schema.Choice(message=message, finish_reason=result.finish_reason)],
        usage=_usage(result),
        seed=result.seed,
        warnings=answer.warnings,
    )


async def stream(answer: Answer, model: str, include_usage: bool) -> AsyncIterator[str]:
    """Stream an answer as it comes, in server-sent events."""

    def chunk(*choices: schema.ChunkChoice, **more: object) -> str:
        made = schema.Chunk.model_validate(
            {
                "id": _id(answer),
                "created": int(answer.created),
                "model": model,
                "choices": choices,
                **more,
            }
        )
        return f"data: {made.model_dump_json(exclude_none=True)}\n\n"

    def says(delta: schema.Delta) -> schema.ChunkChoice:
        return schema.ChunkChoice(delta=delta)

    first = says(schema.Delta(role="assistant", content=""))
    yield chunk(first, warnings=answer.warnings or None)
    sent = 0
    async for _ in answer.watch():
        new = answer.pieces[sent:]
        sent += len(new)
        if new:
            yield chunk(says(schema.Delta(content="".join(new))))
    if (result := answer.result) is None:
        yield _fault(answer.failure or CANCELLED)
        return
    last = schema.ChunkChoice(delta=schema.Delta(), finish_reason=result.finish_reason)
    yield chunk(last, seed=result.seed)
    if include_usage:
        yield chunk(usage=_usage(result))
    yield _END


def _id(answer: Answer) -> str:
    return f"chatcmpl-{answer.id}"


def _usage(result: ChatResult) -> schema.Usage:
    usage = result.usage
    return schema.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        prompt_tokens_details=schema.PromptTokensDetails(
            cached_tokens=usage.cached_tokens, image_tokens=usage.image_tokens
        ),
    )


def _fault(failure: Failure) -> str:
    error = schema.Fault(
        message=failure.message, type=error_type(failure.status), code=failure.code
    )
    return f"data: {schema.FaultResponse(error=error).model_dump_json()}\n\n"
