"""A model's tokenizer and chat template: the text of a conversation, and where the answers are in it.

Owns rendering as transformers does it, sandboxed, and finding each answer by character offsets in the one
text that was rendered: nothing is rendered message by message, nothing is derived from the id of a token.
"""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import jinja2
import jinja2.ext
from tokenizers import Tokenizer

from disk.files import read_file
from settings.errors import UserError
from text.sandbox import Sandbox

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LARGEST = 2**20  # characters of a template; the longest known have 30,000


class GenerationBlock(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}, by which a template marks what the assistant generates."""

    tags = {"generation"}
    MARKS = "\ufdd0", "\ufdd1"  # Unicode noncharacters: never in text, taken out again after rendering

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller):
        return caller().join(self.MARKS)


def read(path):
    """The text of a file, for error messages to name it."""
    content = read_file(path)
    try:
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def parse(text, path):
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must be a JSON object, it is {text!r:.60}")
    return value


class ChatTokenizer:
    """A model's tokenizer and chat template, as its directory has them.

    turn_end     text of the token that ends an assistant turn, e.g. <|im_end|>; None if the template has none
    stop_token_id      its id
    size         one more than the highest id
    header       what the generation prompt ends with, e.g. "assistant\\n": an answer's targets begin after it
    is_closing   it is what closes each user turn, e.g. [/INST], so it stands between two of them as well
    is_fallback  the model has no template and gets ChatML
    """

    def __init__(self, directory, vocab_size=None):
        """Raises UserError where the tokenizer or its template can't be used, or it has more ids than
        vocab_size, the rows of the model's embedding."""
        path = os.path.join(directory, "tokenizer.json")
        if not os.path.exists(path):
            raise UserError(f"{directory} has no tokenizer.json; --tokenizer may name another directory")
        self.text = read(path)
        parse(self.text, path)
        try:
            self.tokenizer = Tokenizer.from_str(self.text)
        except BaseException as error:  # the package has none of its own; a panic of its Rust is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{path} is not a tokenizer: {error!s:.300}") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.added = self.tokenizer.get_added_tokens_decoder()
        self.size = max(self.tokenizer.get_vocab_size(), *(i + 1 for i in self.added), 0)
        if vocab_size is not None and self.size > vocab_size:
            raise UserError(f"{directory}: the tokenizer has ids up to {self.size - 1}, the model's "
                            f"embedding has {vocab_size} rows; --tokenizer must be the one it was trained "
                            "with")
        config = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if os.path.exists(path := os.path.join(directory, name)):
                config.update(parse(read(path), path))
        named = {k: v.get("content") if isinstance(v, dict) else v
                 for k, v in config.items() if k.endswith("_token")}
        self.special = {k: v for k, v in named.items() if isinstance(v, str)}  # bos_token, eos_token, ...

        source = config.get("chat_template")
        if isinstance(source, list):  # several by name
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        if os.path.exists(path := os.path.join(directory, "chat_template.jinja")):
            source = read(path)
        self.is_fallback = source is None
        if self.is_fallback:
            known = self.tokenizer.token_to_id("<|im_end|>") is not None
            end = "<|im_end|>" if known else self.special.get("eos_token")
            if end is None:
                raise UserError(f"{directory}: no chat template, no <|im_end|> and no eos_token to end turns "
                                "with")
            source = CHATML.replace("<|im_end|>", end)
        if not isinstance(source, str):
            raise UserError(f"{directory}: its chat template must be a text, it is {source!r:.60}")
        self.source, self.marks_answers = source, re.search(r"\{%[-+]?\s*generation\b", source) is not None

        if len(source) > LARGEST:
            raise UserError(f"{directory}: its chat template has {len(source):,} characters; it may have "
                            f"{LARGEST:,}")
        self.sandbox = Sandbox([GenerationBlock, jinja2.ext.loopcontrols])
        try:
            self.template = self.sandbox.load(source)
            self.learn_turns()
        except jinja2.TemplateError as error:
            raise UserError(f"{directory}: its chat template can't be used: {error!s:.300}") from error

    def learn_turns(self):
        """Find header and turn end by rendering short probes, with and without an answer.

        Raises jinja2.TemplateError where the template can't render them or leaves a message out.
        """
        ask = {"role": "user", "content": "probe question"}
        reply = {"role": "assistant", "content": "probe answer"}
        again = {"role": "user", "content": "second question"}
        prompt = self.render([ask], add_generation_prompt=True)
        one, two = self.render([ask, reply]), self.render([ask, reply, again])
        question_end = end_of(ask["content"], one)
        tail, gap = (text[end_of(reply["content"], text) :] for text in (one, two))
        joint = one[question_end : len(os.path.commonprefix([prompt, one]))]
        # What closes the user's turn closes the assistant's too; the rest of the joint is the header.
        added = [t.content for t in self.added.values()]
        ends = [(tail.index(token), -len(token), token) for token in added if token in tail]
        self.turn_end = min(ends)[2] if ends else None
        self.stop_token_id = self.tokenizer.token_to_id(self.turn_end) if ends else None
        for joint in (joint, one[question_end : one.index(reply["content"])]):
            shared = os.path.commonprefix([joint, gap])
            opening = shared.rpartition(self.turn_end)[2].lstrip() if ends else ""
            self.header = opening + joint[len(shared) :]
            if self.header.strip():
                break  # else there is no generation prompt, and all that precedes an answer is its header
        try:
            asked = self.render([ask, again])
        except jinja2.TemplateError:  # most refuse two questions
            asked = ""
        self.is_closing = bool(self.header.strip()) and self.header in asked.partition(again["content"])[0]

    def encode_ahead(self, batches):
        """Yield (batch, encodings of it) for lists of objects that have a .text.

        The tokenizer encodes in a thread, on all cores and without Python's lock, while the caller makes the
        next batch.
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
        """The text of a conversation, as transformers' apply_chat_template gives it."""
        text = self.render_marked(messages, add_generation_prompt, tools)
        return re.sub(f"[{''.join(GenerationBlock.MARKS)}]", "", text) if self.marks_answers else text

    def render_marked(self, messages, add_generation_prompt=False, tools=None):
        # As in transformers, a key whose value is None isn't there: rows of a parquet file have all keys.
        messages = [{k: v for k, v in m.items() if k != "train" and v is not None} for m in messages]
        return self.sandbox.render(self.template, messages=messages, tools=tools, documents=None,
                                   add_generation_prompt=add_generation_prompt, **self.special)

    def render_spans(self, messages, where, tools=None):
        """Render once and find each assistant turn: text, [(start, stop, whole, trained), ...] in characters.

        A span runs from the end of the turn's header to the end of the token that ends it: reasoning that the
        template puts there is inside, the newline after the turn and a header behind the last turn are not.
        `whole` says that the turn's end is in it.

        Raises UserError when the template refuses the conversation or an answer can't be found in the text.
        """
        def rendered(messages):
            try:
                return self.render_marked(messages, tools=tools)
            except jinja2.TemplateError as error:
                raise UserError(f"{where}: the model's chat template refuses this conversation: "
                                f"{error!s:.300}") from error

        marked = rendered(messages)
        answers = [m for m in messages if m["role"] == "assistant"]
        opens, closes = GenerationBlock.MARKS
        if self.marks_answers:
            text, spans = "", []
            for i, piece in enumerate(re.split(f"[{opens}{closes}]", marked)):
                if i % 2:  # inside a block
                    has_end = bool(self.turn_end and self.turn_end in piece)
                    spans.append((len(text), len(text) + len(piece), has_end))
                text += piece
            if len(spans) != len(answers):
                raise UserError(f"{where}: the chat template marks {len(spans)} answers as generated, there "
                                f"are {len(answers)}")
            spans = [(*span, m["train"]) for span, m in zip(spans, answers)]
        else:
            text, shown, prompts = marked, marked, [m for m in messages if m["role"] != "assistant"]
            if self.header.strip() and any(self.header in m["content"] for m in prompts):
                # a header that a prompt quotes opens no answer: look where such quotes are written over
                cover = re.sub(r"\S", "\ufdd2", self.header)
                messages = [m if m["role"] == "assistant" else
                            {**m, "content": m["content"].replace(self.header, cover)} for m in messages]
                shown = rendered(messages)
                if len(shown) != len(text):
                    raise UserError(f"{where}: a prompt quotes {self.header!r}, and the chat template makes "
                                    "too much of it to tell where answers begin")
            spans = self.find_answers(shown, messages, where)
        for (start, stop, *_), message in zip(spans, answers):
            for call in message.get("tool_calls") or ():
                name = str((call.get("function") or call).get("name"))
                if name not in text[start:stop]:
                    raise UserError(f"{where}: the call of {name:.60} can't be found in what the chat "
                                    f"template made of its turn: {text[start:stop]!r:.200}")
        return text, spans

    def find_answers(self, text, messages, where):
        """The spans of render_spans, for a template that does not mark them."""
        spans, cursor, asked = [], 0, 0  # asked: where the last prompt that was found ends
        for message, after in zip(messages, [*messages[1:], {"role": "assistant"}]):
            content, calls = message["content"].strip(), message.get("tool_calls")
            if message["role"] != "assistant":
                found = locate(text, content, cursor, self.header)
                if not found and content and content in text[asked:cursor]:
                    raise UserError(f"{where}: the {message['role']:.60} message {content!r:.60} can't be "
                                    "told from an answer in what the chat template made of it: "
                                    f"{text[asked:]!r:.200}")
                cursor = asked = found[1] if found else cursor
                header = text.find(self.header, cursor)
                if self.is_closing and message["role"] == after["role"] == "user" and header >= 0:
                    cursor = asked = header + len(self.header)
                continue
            header = text.find(self.header, cursor)
            begin = header + len(self.header)
            found = locate(text, content, begin, self.turn_end) if header >= 0 else None
            end, whole = self.find_end(text, found, calls)
            if header >= 0 and (not found or text[begin : found[0]].strip() or not whole or calls):
                thought, _, words = content.rpartition("</think>")
                aside = json.dumps([thought, message.get("reasoning_content"), calls], ensure_ascii=False,
                                   default=str)
                if self.turn_end and self.turn_end in aside:
                    raise UserError(f"{where}: {self.turn_end} stands in the reasoning or the calls of the "
                                    f"answer {content!r:.60}, so where its turn ends can't be told")
                # templates move or drop the reasoning before the answer, or put a block of their own there
                limit = text.find(self.turn_end, begin) if self.turn_end else -1
                thought = text.rfind("</think>", begin, limit if limit >= 0 else len(text))
                after_thought = begin if thought < 0 else thought + len("</think>")
                rest = locate(text, words.strip(), after_thought, self.turn_end)
                # an answer of no words is found anywhere: its end has to follow
                if rest and (words.strip() or self.find_end(text, rest, calls)[1]):
                    found = rest
                end, whole = self.find_end(text, found, calls)
            if not found:
                raise UserError(f"{where}: the answer {content!r:.60} can't be found in what the chat "
                                f"template made of it: {text[cursor:]!r:.200}")
            start, cursor = begin if self.header else found[0], end if whole else found[1]
            spans.append((start, cursor, whole, message["train"]))
        return spans

    def find_end(self, text, found, calls):
        """(where a turn whose words are `found` ends, whether only its calls stand between)."""
        end = text.find(self.turn_end, found[1]) if self.turn_end and found else -1
        return end + len(self.turn_end or ""), end >= 0 and bool(calls or not text[found[1] : end].strip())


def end_of(content, text):
    """Where a probe's content ends in the text that a template made of it."""
    if content not in text:
        raise jinja2.TemplateError(f"it leaves out the message {content!r}")
    return text.index(content) + len(content)


def locate(text, content, start, barrier):
    """(start, stop) of content in text, from `start` on; white space may differ, as some templates re-indent.

    None where the barrier, if there is one, stands before it: what is found behind it is of another message.
    """

    def barred(at):
        return bool(barrier and barrier.strip()) and text.find(barrier, start, at) >= 0

    at = text.find(content, start)
    if at < 0 or barred(at):
        found = re.compile(r"\s+".join(map(re.escape, content.split()))).search(text, start)
        return found.span() if found and not barred(found.start()) else None
    return at, at + len(content)
