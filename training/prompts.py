"""Where the prompt ends and the responses begin, in plain and in conversational rows."""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prefkern.training.errors import DataError


class Texts(NamedTuple):
    """A row as text: what the model reads, what it should or should not say, and whether a chat template made them."""

    prompt: str
    responses: tuple[str, ...]
    templated: bool


def is_conversation(value: Any) -> bool:
    """Whether a cell holds a list of messages, each with a role and a content."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(m, Mapping) and "role" in m and "content" in m for m in value)
    )


def split_row(prompt: Any, responses: Sequence[Any], tokenizer) -> Texts:
    """Prompt and responses of one row as text.

    Args:
        prompt: text, messages, or None when every response is a whole that begins with the prompt.
        responses: texts, or lists of messages.
        tokenizer: its chat template renders the messages.
    Raises:
        DataError: a cell is empty or of another kind, the wholes share no beginning, or the template fails.
    """
    if all(isinstance(r, str) for r in responses) and (prompt is None or isinstance(prompt, str)):
        if prompt is None:
            prompt, responses = common_prompt(responses)
        for text in responses:
            if not text.strip():
                raise DataError("it has an empty response: remove the row or fill it in")
        return Texts(prompt, tuple(responses), False)
    if not all(is_conversation(r) for r in responses):
        raise DataError("its cells should all be text or all be lists of {role, content} messages: make them alike")
    if not is_conversation(prompt):  # a text beside whole conversations repeats what they begin with
        prompt, responses = common_messages(responses)
    for messages in responses:
        if not any(str(m["content"] or "").strip() or m.get("tool_calls") for m in messages):
            raise DataError("it has an empty response: remove the row or fill it in")
    return render(list(prompt), [list(r) for r in responses], tokenizer)


def common_prompt(wholes: Sequence[str]) -> tuple[str, list[str]]:
    """The prompt that whole texts share, cut back to a word boundary; blanks before the cut go to the responses.

    Raises:
        DataError: the texts are the same, or share no beginning.
    """
    shared = os.path.commonprefix(list(wholes))
    if all(w == shared for w in wholes) and len(wholes) > 1:
        raise DataError("its responses are the same, so that no prompt can be told apart: give a prompt column")
    inside_word = shared and not shared[-1].isspace() and any(w[len(shared) :][:1].strip() for w in wholes)
    nothing_left = any(not w[len(shared) :].strip() for w in wholes)
    cut = len(shared)
    if inside_word or nothing_left:
        body = shared.rstrip()
        last = max((i for i, c in enumerate(body) if c.isspace()), default=-1)
        cut = last + 1 if last >= 0 or nothing_left else cut
    while cut > 0 and shared[cut - 1] == " ":
        cut -= 1
    if cut == 0:
        raise DataError("its responses share no beginning that could be the prompt: give a prompt column")
    return shared[:cut], [w[cut:] for w in wholes]


def common_messages(wholes: Sequence[Sequence[Mapping]]) -> tuple[list, list[list]]:
    """The messages that whole conversations begin with, and what remains of each.

    Raises:
        DataError: the conversations share no first message, or one of them is all shared.
    """
    count = 0
    while all(len(w) > count for w in wholes) and all(w[count] == wholes[0][count] for w in wholes):
        count += 1
    count = min(count, min(map(len, wholes)) - 1)
    if count == 0:
        raise DataError("its conversations share no first message that could be the prompt: give a prompt column")
    return list(wholes[0][:count]), [list(w[count:]) for w in wholes]


def render(prompt: list[Mapping], responses: list[list[Mapping]], tokenizer) -> Texts:
    """Messages to text by the tokenizer's chat template.

    The prompt is rendered with the template's opening of the answer; should the template put something else there
    in a full conversation (an empty thinking block), the prompt ends where the two begin to differ.

    Raises:
        DataError: there is no template, it fails, or a full conversation does not begin with the rendered prompt.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "it is a conversation, but the tokenizer has no chat template: "
            "set model.tokenizer to a chat model's, or use plain text columns"
        )
    try:
        opening = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        bare = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=False)
        wholes = [tokenizer.apply_chat_template(prompt + r, tokenize=False) for r in responses]
    except Exception as error:  # templates raise what they like
        raise DataError(f"the chat template refuses it ({error}): check the roles of its messages") from error
    boundary = len(os.path.commonprefix([opening, *wholes]))
    if boundary < len(bare):
        raise DataError(
            "the chat template renders its prompt differently when an answer follows: "
            "give prompt and responses as plain text"
        )
    return Texts(opening[:boundary], tuple(w[boundary:] for w in wholes), True)
