"""A model's tokenizer and chat template: the text of a conversation, and where its answers are.

A conversation is rendered once, as one text, in a sandbox and with the same result as transformers. Answers
are found by character offsets in that text, not by rendering message by message and not by token ids.
"""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jinja2
import jinja2.ext
from tokenizers import Tokenizer

from disk.files import read_file
from settings.errors import UserError
from text.sandbox import Sandbox

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
MAX_TEMPLATE = 2**20  # characters; the longest known templates have 30,000


class Span(NamedTuple):
    """Characters text[start:stop] of an assistant's turn.

    A span begins after the turn's header and ends after the token that ends the turn. Reasoning that the
    template puts there is inside. The newline after the turn, and a header after the last turn, are not.
    """

    start: int
    stop: int
    has_stop_token: bool  # the text of the token that ends the turn is in the span
    weight: float  # of the losses of its tokens; 0: it is not trained


class GenerationBlock(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}: templates mark with it what the assistant generates."""

    tags = {"generation"}
    MARKS = "\ufdd0", "\ufdd1"  # Unicode noncharacters, which text never has; removed after rendering

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller):
        return caller().join(self.MARKS)


def read(path):
    """The text of a file. Raises UserError, which names it, if it is not UTF-8."""
    content = read_file(path)
    try:
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def parse(text, path):
    """The JSON object in the text of a file. Raises UserError, which names it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must be a JSON object, it is {text!r:.60}")
    return value


