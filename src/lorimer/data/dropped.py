"""What of a chat its template leaves out of the text without a word: the model never sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lorimer.data.conversation import Conversation, Message
from lorimer.data.template import ChatTemplate, Example
from lorimer.errors import TemplateError

OTHER = "\uf8fd"  # what no message holds
THOUGHT = "reasoning_content"


def dropped(template: ChatTemplate, conversation: Conversation, examples: Sequence[Example]) -> list[str]:
    """Kinds of parts that the text does not depend on: `tools`, `tool calls`, `thoughts`, or messages by
    their role. An answer's own words are not looked for (they are trained, or the chat is refused), nor
    names and ids of messages. `examples` are those of the chat."""
    if conversation.text is not None:
        return []
    return list(dict.fromkeys(_parts(template, conversation, examples)))


def _parts(template: ChatTemplate, talk: Conversation, examples: Sequence[Example]) -> Iterator[str]:
    text = template.render(talk.messages, talk.tools)
    if talk.tools and _writes(template, replace(talk, tools=None), text):
        yield "tools"
    for number, turn in enumerate(talk.messages):
        calls = replace(turn, tool_calls=None)
        if turn.tool_calls and _writes(template, _with(talk, number, calls), text):
            yield "tool calls"
        words = "" if turn.role == "assistant" else turn.content.strip()
        # Where the words are not there as they stand, the template may still have made something of them.
        lost = words and words not in text and not _holds(template, examples, words)
        if lost and _writes(template, _with(talk, number, replace(turn, content=OTHER)), text):
            yield f"{turn.role} messages"
        if THOUGHT in turn.extra and _thought_is_lost(template, talk, number, examples):
            yield "thoughts"


def _thought_is_lost(
    template: ChatTemplate, talk: Conversation, number: int, examples: Sequence[Example]
) -> bool:
    """In the chat up to this answer: templates drop those of earlier answers on purpose."""
    turn = talk.messages[number]
    if _holds(template, examples, turn.extra[THOUGHT].strip()):
        return False
    upto = replace(talk, messages=talk.messages[: number + 1])
    bare = replace(turn, extra={key: value for key, value in turn.extra.items() if key != THOUGHT})
    text = template.render(upto.messages, upto.tools)
    return _writes(template, _with(upto, number, bare), text)


def _holds(template: ChatTemplate, examples: Sequence[Example], words: str) -> bool:
    """Whether an example has them: its text may be another than the whole chat's (a prompt that is shown
    only while the last message is a question)."""
    return any(words in template.tokenizer.decode(example.ids.tolist()) for example in examples)


def _with(talk: Conversation, number: int, message: Message) -> Conversation:
    return replace(talk, messages=(*talk.messages[:number], message, *talk.messages[number + 1 :]))


def _writes(template: ChatTemplate, talk: Conversation, text: str) -> bool:
    """Whether the template writes exactly this text; one that refuses the chat does look at it."""
    try:
        return template.render(talk.messages, talk.tools) == text
    except TemplateError:
        return False
