"""How a chat template writes an assistant's turn, and where the answers of a conversation are in its text.

Turns learns the first by rendering short conversations. Its find() uses that to search the text of a real
one. Answers are found by characters, in order; what can't be found is an error, never a guess.
"""

import contextlib
import itertools
import json
import os
import re
from typing import NamedTuple

import jinja2

from settings.errors import UserError

ASK = {"role": "user", "content": "probe question"}
REPLY = {"role": "assistant", "content": "probe answer"}
AGAIN = {"role": "user", "content": "second question"}
THOUGHT, CALL, VALUE, RESULT = "probe thought", "probe_call", "probe value", "probe result"
CALL_IDS = "abcDEF123", "987zyxWVU"  # Mistral's templates want nine characters
THINK, THINK_END = "<think>", "</think>"
BLOCK = re.compile(r"(?s)<think>.*?</think>")
# Tags of reasoning in other people's data, which few templates know
OTHER_TAGS = re.compile(r"(?i)\s*(?:<(?:thinking|thoughts?|reasoning|reflection|seed:think)>|\[think\]|"
                        r"<\|begin_of_thought\|>)|\s*<T(?:hink|HINK)>")
WORD = re.compile(r"\S+")


class Span(NamedTuple):
    """Characters text[start:stop] of an assistant's turn.

    A span begins after the turn's header and ends after the token that ends the turn. Reasoning that the
    template puts there is inside. The newline after the turn, and a header after the last turn, are not.
    """

    start: int
    stop: int
    has_stop_token: bool  # the text of the token that ends the turn is in the span
    weight: float  # of the losses of its tokens; 0: it is not trained
    # Where the answer begins, behind its reasoning: `start` without reasoning, None if that is unknown
    answer: int | None = None


def first_token(text, tokens):
    """The first of these tokens in a text, the longest one if several begin there; None without any."""
    found = [(text.index(token), -len(token), token) for token in tokens if token in text]
    return min(found)[2] if found else None


def last_token(text, tokens):
    """The last of these tokens in a text, the longest one if several end there; None without any."""
    found = [(text.rindex(token) + len(token), len(token), token) for token in tokens if token in text]
    return max(found)[2] if found else None


def common_end(a, b):
    return os.path.commonprefix([a[::-1], b[::-1]])[::-1]


def any_of(texts):
    """A pattern that matches the first of these texts; one that matches nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def end_of(content, text):
    """Where the content of a probe ends in the text that a template made of it."""
    if content not in text:
        raise jinja2.TemplateError(f"it omits the message {content!r}")
    return text.index(content) + len(content)


def locate(text, content, start, barrier, stop=None):
    """(start, stop) of content in text[start:stop]; white space may differ, as some templates re-indent.

    None if it is not found, or if the pattern `barrier` matches before it: then it belongs to another
    message.
    """
    stop = len(text) if stop is None else stop
    position = text.find(content, start, stop)
    place = (position, position + len(content)) if position >= 0 else None
    if not place or barrier and barrier.search(text, start, position):
        limit = barrier and barrier.search(text, start, stop)  # it has to begin before this ends
        if limit:
            beyond = itertools.islice(WORD.finditer(text, limit.end(), stop), len(content.split()), None)
            stop = next((word.start() for word in beyond), stop)
        place = locate_words(text, content, start, stop)
    return None if place and barrier and barrier.search(text, start, place[0]) else place


def locate_words(text, content, start, stop):
    """(start, stop) of content in text[start:stop], where white space may differ; None if it is not there.

    A pattern of all words would take minutes and gigabytes for a content of megabytes.
    """
    flat, wanted = " ".join(text[start:stop].split()), " ".join(content.split())
    first = flat.find(wanted)
    if first < 0 or start > stop:
        return None
    if not wanted:
        return start, start
    places = []
    for at in (first, first + len(wanted) - 1):  # of its first and its last character
        word = next(itertools.islice(WORD.finditer(text, start, stop), flat.count(" ", 0, at), None))
        places.append(word.start() + at - flat.rfind(" ", 0, at) - 1)
    return places[0], places[1] + 1


def reasoning_of(message):
    """The text of a message's reasoning: of its own key, or of the block with which its content begins."""
    text = message.get("reasoning_content") or message.get("thinking") or ""
    if isinstance(text, str) and text.strip():
        return text.strip()
    return split_content(message["content"])[0]