class ChatTokenizer:
    """The tokenizer and chat template of a model's directory.

    turn_end        text of the token that ends an assistant turn, e.g. <|im_end|>; None if there is none
    stop_token_id   id of that token
    header          what an assistant turn begins with, e.g. "assistant\\n"; targets begin after it
    is_closing      the header also closes every user turn, e.g. [/INST], so it is between two user turns too
    is_fallback     the model has no template; ChatML is used instead
    marks_answers   the template marks answers with {% generation %}
    size            number of ids: the highest id + 1
    source, text    source of the template; text of tokenizer.json
    special, added  special tokens by name (bos_token, ...); added tokens by id
    """

    def __init__(self, directory, vocab_size=None):
        """Raises UserError if the tokenizer or its template can't be used, or if the tokenizer has more ids
        than vocab_size, the number of rows of the model's embedding."""
        path = os.path.join(directory, "tokenizer.json")
        if not os.path.exists(path):
            raise UserError(f"{directory} has no tokenizer.json; use a model directory that has one")
        self.text = read(path)
        parse(self.text, path)
        try:
            self.tokenizer = Tokenizer.from_str(self.text)
        except BaseException as error:  # the package has no error class, and a Rust panic is not an Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{path} is not a tokenizer: {error!s:.300}") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.added = self.tokenizer.get_added_tokens_decoder()
        self.size = max(self.tokenizer.get_vocab_size(), *(i + 1 for i in self.added), 0)
        if vocab_size is not None and self.size > vocab_size:
            raise UserError(f"{directory}: the tokenizer has ids up to {self.size - 1}, the model's "
                            f"embedding has {vocab_size} rows; --tokenizer must be the tokenizer that "
                            "the model was trained with")
        config = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if os.path.exists(path := os.path.join(directory, name)):
                config.update(parse(read(path), path))
        self.special = {}  # bos_token, eos_token, ...
        for key, value in config.items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                self.special[key] = content

        source = config.get("chat_template")
        if isinstance(source, list):  # several templates by name
            by_name = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = by_name.get("default")
        if os.path.exists(path := os.path.join(directory, "chat_template.jinja")):
            source = read(path)
        self.is_fallback = source is None
        if self.is_fallback:
            has_chatml_end = self.tokenizer.token_to_id("<|im_end|>") is not None
            end = "<|im_end|>" if has_chatml_end else self.special.get("eos_token")
            if end is None:
                raise UserError(f"{directory}: no chat template, and neither <|im_end|> nor an eos_token to "
                                "end turns with; set --tokenizer to a directory with a template")
            source = CHATML.replace("<|im_end|>", end)
        if not isinstance(source, str):
            raise UserError(f"{directory}: its chat template must be a text, it is {source!r:.60}")
        self.source = source
        self.marks_answers = re.search(r"\{%[-+]?\s*generation\b", source) is not None
        if len(source) > MAX_TEMPLATE:
            raise UserError(f"{directory}: its chat template has {len(source):,} characters; at most "
                            f"{MAX_TEMPLATE:,} are allowed")
        self.sandbox = Sandbox([GenerationBlock, jinja2.ext.loopcontrols])
        try:
            self.template = self.sandbox.load(source)
            self.learn_turns()
        except jinja2.TemplateError as error:
            raise UserError(f"{directory}: its chat template can't be used: {error!s:.300}") from error

    def learn_turns(self):
        """Find header and turn_end by rendering short conversations, with and without an answer.

        Raises jinja2.TemplateError if the template can't render them or omits a message.
        """
        ask = {"role": "user", "content": "probe question"}
        reply = {"role": "assistant", "content": "probe answer"}
        again = {"role": "user", "content": "second question"}
        prompt = self.render([ask], add_generation_prompt=True)
        one, two = self.render([ask, reply]), self.render([ask, reply, again])
        question_end = end_of(ask["content"], one)
        # The text after an answer: at the end of a conversation, and before another question.
        after_last = one[end_of(reply["content"], one) :]
        after_reply = two[end_of(reply["content"], two) :]
        # turn_end is the first added token after the answer, the longest one if several begin there.
        added = [token.content for token in self.added.values()]
        ends = [(after_last.index(token), -len(token), token) for token in added if token in after_last]
        self.turn_end = min(ends)[2] if ends else None
        self.stop_token_id = self.tokenizer.token_to_id(self.turn_end) if ends else None
        # Between question and answer, a template closes the user's turn and writes the header. After an
        # answer it closes the turn too. So the common beginning of these two texts closes a turn; the rest
        # is the header.
        by_prompt = one[question_end : len(os.path.commonprefix([prompt, one]))]
        by_answer = one[question_end : one.index(reply["content"])]  # if there is no generation prompt
        for between in (by_prompt, by_answer):
            closing = os.path.commonprefix([between, after_reply])
            opening = closing.rpartition(self.turn_end)[2].lstrip() if ends else ""
            self.header = opening + between[len(closing) :]
            if self.header.strip():
                break
        try:
            questions = self.render([ask, again])
        except jinja2.TemplateError:  # many templates refuse two questions in a row
            questions = ""
        before_second = questions.partition(again["content"])[0]
        self.is_closing = bool(self.header.strip()) and self.header in before_second

    def encode_ahead(self, batches):
        """Yield (batch, its encodings). A batch is a list of objects that have a .text.

        A thread encodes one batch, on all cores and without Python's lock, while the caller makes the next.
        """
        def encode(batch):
            return self.tokenizer.encode_batch([item.text for item in batch], add_special_tokens=False)

        with ThreadPoolExecutor(1) as pool:
            waiting, encodings = None, None
            for batch in batches:
                if waiting:
                    yield waiting, encodings.result()
                waiting, encodings = batch, pool.submit(encode, batch)
            if waiting:
                yield waiting, encodings.result()

    def render(self, messages, add_generation_prompt=False, tools=None):
        """The text of a conversation, identical to that of transformers' apply_chat_template."""
        text = self.render_marked(messages, add_generation_prompt, tools)
        return re.sub(f"[{''.join(GenerationBlock.MARKS)}]", "", text) if self.marks_answers else text

    def render_marked(self, messages, add_generation_prompt=False, tools=None):
        """As render(), with the marks of GenerationBlock left in the text."""
        # Keys whose value is None are dropped, as in transformers: rows of a parquet file have all keys.
        messages = [{k: v for k, v in m.items() if k != "weight" and v is not None} for m in messages]
        return self.sandbox.render(self.template, messages=messages, tools=tools, documents=None,
                                   add_generation_prompt=add_generation_prompt, **self.special)

    def render_spans(self, messages, where, tools=None):
        """Render a conversation once and find its assistant turns. Returns the text and a list of Spans.

        Raises UserError if the template refuses the conversation or an answer can't be found in the text.
        """
        rendered = self.render_or_refuse(messages, where, tools)
        answers = [m for m in messages if m["role"] == "assistant"]
        if self.marks_answers:
            text, spans = self.split_marked(rendered, answers, where)
        else:
            text = rendered
            searched, messages = self.cover_quoted_headers(text, messages, where, tools)
            spans = self.find_answers(searched, messages, where)
        for span, message in zip(spans, answers):
            for call in message.get("tool_calls") or ():
                name = str((call.get("function") or call).get("name"))
                if name not in text[span.start : span.stop]:
                    raise UserError(f"{where}: the call of {name:.60} can't be found in what the chat "
                                    f"template made of its turn: {text[span.start : span.stop]!r:.200}")
        return text, spans

    def render_or_refuse(self, messages, where, tools):
        """render_marked(). Raises UserError, which names the row, if the template fails."""
        try:
            return self.render_marked(messages, tools=tools)
        except jinja2.TemplateError as error:
            raise UserError(f"{where}: the model's chat template refuses this conversation: "
                            f"{error!s:.300}") from error

    def split_marked(self, marked, answers, where):
        """(text without marks, Spans) of a text in which a template has marked the answers."""
        text, spans = "", []
        for i, piece in enumerate(re.split(f"[{''.join(GenerationBlock.MARKS)}]", marked)):
            if i % 2:  # inside a {% generation %} block
                has_end = bool(self.turn_end and self.turn_end in piece)
                spans.append((len(text), len(text) + len(piece), has_end))
            text += piece
        if len(spans) != len(answers):
            raise UserError(f"{where}: the chat template marks {len(spans)} answers as generated, but the "
                            f"conversation has {len(answers)}")
        return text, [Span(*span, message["weight"]) for span, message in zip(spans, answers)]

    def cover_quoted_headers(self, text, messages, where, tools):
        """(text, messages) in which other characters replace the headers that prompts quote.

        A quoted header does not begin an answer. The text keeps its length, so that offsets in it are right
        for the original too.
        """
        prompts = [m for m in messages if m["role"] != "assistant"]
        if not self.header.strip() or not any(self.header in m["content"] for m in prompts):
            return text, messages
        cover = re.sub(r"\S", "\ufdd2", self.header)
        covered = [m if m["role"] == "assistant" else
                   {**m, "content": m["content"].replace(self.header, cover)} for m in messages]
        covered_text = self.render_or_refuse(covered, where, tools)
        if len(covered_text) != len(text):
            raise UserError(f"{where}: a prompt quotes {self.header!r}, and the chat template changes the "
                            "quote, so where answers begin is ambiguous")
        return covered_text, covered

    def find_answers(self, text, messages, where):
        """The Spans of a text whose template does not mark its answers."""
        spans, cursor, prompt_end = [], 0, 0  # prompt_end: where the last prompt that was found ends
        for message, after in zip(messages, [*messages[1:], {"role": "assistant"}]):
            content, calls = message["content"].strip(), message.get("tool_calls")
            if message["role"] != "assistant":
                place = locate(text, content, cursor, self.header)
                if not place and content and content in text[prompt_end:cursor]:
                    raise UserError(f"{where}: the {message['role']:.60} message {content!r:.60} can't be "
                                    "distinguished from an answer in the chat template's text: "
                                    f"{text[prompt_end:]!r:.200}")
                cursor = prompt_end = place[1] if place else cursor
                header = text.find(self.header, cursor)
                if self.is_closing and message["role"] == after["role"] == "user" and header >= 0:
                    cursor = prompt_end = header + len(self.header)
                continue
            header = text.find(self.header, cursor)
            header_end = header + len(self.header)
            place = locate(text, content, header_end, self.turn_end) if header >= 0 else None
            end, has_end = self.find_end(text, place, calls)
            is_plain = place and not text[header_end : place[0]].strip() and has_end and not calls
            if header >= 0 and not is_plain:
                place = self.find_after_reasoning(text, message, header_end, place, where)
                end, has_end = self.find_end(text, place, calls)
            if not place:
                raise UserError(f"{where}: the answer {content!r:.60} can't be found in what the chat "
                                f"template made of it: {text[cursor:]!r:.200}")
            start = header_end if self.header else place[0]
            cursor = end if has_end else place[1]
            spans.append(Span(start, cursor, has_end, message["weight"]))
        return spans

    def find_after_reasoning(self, text, message, header_end, place, where):
        """(start, stop) of an answer that may come after reasoning; `place` if it is not found there.

        Templates move or drop the reasoning before an answer, or put a block of their own there.
        """
        content, calls = message["content"].strip(), message.get("tool_calls")
        reasoning, _, visible = content.rpartition("</think>")
        other_content = [reasoning, message.get("reasoning_content"), calls]
        other_text = json.dumps(other_content, ensure_ascii=False, default=str)
        if self.turn_end and self.turn_end in other_text:
            raise UserError(f"{where}: the reasoning or the calls of the answer {content!r:.60} contain "
                            f"{self.turn_end}, so where its turn ends is ambiguous")
        limit = text.find(self.turn_end, header_end) if self.turn_end else -1
        think_end = text.rfind("</think>", header_end, limit if limit >= 0 else len(text))
        start = header_end if think_end < 0 else think_end + len("</think>")
        after_reasoning = locate(text, visible.strip(), start, self.turn_end)
        # An empty text is found anywhere, so then the end of the turn has to follow.
        is_certain = visible.strip() or self.find_end(text, after_reasoning, calls)[1]
        return after_reasoning if after_reasoning and is_certain else place

    def find_end(self, text, place, calls):
        """(end of the turn of an answer at `place`, whether only its calls are between the two)."""
        end = text.find(self.turn_end, place[1]) if self.turn_end and place else -1
        return end + len(self.turn_end or ""), end >= 0 and bool(calls or not text[place[1] : end].strip())


