"""The chat frame around every prompt: what Qwen2.5-VL's template gives for the turns used here."""

from __future__ import annotations

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
_ANSWER = "<|im_end|>\n<|im_start|>assistant\n"


def ask_for_image(prompt: str) -> str:
    """Return a request for an image, up to the place where the image begins."""
    return f"{_SYSTEM}<|im_start|>user\nGenerate an image of {prompt}{_ANSWER}<|vision_start|>"


def ask_for_plan(prompt: str) -> str:
    """Return the same request, answered in words: makes the text branch work out the layout."""
    return f"{_SYSTEM}<|im_start|>user\nGenerate an image of {prompt}{_ANSWER}"


def ask_for_words(places: int) -> str:
    """Return a question about an image of `places` tokens, up to the answer."""
    image = "<|vision_start|>" + "<|image_pad|>" * places + "<|vision_end|>"
    return f"{_SYSTEM}<|im_start|>user\n{image}Describe the scene.{_ANSWER}"