def split_content(content):
    """(reasoning, pieces of the answer) of a content. The pieces are between and after its think blocks.

    The first block may lack its <think>: then a generation prompt had it.
    """
    start, end = content.find(THINK), content.find(THINK_END)
    if end < 0:
        return "", [content.strip()]
    reasoning = ""
    if not 0 <= start < end:
        reasoning, content = content[:end], content[end + len(THINK_END) :]
    elif not content[:start].strip():
        reasoning = content[start + len(THINK) : end]
    return reasoning.strip(), [piece for piece in map(str.strip, BLOCK.split(content)) if piece]


def call_message(call_id, arguments, count=1):
    call = {"id": call_id, "type": "function", "function": {"name": CALL, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call] * count}


class Turns:
    """How a template writes an assistant's turn.

    header            what every assistant turn begins with, e.g. "assistant\\n"
    headers           beginnings of the generation prompt that turns may begin with, longest first: some
                      templates put <think> there, and write earlier turns without it. The last is `header`
    leads             what a template may write between header and answer, longest first
    is_closing        the header also closes every user turn, e.g. [/INST], so it is between two user turns
    ends              texts that end a turn; the first one ends the last turn of a conversation
    call_ends         ends, and those of a turn with calls
    is_appended       the first token of the next turn ends a turn, as with GLM-4: nothing ends the last one
    splits_reasoning  reasoning is a part of the turn with a header of its own, as with gpt-oss
    thoughts          [(what is before reasoning, what is after it), ...], e.g. <think> and </think>
    reminder          what a template writes after all turns and before a generation prompt; mostly nothing.
                      No text of probe() has it
    at_last           what it writes after that if there is no generation prompt
    after_tool        (what is before an answer to a tool, what a generation prompt adds to it, whether each
                      result of a tool has the first), if such an answer has no header; otherwise None
    arguments_as_text  the template wants a call's arguments as a JSON text
    """

    def __init__(self, render, added, eos, before=()):
        """Learn all that from short conversations.

        render  function of (messages, add_generation_prompt) -> text
        added   texts of the tokenizer's added tokens
        eos     the eos token, or None
        before  messages that each conversation begins with

        Raises jinja2.TemplateError if the template can't render them or omits a message.
        """
        self.render, self.added, self.before = render, added, list(before)
        self.reminder = self.at_last = ""
        with contextlib.suppress(jinja2.TemplateError):  # it refuses a conversation without an answer
            self.learn_reminder()
        prompt, one = self.probe(ASK, prompt=True), self.probe(ASK, REPLY)
        two = self.probe(ASK, REPLY, AGAIN)
        question_end = end_of(ASK["content"], one)
        # The text between question and answer, in the last turn and in an earlier one; the text after an
        # answer, at the end of a conversation and before another question.
        betweens = [text[end_of(ASK["content"], text) : text.index(REPLY["content"])] for text in (one, two)
                    if REPLY["content"] in text]
        after_last = one[end_of(REPLY["content"], one) :]
        after_reply = two[end_of(REPLY["content"], two) :]
        by_prompt = one[question_end : len(os.path.commonprefix([prompt, one]))]
        self.learn_ends(by_prompt, after_last, after_reply.partition(AGAIN["content"])[0], eos)
        self.learn_headers(prompt[len(one[:question_end]) :], by_prompt, betweens, after_reply)
        try:
            questions = self.probe(ASK, AGAIN)
        except jinja2.TemplateError:  # many templates refuse two questions in a row
            questions = ""
        before_second = questions.partition(AGAIN["content"])[0]
        self.is_closing = bool(self.header.strip()) and self.header in before_second
        self.splits_reasoning, self.after_tool, self.arguments_as_text = False, None, False
        self.call_ends = self.ends
        for arguments in ({"key": VALUE}, json.dumps({"key": VALUE})):
            with contextlib.suppress(jinja2.TemplateError, ValueError):  # it has no calls
                self.learn_tools(arguments, by_prompt)
                self.arguments_as_text = isinstance(arguments, str)
                break
        self.thoughts = [(THINK, THINK_END)]
        self.learn_reasoning(arguments)
        self.befores, afters = zip(*self.thoughts)
        self.before_thought = re.compile(rf"\s*({any_of(self.befores).pattern})?\s*")
        self.after_thought = re.compile(rf"\s*(?:{any_of(afters).pattern})(?:\s*\n)?")
        self.at_header = any_of([self.header] if self.header.strip() else ())
        self.at_end, self.at_call_end = any_of(self.ends), any_of(self.call_ends)
        # Between two parts of one turn: the token that ends the first, and a header
        self.at_joint = re.compile(rf"\s*(?:{any_of(added).pattern})?\s*{re.escape(self.header)}")

    def probe(self, *messages, prompt=False):
        """The text of a conversation, without the reminder."""
        text = offered = self.render([*self.before, *messages], prompt)
        if not self.reminder:
            return text
        if prompt:
            text = self.render([*self.before, *messages], False)
        body = text.removesuffix(self.reminder + self.at_last)
        before = body + self.reminder
        return body + offered[len(before) :] if body != text and offered.startswith(before) else offered

    def learn_reminder(self):
        """Set `reminder` and `at_last`: a question that is answered lacks both.

        A generation prompt, which begins with a header, comes after the reminder and in place of at_last.
        """
        asked, prompt, one = self.probe(ASK), self.probe(ASK, prompt=True), self.probe(ASK, REPLY)
        tail, offered, between = (text[end_of(ASK["content"], text) :] for text in (asked, prompt, one))
        offered = offered.partition(THINK)[0]
        if between.startswith(offered):
            return
        shared = len(os.path.commonprefix([offered, between]))
        for header in range(len(os.path.commonprefix([tail, offered])), 0, -1):  # where it may begin
            end = between.find(offered[header:], 0, shared + len(offered) - header)
            if offered[header:].strip() and 0 <= end < header:
                self.reminder, self.at_last = offered[end:header], tail[header:]
                return

    def learn_ends(self, by_prompt, after_last, after_reply, eos):
        last, middle = (first_token(text, self.added) for text in (after_last, after_reply))
        closing = os.path.commonprefix([by_prompt, after_reply])
        if middle not in (None, last) and middle in by_prompt:  # it may open every turn, and end none
            is_end = middle in closing and not closing.endswith(middle)
            middle = middle if is_end else None
        # Several tokens may end a turn, e.g. Cohere's <|END_RESPONSE|><|END_OF_TURN_TOKEN|>; the last is the
        # eos token.
        shared = os.path.commonprefix([after_last, after_reply])
        run = ""
        if last and eos and last in shared and eos in shared:
            run = shared[shared.index(last) : shared.index(eos) + len(eos)]
        if run and not any_of(self.added).sub("", run):
            last = middle = run
        self.ends = tuple(dict.fromkeys(end for end in (last, middle) if end))
        self.is_appended = last is None and middle is not None
        if self.is_appended and self.reminder:
            raise jinja2.TemplateError(f"it writes {self.reminder!r:.60} after the last turn, and no token "
                                       "ends that turn before it, so the model would not learn where to stop")
        self.between_end = middle or last

    def learn_headers(self, prompt, by_prompt, betweens, after_reply):
        # Between question and answer, a template closes the user's turn and writes the header. After an
        # answer it closes the turn too. So the common beginning of these two texts closes a turn; the rest
        # is the header.
        def header(between):
            closing = os.path.commonprefix([between, after_reply])
            opening = closing.rpartition(self.between_end)[2].lstrip() if self.between_end else ""
            return opening + between[len(closing) :]

        # How much of the generation prompt the turns begin with: all of it, or all of theirs. If they differ
        # from it in the reasoning, the header ends before that.
        begins = [os.path.commonprefix([prompt, between]) for between in betweens]
        begins = [begin if begin in (prompt, between) else begin.partition(THINK)[0]
                  for begin, between in zip(begins, betweens)]
        begins += [prompt, by_prompt.partition(THINK)[0]]
        headers = {header(begin) for begin in begins}
        for end in self.ends:  # that of a user's turn may be a part of it, as with Cohere
            headers = {h.rpartition(last_token(end, self.added))[2].lstrip() or h for h in headers}
        headers = sorted((h for h in headers if h.strip()), key=len, reverse=True)
        if not headers or not headers[-1].strip():  # there is no generation prompt
            headers = [header(betweens[0])]
        self.headers, self.header = headers, headers[-1]
        # What the template writes between header and answer, e.g. an empty think block
        leads = [between.rpartition(h)[2] for between in betweens
                 for h in [next((h for h in headers if h in between), None)] if h]
        self.leads = sorted({lead for lead in leads if lead}, key=len, reverse=True)

    def learn_tools(self, arguments, by_prompt):
        """Set call_ends and after_tool. Raises TemplateError or ValueError if the template has no calls."""
        tails = []
        for call_id in CALL_IDS:
            call = call_message(call_id, arguments)
            result = {"role": "tool", "content": RESULT, "tool_call_id": call_id, "name": CALL}
            called, returned = self.probe(ASK, call), self.probe(ASK, call, result)
            prompt = self.probe(ASK, call, result, prompt=True)
            answered = self.probe(ASK, call, result, REPLY)
            tail = answered[end_of(RESULT, answered) : answered.index(REPLY["content"])]
            offered = prompt[end_of(RESULT, prompt) :]
            shared = os.path.commonprefix([tail, offered])
            tails.append((shared, offered[len(shared) :]))
        call_end = end_of(CALL, returned)
        call_end = max(call_end, returned.rfind(VALUE) + len(VALUE))
        closed = len(os.path.commonprefix([called, returned]))
        if self.is_appended:
            token = first_token(returned[closed : returned.index(RESULT)], self.added)
            token = None if token and token in by_prompt else token
        else:
            token = last_token(returned[call_end:closed], self.added)
            twice = self.probe(ASK, call_message(CALL_IDS[-1], arguments, 2))
            if token and twice[call_end:].count(token) > 1:  # it ends each call, and not the turn
                token = None
        if token and token not in self.ends:
            self.call_ends = (token, *self.ends)
        (shared, more), (other, _) = tails
        if self.header not in shared:
            before = common_end(shared, other)
            results = self.probe(ASK, call_message(CALL_IDS[-1], arguments, 2), result, result, REPLY)
            count = results[results.index(RESULT) :].count(before) if before.strip() else 0
            self.after_tool = (before, more, count > 1) if count else None

    def learn_reasoning(self, arguments):
        """Set splits_reasoning and thoughts: probe an answer and a call, each with reasoning."""
        parts = []
        for message in (REPLY, call_message(CALL_IDS[0], arguments)):
            with contextlib.suppress(jinja2.TemplateError, ValueError):  # it omits reasoning there
                text = self.probe(ASK, {**message, "reasoning_content": THOUGHT, "thinking": THOUGHT})
                at = text.index(THOUGHT)
                before = text[end_of(ASK["content"], text) : at]
                after = text[at + len(THOUGHT) :].partition(message["content"] or CALL)[0]
                parts.append((before.rpartition(self.header)[2] if self.header.strip() else "", after))
        if not parts:
            return
        before, after = parts[0]
        self.splits_reasoning = bool(self.header.strip()) and self.header in after
        if self.splits_reasoning:
            after = after[: after.index(self.header) + len(self.header)]
        elif shared := os.path.commonprefix([after for _, after in parts]).strip():
            after = shared
        if len(parts) == 1:  # it may include what begins an answer or a call
            after = first_token(after, [*self.added, THINK_END]) or after
        if after.strip():
            self.thoughts.append((before.strip(), after.strip()))

    def tail(self, messages):
        """What ends the last turn if the template does not: its text must be appended."""
        last = messages[-1]
        if not self.is_appended or last["role"] != "assistant":
            return ""
        return self.call_ends[0] if last.get("tool_calls") else self.ends[0]

    def turn_begins(self, text, span):
        """[where a turn begins behind its header, where behind what a template may write before answers]"""
        header = next((h for h in self.headers if h.strip() and text.startswith(h, span.start)), "")
        start = span.start + len(header)  # a marked turn may begin with it
        lead = next((lead for lead in self.leads if text.startswith(lead, start)), "")
        return [start, start + len(lead)]

    def answer_after(self, text, span, begins, reasoning):
        """Where an answer begins behind this reasoning, with which its turn begins; None if it does not.

        begins  turn_begins(text, span)
        """
        for start in begins[: 2 if reasoning else 1]:
            before = self.before_thought.match(text, start, span.stop)
            begin = before.end()
            if not before[1] and not text[max(begin - 80, 0) : begin].rstrip().endswith(self.befores):
                continue  # reasoning begins with its tag, here or at the end of the header
            place = begin, begin + len(reasoning)
            if not text.startswith(reasoning, begin):  # white space may differ
                place = locate(text, reasoning, begin, None, span.stop)
            if place and not text[begin : place[0]].strip():
                if end := self.after_thought.match(text, place[1], span.stop):
                    return end.end()
        return None

    def has_more_reasoning(self, text, span, begins, start):
        """Whether a turn from `start` on seems to have reasoning: a tag at its start, or a block anywhere."""
        if text.find(THINK, start, span.stop) >= 0 and BLOCK.search(text, start, span.stop):
            return True
        starts = begins if start == span.start else [start]
        return any(self.before_thought.match(text, at, span.stop)[1]
                   or OTHER_TAGS.match(text, at, span.stop) for at in starts)

    # ---- finding ------------------------------------------------------------------------------------------

    def find(self, text, messages, where):
        """(Spans, indices of other messages that are not found) of a text without marked answers.

        Raises UserError, which names the row, if an answer is not found.
        """
        spans, missing, cursor, prompt_end = [], [], 0, 0  # prompt_end: of the last prompt that was found
        results, results_start = [], 0  # contents of the last tool messages, and where they begin
        for i, (message, after) in enumerate(zip(messages, [*messages[1:], REPLY])):
            content = message["content"].strip()
            if message["role"] != "assistant":
                if message["role"] != "tool" or not results:
                    results, results_start = [], cursor
                if message["role"] == "tool":
                    results.append(content)
                place = locate_forms(text, content, cursor, self.at_header)
                if not place and content and content in text[prompt_end:cursor]:
                    raise UserError(f"{where}: the {message['role']:.60} message {content!r:.60} can't be "
                                    "distinguished from an answer in the chat template's text: "
                                    f"{text[prompt_end:]!r:.200}")
                cursor = prompt_end = place[1] if place else cursor
                if not place and content:
                    missing.append(i)
                if self.is_closing and message["role"] == after["role"] == "user":
                    header = text.find(self.header, cursor)
                    cursor = prompt_end = cursor if header < 0 else header + len(self.header)
            else:
                begin = results_start if results and self.after_tool else cursor
                header_end = self.begin(text, begin, results, where)
                results = []
                place, end, has_end = self.find_answer(text, message, header_end, where)
                if not place:
                    raise UserError(f"{where}: the answer {content!r:.60} can't be found in what the chat "
                                    f"template made of it: {text[cursor:]!r:.200}")
                start = header_end if self.header else place[0]
                cursor = end if has_end else place[1]
                spans.append(Span(start, cursor, has_end, message["weight"]))
        return spans, missing

    def begin(self, text, cursor, results, where):
        """Where the turn after `cursor` begins, behind its header; -1 if there is no header.

        results  contents of the tool messages between it and the turn before, which begin at the cursor
        """
        if results and self.after_tool:
            before, more, is_repeated = self.after_tool
            if any(before in content for content in results):
                raise UserError(f"{where}: a result of a tool contains {before!r}, so where the answer to it "
                                "begins is ambiguous")
            for _ in range(len(results) if is_repeated else 1):
                cursor = text.find(before, cursor) + len(before)
                if cursor < len(before):
                    return -1
            return cursor + (len(more) if text.startswith(more, cursor) else 0)
        start = text.find(self.header, cursor)
        if start < 0:
            return -1
        return start + len(next(h for h in self.headers if text.startswith(h, start)))

    def find_answer(self, text, message, header_end, where):
        """(place, end, has_end): where an answer is, where its turn ends, and whether a token ends it."""
        content, calls = message["content"].strip(), message.get("tool_calls")
        if header_end < 0:
            return None, -1, False
        at_end, start = self.at_call_end if calls else self.at_end, header_end
        reasoning = reasoning_of(message) if self.splits_reasoning else ""
        if reasoning and (place := locate(text, reasoning, start, at_end)):
            start = self.skip_joint(text, place[1])
        start += len(next((lead for lead in self.leads if text.startswith(lead, start)), ""))
        place = locate(text, content, start, at_end)
        end, has_end = self.find_end(text, place, calls)
        if not (place and not text[start : place[0]].strip() and has_end and not calls):  # not plain
            place = self.find_after_reasoning(text, message, start, place, where)
            end, has_end = self.find_end(text, place, calls)
        return place, end, has_end

    def skip_joint(self, text, position):
        joint = self.at_joint.match(text, position)
        return joint.end() if joint else position

    def find_after_reasoning(self, text, message, header_end, place, where):
        """(start, stop) of an answer that may come after reasoning; `place` if it is not found there.

        Templates move or drop the reasoning before an answer, or put a block of their own there.
        """
        content, calls = message["content"].strip(), message.get("tool_calls")
        at_end = self.at_call_end if calls else self.at_end
        reasoning, _, visible = content.rpartition(THINK_END)
        other_content = [reasoning, message.get("reasoning_content"), calls]
        other_text = json.dumps(other_content, ensure_ascii=False, default=str)
        if quoted := at_end.search(other_text):
            raise UserError(f"{where}: the reasoning or the calls of the answer {content!r:.60} contain "
                            f"{quoted[0]}, so where its turn ends is ambiguous")
        limit = at_end.search(text, header_end)
        think_end = text.rfind(THINK_END, header_end, limit.start() if limit else len(text))
        start = header_end if think_end < 0 else think_end + len(THINK_END)
        after_reasoning = locate(text, visible.strip(), start, at_end)
        # An empty text is found anywhere, so then the end of the turn has to follow.
        is_certain = visible.strip() or self.find_end(text, after_reasoning, calls)[1]
        return after_reasoning if after_reasoning and is_certain else place

    def find_end(self, text, place, calls):
        """(end of the turn of an answer at `place`, whether only its calls are between the two)."""
        if not place:
            return -1, False
        start = self.skip_joint(text, place[1]) if calls and self.splits_reasoning else place[1]
        end = (self.at_call_end if calls else self.at_end).search(text, start)
        return (end.end(), bool(calls or not text[start : end.start()].strip())) if end else (-1, False)


