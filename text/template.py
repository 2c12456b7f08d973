"""A model's tokenizer and chat template: the text of a conversation, and where its answers are.

A conversation is rendered once, as one text, in a sandbox and with the same result as transformers. Answers
are found by character offsets in that text (text/turns.py), not by rendering message by message and not by
token ids. What a message says and the text lacks is an error.
"""

import collections
import contextlib
import glob
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import date as Date
from datetime import datetime
from typing import NamedTuple

import jinja2
import jinja2.ext
from tokenizers import Tokenizer

from disk.files import read_file
from settings.errors import UserError
from text import turns
from text.sandbox import Sandbox
from text.turns import Span, Turns
from text.unknown import unknown_id

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
MAX_TEMPLATE = 2**20  # characters; the longest known templates have 30,000
TEMPLATE_FILE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"  # those of transformers
OWN_VARIABLES = "messages", "tools", "add_generation_prompt"  # of a template: template_kwargs can't set them
MOST_AHEAD = 3 * 2**20  # characters that are encoded at once, if they are several rows
SHORT = 24  # characters of a message that may stand in a template by chance
# What switches reasoning on and off in a system message; some templates read it and remove it
SWITCH = re.compile(r"/(?:no_?)?think\b")


class Notes(NamedTuple):
    """What else is known of a rendered conversation."""

    reasoning_rendered: int  # trained answers whose reasoning is in the text
    reasoning_dropped: tuple  # the reasoning of the trained answers without it
    warning: str | None  # names the row


class Rendered(NamedTuple):
    text: str
    spans: list  # of Spans, one for each assistant message
    notes: Notes


class Template(NamedTuple):
    source: str
    compiled: jinja2.Template
    marks_answers: bool  # with {% generation %}
    variables: frozenset  # names of those that it reads


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


def with_text_arguments(message):
    """A message whose calls have their arguments as JSON texts, which some templates want."""
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") or call
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            function = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}


