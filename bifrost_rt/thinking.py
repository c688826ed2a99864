"""Think, then draw: the MLLM answers a prompt in words, and its answer is what is drawn."""

from __future__ import annotations

from bifrost_rt import chat, unicode
from bifrost_rt.chat_params import ChatOptions, ChatParameters
from bifrost_rt.errors import RequestError, RequestTypeError
from bifrost_rt.manifest import SetSpec
from bifrost_rt.messages import Turn

PROMPT = "{prompt}"  # of an instruction, the place of the prompt


def instruction(manifest: SetSpec, think: bool | str | None) -> str | None:
    """Return what the MLLM is asked before it draws; None where it is not.

    Args:
        think: True takes the set's own instruction. A text without `PROMPT` gets the prompt at its
            end.

    Raises:
        RequestError, RequestTypeError: no instruction, or the set answers nothing in words.
    """
    if think is None or think is False:
        return None
    if not isinstance(think, (bool, str)):
        raise RequestTypeError(
            f"think must be True, or an instruction as a text, got {type(think).__name__}"
        )
    facts = chat.facts(manifest)
    if think is True:
        if facts.think is None:
            raise RequestError(
                f"think=True: the set {manifest.name!r} states no instruction for thinking",
                hint=f"give one as a text, with {PROMPT} in the place of the prompt, or build the "
                "set again",
            )
        return facts.think
    if not think.strip():
        raise RequestError("think is an empty instruction", hint="think=True takes the set's own")
    unicode.check("think", think)
    return think


def turns(asked: str, prompt: str) -> tuple[Turn, ...]:
    """Return the conversation that an instruction makes of a prompt."""
    text = asked.replace(PROMPT, prompt) if PROMPT in asked else f"{asked}\n\n{prompt}"
    return (Turn("user", (text,)),)


def parameters(manifest: SetSpec) -> ChatParameters:
    """Return how a thought is chosen: the likeliest token each time, and no more of them than the
    MLLM reads of a prompt."""
    facts = manifest.text.mllm
    room = facts.max_length - len(facts.prefix_ids) - len(facts.postfix_ids)
    options: ChatOptions = {"max_new_tokens": max(1, room), "temperature": 0.0, "seed": 0}
    return ChatParameters.fill(options)