def end_of(content, text):
    """Where the content of a probe ends in the text that a template made of it."""
    if content not in text:
        raise jinja2.TemplateError(f"it omits the message {content!r}")
    return text.index(content) + len(content)


def locate(text, content, start, barrier):
    """(start, stop) of content in text, from `start` on; white space may differ, as some templates re-indent.

    None if it is not found, or if the barrier is before it: then it belongs to another message.
    """

    def is_barred(position):
        return bool(barrier and barrier.strip()) and text.find(barrier, start, position) >= 0

    position = text.find(content, start)
    if position >= 0 and not is_barred(position):
        return position, position + len(content)
    match = re.compile(r"\s+".join(map(re.escape, content.split()))).search(text, start)
    return match.span() if match and not is_barred(match.start()) else None


def token_range(encoding, start, end, text_length):
    """(first, after): the tokens first ... after - 1 lie entirely inside the characters [start, end).

    A token that begins before `start` and ends after it is excluded. The model cannot generate it, as its
    first characters are in the prompt.
    """
    def first_from(char):
        while char < text_length:
            token = encoding.char_to_token(char)
            if token is not None:
                return token
            char += 1
        return len(encoding)

    first = first_from(start)
    if first < len(encoding) and encoding.token_to_chars(first)[0] < start:
        first += 1
    after = first_from(end)
    if after < len(encoding) and encoding.token_to_chars(after)[0] < end:
        after += 1  # the turn's last token includes the white space that follows the turn
    return first, max(first, after)