@contextlib.contextmanager
def tokenizer_errors(what):
    """Turn any failure of the tokenizers package into a UserError that begins with `what`.

    The package has no error class, and a panic of its Rust code (a regular expression that takes too long)
    is a BaseException, not an Exception.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {error!s:.300}") from error


class ChatTokenizer:
    """The tokenizer and chat template of a model's directory.

    turn_end        text of the token that ends an assistant turn, e.g. <|im_end|>; None if there is none
    stop_token_id   id of that token
    stop_token_ids  ids of all tokens that end an assistant turn: one with calls may end with another one
    header          what an assistant turn begins with, e.g. "assistant\\n"; targets begin after it
    is_closing      the header also closes every user turn, e.g. [/INST], so it is between two user turns too
    is_fallback     the model has no template; ChatML is used instead
    marks_answers   the template marks answers with {% generation %}
    size            the highest id + 1
    unknown_id      id of the token for characters that the vocabulary lacks; or unknown.NONE or unknown.LOST
    source, text    source of the template; text of tokenizer.json
    special, added  special tokens by name (bos_token, ...); added tokens by id
    date            of the run, as templates print it: an ISO text
    variant         a text; if it is another one, conversations may be rendered otherwise
    """

    def __init__(self, directory, vocab_size=None, chat_template=None, template_kwargs=None, date=None):
        """Read a model's directory.

        chat_template    path of a jinja file, or the name of one of the model's templates; none: the model's
                         `tool_use` for rows with tools if it has one, otherwise its `default`
        template_kwargs  {name: value} of variables that the template reads, e.g. enable_thinking
        date             what strftime_now prints: a date or datetime, or its ISO text; none: today

        Raises UserError if the tokenizer or its template can't be used, or if the tokenizer has more ids
        than vocab_size, the number of rows of the model's embedding."""
        self.directory = directory
        config = self.read_tokenizer(vocab_size)
        try:
            now = date if isinstance(date, Date) else datetime.fromisoformat(date or str(Date.today()))
        except (TypeError, ValueError) as error:
            raise UserError(f"the date must be like 2026-01-31, it is {date!r:.60}") from error
        self.date = now.isoformat().removesuffix("T00:00:00")
        self.sandbox = Sandbox([GenerationBlock, jinja2.ext.loopcontrols], now)
        self.template_kwargs = self.checked_kwargs(template_kwargs, "--template_kwargs")
        self.is_fallback, self.is_chosen = False, chat_template is not None
        is_file = self.is_chosen and os.path.isfile(chat_template)
        self.place = f"--chat_template {chat_template}" if is_file else f"{directory}: its chat template"
        sources = self.named_templates(config.get("chat_template"))
        sources = self.chosen(sources, chat_template)
        self.templates = {name: self.compile(source) for name, source in sources.items()}
        self.check_read(self.template_kwargs)
        self.source, _, self.marks_answers, _ = self.templates["default"]
        self.files = self.saved_files(sources)
        self.learned, self.written = {}, {}  # Turns, and which messages a template writes, by kind
        specials = [token.content for token in self.added.values() if token.special and token.content.strip()]
        self.specials = set(specials)
        self.special_lengths = sorted({len(token) for token in specials}, reverse=True)
        self.at_special = turns.any_of({token[:2] for token in specials})
        self.has_parts, self.text_arguments = False, set()
        learned = self.learn_default()
        self.header, self.is_closing = learned.header, learned.is_closing
        self.turn_end = learned.ends[0] if learned.ends else None
        self.stop_token_ids = tuple(dict.fromkeys(self.last_id(end) for end in learned.call_ends))
        self.stop_token_id = self.last_id(self.turn_end) if self.turn_end else None
        dated = self.date if any("strftime_now" in source for source in sources.values()) else None
        self.variant = repr((sorted(sources.items()), self.template_kwargs, dated))

    def read_tokenizer(self, vocab_size):
        """Read tokenizer.json and the special tokens. Returns the content of tokenizer_config.json."""
        directory = self.directory
        path = os.path.join(directory, "tokenizer.json")
        if not os.path.exists(path):
            raise UserError(f"{directory} has no tokenizer.json; use a model directory that has one")
        self.text = read(path)
        parsed = parse(self.text, path)
        with tokenizer_errors(f"{path} is not a tokenizer"):
            self.tokenizer = Tokenizer.from_str(self.text)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.added = self.tokenizer.get_added_tokens_decoder()
        # ids may have gaps: their number, get_vocab_size(), would be too small
        vocabulary = parsed["model"]["vocab"]  # of Unigram a list
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        self.size = max([*ids, *self.added], default=-1) + 1
        self.unknown_id = unknown_id(self.tokenizer, parsed)
        if vocab_size is not None and self.size > vocab_size:
            raise UserError(f"{directory}: the tokenizer has ids up to {self.size - 1}, the model's "
                            f"embedding has {vocab_size} rows; --tokenizer must be the tokenizer that "
                            "the model was trained with; if it has new tokens, add --resize_embeddings")
        config = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if os.path.exists(path := os.path.join(directory, name)):
                config.update(parse(read(path), path))
        self.special = {}  # bos_token, eos_token, ...
        for key, value in config.items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                self.special[key] = content
        return config

    def last_id(self, end):
        """The id of the last token of a text that ends turns."""
        token = turns.last_token(end, [token.content for token in self.added.values()])
        return self.tokenizer.token_to_id(token)

    # ---- which template -----------------------------------------------------------------------------------

    def named_templates(self, source):
        """{name: source} of the directory's templates, as transformers reads them.

        source  the "chat_template" of tokenizer_config.json; files replace it
        """
        directory = self.directory
        by_file = {}
        if os.path.exists(path := os.path.join(directory, TEMPLATE_FILE)):
            by_file["default"] = read(path)
        for path in sorted(glob.glob(os.path.join(glob.escape(directory), MORE_TEMPLATES, "*.jinja"))):
            by_file[os.path.basename(path).removesuffix(".jinja")] = read(path)
        if by_file:
            return by_file
        if isinstance(source, list):  # several templates by name
            if not all(isinstance(t, dict) and isinstance(t.get("name"), str) for t in source):
                raise UserError(f'{directory}: its chat templates must be [{{"name", "template"}}, ...], not '
                                f"{source!r:.60}")
            source = {t["name"]: t.get("template") for t in source}
        else:
            source = {} if source is None else {"default": source}
        for template in source.values():
            if not isinstance(template, str):
                raise UserError(f"{directory}: its chat template must be a text, it is {template!r:.60}")
        return source

    def chosen(self, sources, chat_template):
        """{name: source} of the templates that are used; "default" is one of them."""
        names = ", ".join(sorted(sources)) or "none"
        if chat_template is not None:
            if os.path.isfile(chat_template):
                return {"default": read(chat_template)}
            if chat_template not in sources:
                raise UserError(f"--chat_template {chat_template:.200} is neither a file nor a template of "
                                f"{self.directory}, which has: {names}")
            return {"default": sources[chat_template]}
        if sources and "default" not in sources:
            raise UserError(f"{self.directory} has several chat templates and none is named default; choose "
                            f"one with --chat_template: {names}")
        if sources:
            return {name: sources[name] for name in ("default", "tool_use") if name in sources}
        self.is_fallback = True
        has_chatml_end = self.tokenizer.token_to_id("<|im_end|>") is not None
        end = "<|im_end|>" if has_chatml_end else self.special.get("eos_token")
        if end is None:
            raise UserError(f"{self.directory}: no chat template, and neither <|im_end|> nor an eos_token to "
                            "end turns with; set --tokenizer to a directory with a template, or "
                            "--chat_template")
        return {"default": CHATML.replace("<|im_end|>", end)}

    def compile(self, source):
        if len(source) > MAX_TEMPLATE:
            raise UserError(f"{self.directory}: its chat template has {len(source):,} characters; at most "
                            f"{MAX_TEMPLATE:,} are allowed")
        try:
            compiled, variables = self.sandbox.load(source), self.sandbox.variables(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{self.place} can't be used: {error!s:.300}") from error
        marks_answers = re.search(r"\{%[-+]?\s*generation\b", source) is not None
        return Template(source, compiled, marks_answers, variables)

    def saved_files(self, sources):
        """{path in a saved directory: bytes} of the template, where the model's own files do not hold it.

        A chosen template, or ChatML, is the only one that is saved. Otherwise these are the model's further
        templates, which are in a folder of their own.
        """
        if self.is_chosen or self.is_fallback:
            return {TEMPLATE_FILE: sources["default"].encode(errors="surrogatepass")}
        paths = glob.glob(os.path.join(glob.escape(self.directory), MORE_TEMPLATES, "*.jinja"))
        return {f"{MORE_TEMPLATES}/{os.path.basename(path)}": read_file(path) for path in sorted(paths)}

    def checked_kwargs(self, kwargs, where):
        if kwargs is None:
            return {}
        if isinstance(kwargs, str):  # --template_kwargs
            with contextlib.suppress(ValueError, RecursionError):
                kwargs = json.loads(kwargs)
        if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
            raise UserError(f'{where} must be an object like {{"enable_thinking": false}}, it is '
                            f"{kwargs!r:.60}")
        for name in OWN_VARIABLES:
            if name in kwargs:
                raise UserError(f"{where} sets {name}, which a row's own keys set; remove it there")
        for name, value in kwargs.items():
            if isinstance(value, str) and value.strip().lower() in ("true", "false"):
                raise UserError(f'{where} sets {name:.60} to the text "{value}", which templates take for '
                                "true; write it without quotes")
        return kwargs

    def check_read(self, kwargs):
        """Raise UserError if --template_kwargs has a variable that none of the templates reads."""
        read = frozenset().union(*(template.variables for template in self.templates.values()))
        if unread := sorted(kwargs.keys() - read):
            others = ", ".join(sorted(read - {*OWN_VARIABLES, *self.special})) or "no others"
            raise UserError(f"--template_kwargs sets {', '.join(unread):.200}, which the chat template does "
                            f"not read, so it would have no effect; it reads {others:.500}")

    def unread(self, kwargs, tools):
        """The variables of a row that its template does not read, as names of columns that are not used."""
        unread = kwargs.keys() - self.templates[self.name_of(tools)].variables if kwargs else ()
        return tuple(f"chat_template_kwargs.{name}" for name in sorted(unread))

    def learn_default(self):
        """The Turns of the default template. Some templates read only lists of parts: they are tried too."""
        try:
            return self.turns_of("default")
        except jinja2.TemplateError as error:
            self.has_parts = True
            with contextlib.suppress(jinja2.TemplateError):
                return self.turns_of("default")
            raise UserError(f"{self.place} can't be used: {error!s:.300}") from error

    def turns_of(self, name, kwargs=None, system=None):
        """The Turns of a template, with these variables and this system message; learned at the first use."""
        if not kwargs and not system and (name, None, None) in self.learned:
            return self.learned[name, None, None]
        kwargs = kwargs or {}
        key = name, repr(sorted(kwargs.items())) if kwargs else None, system
        if key not in self.learned:
            if len(self.learned) > 100:
                self.learned.clear()

            def render(messages, add_generation_prompt=False, tools=None):
                return self.render(messages, add_generation_prompt, tools, kwargs, name)

            added = [token.content for token in self.added.values()]
            before = [{"role": "system", "content": system}] if system else []
            learned = self.learned[key] = Turns(render, added, self.special.get("eos_token"), before)
            if learned.arguments_as_text:
                self.text_arguments.add(name)
        return self.learned[key]

    # ---- rendering ----------------------------------------------------------------------------------------

    def encode_ahead(self, batches):
        """Yield (batch, its encodings). A batch is a list of objects that have a .text.

        While the caller reads the next batch, two threads encode those before it, on all cores and without
        Python's lock. With one thread the cores would have nothing to do while it waits for that lock.
        """
        def encode(batch):
            with tokenizer_errors(f"the tokenizer of {self.directory} can't encode the data"):
                return self.tokenizer.encode_batch([item.text for item in batch], add_special_tokens=False)

        def take():
            batch, encodings = ahead.popleft()
            return batch, encodings.result()

        ahead = collections.deque()  # of (batch, future of its encodings)
        with ThreadPoolExecutor(2) as pool:
            for batch in batches:
                ahead.append((batch, pool.submit(encode, batch)))
                while len(ahead) > 2 or sum(len(item.text) for waiting, _ in ahead
                                            for item in waiting) > MOST_AHEAD:
                    yield take()
            while ahead:
                yield take()

    def count(self, texts):
        """The number of tokens of some texts."""
        with tokenizer_errors(f"the tokenizer of {self.directory} can't encode the data"):
            return sum(map(len, self.tokenizer.encode_batch(list(texts), add_special_tokens=False)))

    def encode(self, text):
        """The token ids of a rendered prompt."""
        with tokenizer_errors(f"the tokenizer of {self.directory} can't encode the prompt"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def render(self, messages, add_generation_prompt=False, tools=None, template_kwargs=None, name=None):
        """The text of a conversation, identical to that of transformers' apply_chat_template."""
        text = self.render_marked(messages, add_generation_prompt, tools, template_kwargs, name)
        return re.sub(f"[{''.join(GenerationBlock.MARKS)}]", "", text) if self.marks(tools, name) else text

    def name_of(self, tools):
        return "tool_use" if tools is not None and "tool_use" in self.templates else "default"

    def marks(self, tools, name=None):
        return self.templates[name or self.name_of(tools)].marks_answers

    def render_marked(self, messages, add_generation_prompt=False, tools=None, template_kwargs=None,
                      name=None):
        """As render(), with the marks of GenerationBlock left in the text."""
        # Keys whose value is None are dropped, as in transformers: rows of a parquet file have all keys.
        messages = [{k: v for k, v in m.items() if k != "weight" and v is not None} for m in messages]
        if self.has_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        name = name or self.name_of(tools)
        if name in self.text_arguments:
            messages = [with_text_arguments(m) if m.get("tool_calls") else m for m in messages]
        values = {"documents": None, **self.special, **self.template_kwargs, **(template_kwargs or {})}
        template = self.templates[name].compiled
        return self.sandbox.render(template, messages=messages, tools=tools,
                                   add_generation_prompt=add_generation_prompt, **values)

    def render_spans(self, messages, where, tools=None, template_kwargs=None):
        """Render a conversation once and find its assistant turns. Returns Rendered.

        template_kwargs  of this row; they replace those of the run

        Raises UserError, which names the row, if the template refuses the conversation, if an answer can't be
        found in the text, or if the text lacks what a message or a tool says.
        """
        kwargs = self.checked_kwargs(template_kwargs, f"{where}: chat_template_kwargs")
        name = self.name_of(tools)
        rendered = self.render_or_refuse(messages, where, tools, kwargs)
        answers = [m for m in messages if m["role"] == "assistant"]
        try:
            learned = self.turns_of(name, kwargs, self.switch_of(messages, name))
        except jinja2.TemplateError as error:
            raise UserError(f"{where}: the model's chat template can't be used with this row's variables: "
                            f"{error!s:.300}") from error
        if self.marks(tools):
            text, spans = self.split_marked(rendered, answers, where, learned)
            missing = turns.unfound(text, messages, spans)
        else:
            tail = learned.tail(messages)
            text = rendered + tail
            searched, covered = self.cover_quoted_headers(text, messages, where, tools, kwargs, learned, tail)
            spans, missing = learned.find(searched, covered, where)
        check_calls(text, answers, spans, where)
        check_visible(text, answers, spans, where)
        spans, n_rendered, dropped = find_reasoning(text, answers, spans, learned)
        self.check_prompts(text, messages, spans, missing, where, tools, kwargs, name)
        if tools:
            self.check_tools(text, messages, tools, where, kwargs, name)
        return Rendered(text, spans, Notes(n_rendered, dropped, self.quoted_special(messages, where)))

    def switch_of(self, messages, name):
        """/no_think, /think or None: what in the system message a template reads, and removes."""
        if messages[0]["role"] != "system":
            return None
        switch = SWITCH.search(messages[0]["content"])
        return switch[0] if switch and switch[0] in self.templates[name].source else None

    def render_or_refuse(self, messages, where, tools, kwargs):
        """render_marked(). Raises UserError, which names the row, if the template fails."""
        try:
            return self.render_marked(messages, tools=tools, template_kwargs=kwargs)
        except jinja2.TemplateError as error:
            raise UserError(f"{where}: the model's chat template refuses this conversation: "
                            f"{error!s:.300}") from error

    def split_marked(self, marked, answers, where, learned):
        """(text without marks, Spans) of a text in which a template has marked the answers."""
        text, blocks = "", []
        for i, piece in enumerate(re.split(f"[{''.join(GenerationBlock.MARKS)}]", marked)):
            if i % 2:  # inside a {% generation %} block
                blocks.append((len(text), len(text) + len(piece)))
            text += piece
        spans = blocks if len(blocks) == len(answers) else joined(blocks)
        if len(spans) != len(answers):
            raise UserError(f"{where}: the chat template marks {len(spans)} answers as generated, but the "
                            f"conversation has {len(answers)}")
        for (start, stop), message in zip(spans, answers):
            visible = message["content"].rpartition(turns.THINK_END)[2].strip()
            if not turns.locate_forms(text, visible, start, None, stop):
                raise UserError(f"{where}: the answer {visible!r:.60} can't be found in what the chat "
                                f"template made of it: {text[start:stop]!r:.200}")
        has_end = [learned.at_call_end.search(text, *span) is not None for span in spans]
        return text, [Span(*span, end, m["weight"]) for span, end, m in zip(spans, has_end, answers)]

    def cover_quoted_headers(self, text, messages, where, tools, kwargs, learned, tail):
        """(text, messages) in which other characters replace the headers that prompts quote.

        A quoted header does not begin an answer. The text keeps its length, so that offsets in it are right
        for the original too.
        """
        header = learned.header
        prompts = [m for m in messages if m["role"] != "assistant"]
        if not header.strip() or not any(header in m["content"] for m in prompts):
            return text, messages
        cover = re.sub(r"\S", "\ufdd2", header)
        covered = [m if m["role"] == "assistant" else
                   {**m, "content": m["content"].replace(header, cover)} for m in messages]
        covered_text = self.render_or_refuse(covered, where, tools, kwargs) + tail
        if len(covered_text) != len(text):
            raise UserError(f"{where}: a prompt quotes {header!r}, and the chat template changes the "
                            "quote, so where answers begin is ambiguous")
        return covered_text, covered

    # ---- nothing is lost ----------------------------------------------------------------------------------

    def check_prompts(self, text, messages, spans, missing, where, tools, kwargs, name):
        """Raise UserError if the text lacks a message: many templates drop those of a role unknown to them.

        missing  indices of the messages that are not at their place in the text
        """
        source, missing = self.templates[name].source, set(missing)
        if missing:  # the text without its answers
            begins, ends = [0, *(span.stop for span in spans)], [*(span.start for span in spans), len(text)]
            context = "\0".join(text[begin:end] for begin, end in zip(begins, ends))
        for i, message in enumerate(messages):
            content = message["content"].strip()
            # The text of a short message that seems to be there may be the template's own.
            is_certain = i not in missing and (len(content) > SHORT or content not in source)
            if message["role"] == "assistant" or is_certain:
                continue
            is_written = True
            if i in missing:  # a template may move a system message, and remove a switch from it
                plain = SWITCH.sub(lambda switch: "" if switch[0] in source else switch[0], content).strip()
                is_written = (message["role"] in ("system", "developer")
                              and turns.locate_forms(context, plain, 0, None) is not None)
            if content and not (is_written and self.writes(messages, i, tools, kwargs, name)):
                raise UserError(f"{where}: the {message['role']:.60} message {content!r:.60} can't be found "
                                f"in what the chat template made of the conversation: {text!r:.300}; use a "
                                "role that it knows, or a template that writes the message (--chat_template)")

    def writes(self, messages, i, tools, kwargs, name):
        """Whether a template writes message i: one with another text, in its place, is rendered once."""
        around = [m["role"] for m in messages[max(i - 1, 0) : i + 2]]
        key = name, repr(sorted(kwargs.items())) if kwargs else None, i == 0, *around
        if key not in self.written:
            if len(self.written) > 1000:
                self.written.clear()
            probe = "probe message"
            other = [{**m, "content": probe} if m is messages[i] else m for m in messages]
            try:
                self.written[key] = probe in self.render_marked(other, tools=tools, template_kwargs=kwargs)
            except jinja2.TemplateError:  # it reads the content, which the probe replaces
                return True
        return self.written[key]

    def check_tools(self, text, messages, tools, where, kwargs, name):
        """Raise UserError if the text lacks a tool: many templates ignore tools."""
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise UserError(f'{where}: "tools" must be a list of objects, they are {tools!r:.60}')
        key = name, "tools", repr(sorted(kwargs.items()))
        if key not in self.written:  # a name may be elsewhere in the text, so a tool with another is rendered
            probe, parameters = "probe_tool", {"type": "object", "properties": {}}
            function = {"name": probe, "description": probe, "parameters": parameters}
            other = [{"type": "function", "function": function, **function}]
            try:
                self.written[key] = probe in self.render_marked(messages, tools=other, template_kwargs=kwargs)
            except jinja2.TemplateError:  # it wants tools of another form
                self.written[key] = True
        for tool in tools:
            function = tool.get("function")
            tool_name = (function if isinstance(function, dict) else tool).get("name")
            if not self.written[key] or isinstance(tool_name, str) and tool_name not in text:
                raise UserError(f"{where}: the tool {tool_name!r:.60} can't be found in what the chat "
                                "template made of the conversation, so it ignores tools; use one that writes "
                                "them (--chat_template), or remove the tools")

    def quoted_special(self, messages, where):
        """A warning if a message looks as if a template had rendered it: by its special tokens; or None.

        In an answer only the token that ends its turn says so.
        """
        for message in messages:
            content = message["content"]
            if message["role"] == "assistant":
                if content.lstrip().startswith(turns.THINK) and turns.THINK_END not in content:
                    return (f"{where}: an answer begins with {turns.THINK} and has no {turns.THINK_END}: it "
                            "may have been cut")
                if self.turn_end and content.rstrip().endswith(self.turn_end):
                    return (f"{where}: an answer ends with {self.turn_end}, which the chat template adds "
                            "once more; remove it from the row")
                continue
            for found in self.at_special.finditer(content):
                start = found.start()
                for length in self.special_lengths:
                    if content[start : start + length] in self.specials:
                        return (f"{where}: the {message['role']:.60} message holds the special token "
                                f"{content[start : start + length]}; if a chat template has already been "
                                "applied to this row, pass the messages without it")
        return None


def joined(blocks):
    """The (start, stop) of blocks, those that touch as one: a template may mark the parts of a turn."""
    made = []
    for start, stop in blocks:
        if made and made[-1][1] == start:
            start = made.pop()[0]
        if stop > start:
            made.append((start, stop))
    return made


def check_calls(text, answers, spans, where):
    """Raise UserError if the text lacks a call of an answer."""
    for span, message in zip(spans, answers):
        if calls := message.get("tool_calls"):
            turns.check_calls(calls, text[span.start : span.stop], where)


def check_visible(text, answers, spans, where):
    """Raise UserError if the text lacks a piece of an answer: templates drop what is around think blocks."""
    for span, message in zip(spans, answers):
        cursor = span.start
        has_block = turns.THINK_END in message["content"]
        for piece in turns.split_content(message["content"])[1] if has_block else ():
            place = turns.locate_forms(text, piece, cursor, None, span.stop)
            if not place:
                raise UserError(f"{where}: the text {piece!r:.60} of an answer can't be found in what the "
                                f"chat template made of it: {text[span.start : span.stop]!r:.200}; write "
                                "<think> ... </think> once, at the start of the answer")
            cursor = place[1]


def find_reasoning(text, answers, spans, learned):
    """Where the answers begin, behind their reasoning.

    Returns (spans with these places, number of trained answers whose reasoning is in the text, the reasoning
    of the other trained answers).
    """
    found, n_rendered, dropped = [], 0, ()
    for span, message in zip(spans, answers):
        reasoning, begins = turns.reasoning_of(message), learned.turn_begins(text, span)
        answer = learned.answer_after(text, span, begins, reasoning)
        is_rendered = bool(reasoning) and answer is not None
        if reasoning and not is_rendered:
            turn = text[span.start : span.stop]
            visible = message["content"].rpartition(turns.THINK_END)[2].strip()
            before = turn.rpartition(visible)[0] if visible else turn
            is_rendered = turns.locate_forms(before, reasoning, 0, None) is not None
            answer = None if is_rendered else learned.answer_after(text, span, begins, "")
        if not is_rendered or answer is not None:
            answer = span.start if answer is None else answer
            if learned.has_more_reasoning(text, span, begins, answer):
                answer, is_rendered = None, bool(reasoning)
        found.append(span._replace(answer=answer))
        if reasoning and span.weight:
            n_rendered += is_rendered
            dropped += () if is_rendered else (reasoning,)
    return found, n_rendered, dropped


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