# ---- every message is in the text ----------------------------------------------------------------------


def locate_forms(text, content, start, barrier, stop=None):
    """locate() of a content as it is, or as JSON: gpt-oss's template writes results of tools as JSON."""
    if place := locate(text, content, start, barrier, stop):
        return place
    for ensure_ascii in (False, True):
        escaped = json.dumps(content, ensure_ascii=ensure_ascii)[1:-1]
        if escaped != content and (place := locate(text, escaped, start, barrier, stop)):
            return place
    return None


def unfound(text, messages, spans):
    """Indices of the messages, other than answers, whose text is not where it should be."""
    missing, cursor, answers = [], 0, iter(spans)
    stops = [span.start for span in spans] + [len(text)]
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            cursor = next(answers).stop
            stops.pop(0)
        elif content := message["content"].strip():
            place = locate_forms(text, content, cursor, None, stops[0])
            if place:
                cursor = place[1]
            else:
                missing.append(i)
    return missing


def leaves(value):
    """The texts, numbers and so on inside a JSON value, and its keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def value_end(value, text, start=0):
    """Where a text or a number ends in text[start:], as JSON or Python write it; None if it is not there.

    White space may differ.
    """
    if isinstance(value, str):
        forms = [json.dumps(value.strip(), ensure_ascii=False)[1:-1]]
    else:
        forms = [json.dumps(value), str(value)]
    ends = [at + len(form) for form in forms if (at := text.find(form, start)) >= 0]
    if not ends and isinstance(value, str):
        ends = [place[1] for place in [locate_forms(text, value.strip(), start, None)] if place]
    return min(ends, default=None)


def check_calls(calls, turn, where):
    """Raise UserError if a call, or an argument of one, is not in the text of its turn."""
    plain = turn.replace("\\", "")  # some templates escape quotes in their own way
    position = 0
    for call in calls:
        function = call.get("function") or call
        name, arguments = str(function.get("name")), function.get("arguments")
        found = turn.find(name, position)
        if found < 0:
            raise UserError(f"{where}: the call of {name!r:.60} can't be found in what the chat "
                            f"template made of its turn: {turn!r:.200}")
        position = found + len(name)
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        cursor = position  # most templates write the arguments in their order
        for leaf in leaves(arguments if arguments is not None else {}):
            end = value_end(leaf, turn, cursor)
            cursor = cursor if end is None else end
            unescaped = leaf.replace("\\", "") if isinstance(leaf, str) else leaf
            if end is None and value_end(leaf, turn) is None and value_end(unescaped, plain) is None:
                raise UserError(f"{where}: the argument {leaf!r:.60} of the call of {name!r:.60} can't be "
                                f"found in what the chat template made of its turn: {turn!r:.200}")
