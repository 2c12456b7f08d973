"""Rendering an untrusted chat template: no Python for it to touch, and bounds to what it makes.

jinja's sandbox keeps a template from Python's attributes. It does not keep it from doubling a text fifty
times, padding one to a billion characters, or loops in loops; here the cost of each operation that makes
something larger is counted before it is done. text/template.py alone uses it.
"""

import contextlib
import functools
import json
import re
import time
import types
from collections.abc import MappingView
from datetime import datetime

import jinja2
import jinja2.sandbox
import jinja2.visitor

SECONDS, COST = 10, 2**28  # of one conversation: time to render it, and the characters of all values made
ITEM = 32  # characters that an item of a list counts as: so much memory it takes
OUTPUT = 2**18  # characters of its text, beyond 16 times those of the conversation


# what a template can make Python raise; jinja leaves a break outside a loop to Python's compiler
FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, SyntaxError, RecursionError)


def refuse(message):
    raise jinja2.TemplateError(message)


@contextlib.contextmanager
def template_errors():
    """Around calls of jinja only: whatever fails in a template is a jinja2.TemplateError."""
    try:
        yield
    except jinja2.TemplateError:
        raise
    except FAILURES as error:
        raise jinja2.TemplateError(str(error)) from error


class Counted(jinja2.visitor.NodeTransformer):
    """Rewrites a template so that Sandbox's filters see each turn of a loop, each list written, and a ~ b."""

    def filtered(self, node, name):
        return jinja2.nodes.Filter(self.generic_visit(node), name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node):
        turn = jinja2.nodes.Filter(jinja2.nodes.Const(None), "turn", [], [], None, None, lineno=node.lineno)
        self.generic_visit(node).body.insert(0, jinja2.nodes.ExprStmt(turn, lineno=node.lineno))
        return node

    def visit_List(self, node):
        return self.filtered(node, "made")

    visit_Dict = visit_List

    def visit_Tuple(self, node):
        return self.filtered(node, "made") if node.ctx == "load" else node  # else it is names to assign to

    def visit_Concat(self, node):
        parts = jinja2.nodes.List(self.generic_visit(node).nodes, lineno=node.lineno)
        return jinja2.nodes.Filter(parts, "join", [], [], None, None, lineno=node.lineno)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """transformers' filter: jinja's own escapes what is special in HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """As transformers sets it up: a template can't touch Python. And bounded, which transformers' isn't: what
    makes a value larger than those it is made of counts its cost before it is done; too much is an error."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    passing = frozenset(  # filters that make no text of the items of a list
        "attr batch count d default dictsort first groupby items last length list made map max min reject "
        "rejectattr reverse select selectattr slice sort unique".split())

    def __init__(self, extensions):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self.shown)
        self.filters["tojson"] = tojson
        for name in ("wordwrap", "urlize"):  # no chat template has them, and each puts a text in many times
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters["made"] = lambda value: value
        self.filters = {name: self.counted(name, function) for name, function in self.filters.items()}
        self.filters["turn"] = jinja2.pass_context(lambda context, value: self.spend(1))
        self.globals["raise_exception"] = refuse
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.start(0)

    def load(self, source):
        """The template of a source text. Raises jinja2.TemplateError."""
        with template_errors():
            return self.from_string(source)

    def render(self, template, **values):
        """The text that a template makes of a conversation.

        Raises jinja2.TemplateError where it fails, makes too much or takes too long.
        """
        with template_errors():
            size = sum(len(repr(value)) for value in values.values())  # may be nested too deep
        self.start(size)
        with template_errors():
            text = template.render(**values)
        if len(text) > OUTPUT + 16 * size:
            refuse(f"it makes {len(text):,} characters of a conversation of {size:,}")
        return text

    def start(self, size):
        """Before a conversation of so many characters."""
        self.left, self.until = COST + 64 * size, time.monotonic() + SECONDS

    def spend(self, cost):
        self.left -= cost
        if self.left < 0:
            refuse(f"it makes more than {COST // 10**6} million characters of one conversation")
        if time.monotonic() > self.until:
            refuse(f"it takes more than {SECONDS} s for one conversation")

    def size(self, value, as_text=True):
        """The cost of a value with all inside it; a text in it costs an item, and its length if as_text."""
        if isinstance(value, str):
            return len(value)
        size, inside = 1, [value]
        while inside:  # one list may be in a value a billion times
            value = inside.pop()
            if isinstance(value, jinja2.utils.Namespace):
                value = value._Namespace__attrs
            if isinstance(value, dict):
                inside += value.keys() if as_text else ()
                value = value.values()
            if isinstance(value, (list, tuple, MappingView)):
                inside += value
                size += ITEM * len(value)
            elif as_text and isinstance(value, str):
                size += len(value)
            if size > self.left:
                break
        return size

    def cost(self, name, value, arguments):
        """What a filter or a method of a value may make, at most: of texts in them, their product."""
        cost = self.size(value, name not in self.passing)
        sizes = [self.size(argument) for argument in arguments]
        if name == "replace" and isinstance(value, str) and len(arguments) > 1:
            cost += value.count(str(arguments[0])) * sizes[1]
        elif name == "join":  # of a method the separator comes first
            cost = sum(sizes, cost)
            lists = [x for x in (value, *arguments) if isinstance(x, (list, tuple))]
            cost += max([len(x) * (cost - self.size(x)) for x in lists], default=0)
        elif name in ("format", "format_map", "translate"):
            if isinstance(value, str) and re.search(r"\d{4}|\*", value):
                refuse("a format pads to thousands of characters")
            times = cost if name == "translate" else str(value).count("%") + str(value).count("{")
            cost += times * sum(sizes)
        else:
            cost += sum(sizes)
        for number in arguments:
            if type(number) is int:
                cost *= max(1, abs(number))
        return cost

    def counted(self, name, function):
        @functools.wraps(function)  # with the mark by which jinja hands a context over
        def filter_(*values, **named):
            first = getattr(function, "jinja_pass_arg", None) is not None
            if name == "join" and isinstance(values[first], types.GeneratorType):
                values = (*values[:first], list(values[first]), *values[first + 1 :])
            self.spend(self.cost(name, values[first], [*values[first + 1 :], *named.values()]))
            return function(*values, **named)

        return filter_

    def call(self, context, function, /, *values, **named):
        method = getattr(function, "__wrapped__", function)  # jinja wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, (str, int)):
            values = [list(v) if name == "join" and isinstance(v, types.GeneratorType) else v for v in values]
            self.spend(self.cost(name, owner, [*values, *named.values()]))
        else:
            self.spend(sum(self.size(value, False) for value in (*values, *named.values())) + 1)
        return super().call(context, function, *values, **named)

    def call_binop(self, context, operator, left, right):
        if operator == "%" and isinstance(left, str):
            argument = right if isinstance(right, (str, tuple, dict)) else str(right)
            self.spend(self.cost("format", left, [argument]))
        elif operator == "+":
            self.spend(self.size(left, False) + self.size(right, False))
        elif operator == "*":
            for times, value in ((left, right), (right, left)):
                if isinstance(times, int):
                    self.spend(max(1, times) * (self.size(value, False) if not isinstance(value, int) else 0))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            if (sum(bits) if operator == "*" else bits[0] * abs(right)) > 4096:
                refuse("a number of thousands of digits")
        return super().call_binop(context, operator, left, right)

    def shown(self, value):
        """Each value that is printed. Only text is cheap: a list in a list in a list may be a billion."""
        if not isinstance(value, str):
            self.spend(self.size(value))
        return value

    def concat(self, pieces):
        made = []
        for piece in pieces:
            self.spend(len(piece) + 1)
            made.append(piece)
        return "".join(made)

    def _parse(self, source, name, filename):
        return Counted().visit(super()._parse(source, name, filename))
