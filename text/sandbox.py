"""Render an untrusted chat template without access to Python, and with limits on its time and memory.

jinja's sandbox keeps a template from Python's attributes. It does not stop one that doubles a text fifty
times, pads one to a billion characters, or nests loops. Here an operation that makes a larger value adds its
cost to a total before it runs, and too high a total is an error. Only text/template.py uses this module.
"""

import contextlib
import functools
import json
import re
import time
import types

import jinja2
import jinja2.meta
import jinja2.runtime
import jinja2.sandbox
import jinja2.visitor

# Limits for one conversation.
SECONDS = 10  # time to render it
COST = 2**28  # characters of all values that the template makes, plus 64 times those of the conversation
OUTPUT = 2**18  # characters of the rendered text, plus 16 times those of the conversation
ITEM = 32  # cost of an item of a list, in characters: about the memory that it takes
LISTS = list, tuple, type({}.keys()), type({}.values()), type({}.items())
OF_DICTS = frozenset(dir(dict))
SINGLE = frozenset((int, float, bool, type(None)))  # types of values that cost 1
SHORTENING = frozenset("endswith lstrip removeprefix removesuffix rstrip startswith strip".split())
FRAME = "_loop_vars", "_block_vars"  # jinja adds them to the arguments of a call, and removes them
# What templates read most: all of it safe, and nothing that jinja replaces, as it does str.format
PLAIN = frozenset([(str, name) for name in (*SHORTENING, "replace", "split")] +
                  [(jinja2.runtime.LoopContext, name) for name in "first index index0 last".split()])

# What a template can make Python raise. SyntaxError: jinja compiles a break outside a loop to Python.
FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, SyntaxError, RecursionError)


def refuse(message):
    raise jinja2.TemplateError(message)


def length(value):
    """Characters of a value as JSON writes it, without escapes."""
    if type(value) is str:
        return len(value) + 2
    if isinstance(value, dict):
        return sum(map(length, value)) + sum(map(length, value.values())) + 4 * len(value) + 2
    if isinstance(value, (list, tuple)):
        return sum(map(length, value)) + 2 * len(value) + 2
    return len(repr(value))


@contextlib.contextmanager
def template_errors():
    """Turn any failure of a template into jinja2.TemplateError. Put only calls of jinja inside."""
    try:
        yield
    except jinja2.TemplateError:
        raise
    except FAILURES as error:
        raise jinja2.TemplateError(str(error)) from error


class Counted(jinja2.visitor.NodeTransformer):
    """Adds filters to a template's syntax tree, because Sandbox counts only filters, calls and operators.

    They are added to iterations of a loop and of its filter, to list, dict and tuple literals, to a ~ b, to
    slices, and to what `in` searches and == compares.
    """

    def filtered(self, node, name):
        return jinja2.nodes.Filter(self.generic_visit(node), name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node):
        count = jinja2.nodes.Filter(jinja2.nodes.Const(None), "iteration", [], [], None, None,
                                    lineno=node.lineno)
        self.generic_visit(node).body.insert(0, jinja2.nodes.ExprStmt(count, lineno=node.lineno))
        if node.test is not None:  # evaluated for items too for which the body does not run
            node.test = jinja2.nodes.And(jinja2.nodes.Not(count), node.test)  # the filter's value is None
        return node

    def visit_List(self, node):
        return self.filtered(node, "literal")

    visit_Dict = visit_List

    def visit_Tuple(self, node):
        return self.filtered(node, "literal") if node.ctx == "load" else node  # others are names to assign to

    def visit_Getitem(self, node):
        if isinstance(node.arg, jinja2.nodes.Slice):
            return self.filtered(node, "literal")
        return self.generic_visit(node)

    def visit_Compare(self, node):
        self.generic_visit(node)
        for operand in node.ops:
            if not isinstance(node.expr, jinja2.nodes.Const) or operand.op in ("in", "notin"):
                if not isinstance(operand.expr, (jinja2.nodes.Const, jinja2.nodes.Filter)):
                    operand.expr = jinja2.nodes.Filter(operand.expr, "searched", [], [], None, None,
                                                       lineno=node.lineno)
        return node

    def visit_Concat(self, node):
        operands = jinja2.nodes.List(self.generic_visit(node).nodes, lineno=node.lineno)
        return jinja2.nodes.Filter(operands, "join", [], [], None, None, lineno=node.lineno)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """The filter of transformers; jinja's own escapes characters that are special in HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja's sandbox as transformers sets it up, plus limits, which transformers does not have.

    An operation that makes a value larger than its operands calls spend() before it runs.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    list_filters = frozenset(  # filters that do not make text from the items of a list
        "batch dictsort groupby items list literal map max min reject rejectattr reverse select selectattr "
        "slice sort unique".split())
    # Filters that do not read the items. Templates ask for messages|length at each message.
    constant_filters = frozenset("attr count d default first last length".split())
    lazy_filters = frozenset("map reject rejectattr select selectattr".split())  # they return generators
    constant_tests = frozenset("boolean callable defined divisibleby even false filter float integer "
                               "iterable mapping none number odd sameas sequence string test true "
                               "undefined".split())

    def __init__(self, extensions, now):
        """now: the datetime or date that strftime_now prints."""
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self.shown)
        self.filters["tojson"] = tojson
        for name in ("pprint", "urlize", "wordwrap"):  # no chat template uses them; they can repeat a text
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters["literal"] = lambda value: value
        self.filters = {name: self.counted(name, function) for name, function in self.filters.items()}
        self.tests = {name: function if name in self.constant_tests else self.counted_test(function)
                      for name, function in self.tests.items()}
        self.filters["searched"] = jinja2.pass_context(lambda context, value: self.searched(value))
        self.filters["iteration"] = jinja2.pass_context(lambda context, value: self.spend(1))
        self.globals["raise_exception"] = refuse
        self.globals["strftime_now"] = now.strftime
        self.safe_attributes = {}  # (type, name): whether templates may read it
        self.start(0)

    def load(self, source):
        """The template of a source text. Raises jinja2.TemplateError if it is wrong."""
        with template_errors():
            return self.from_string(source)

    def variables(self, source):
        """Names of the variables that the template of a source text reads, in its macros too.

        A name that loops set is the template's own, unless it is tested: then it may come from outside.
        """
        with template_errors():
            tree = self.parse(source)
            read = jinja2.meta.find_undeclared_variables(tree)
        tested = {node.node.name for node in tree.find_all(jinja2.nodes.Test)
                  if isinstance(node.node, jinja2.nodes.Name)}
        tested |= {node.node.name for node in tree.find_all(jinja2.nodes.Filter)
                   if isinstance(node.node, jinja2.nodes.Name) and node.name in ("default", "d")}
        own = {target.name for loop in tree.find_all(jinja2.nodes.For)
               for node in loop.find_all((jinja2.nodes.Assign, jinja2.nodes.AssignBlock))
               for target in [node.target] if isinstance(target, jinja2.nodes.Name)}
        return frozenset(read - (own - tested))

    def render(self, template, /, **values):
        """The text that a template makes of a conversation.

        Raises jinja2.TemplateError if the template fails or exceeds a limit.
        """
        with template_errors():  # it fails on values that are nested too deep
            size = length(values)
        self.start(size)
        with template_errors():
            text = template.render(values)  # a variable may have any name, self too
        if len(text) > OUTPUT + 16 * size:
            refuse(f"it makes {len(text):,} characters from a conversation of {size:,}")
        return text

    def start(self, size):
        """Reset the limits, for a conversation of `size` characters."""
        self.budget, self.deadline = COST + 64 * size, time.monotonic() + SECONDS

    def spend(self, cost):
        """Subtract a cost, in characters, from the budget. Raises jinja2.TemplateError at a limit."""
        self.budget -= cost
        if self.budget < 0:
            refuse(f"it makes more than {COST // 10**6} million characters from one conversation")
        if time.monotonic() > self.deadline:
            refuse(f"it takes more than {SECONDS} s for one conversation")

    def size(self, value, as_text=True):
        """The cost of a value and all values inside it, in characters.

        as_text  texts inside lists count with their length, not only as an item
        """
        if isinstance(value, str):
            return len(value)
        if type(value) in SINGLE:
            return 1
        if isinstance(value, range):
            return ITEM * len(value)
        size, pending = 1, [value]
        while pending:
            value = pending.pop()
            if isinstance(value, jinja2.utils.Namespace):
                value = value._Namespace__attrs
            if isinstance(value, dict):
                pending += value.keys() if as_text else ()
                value = value.values()
            if isinstance(value, str):
                size += len(value) if as_text else 0
            elif isinstance(value, LISTS):
                pending += value
                size += ITEM * len(value)
            if size > self.budget:
                break  # a small value may hold the same list a billion times
        return size

    def cost(self, name, value, arguments):
        """An upper bound of the characters that a filter, or a method of a value, makes."""
        cost = self.size(value, name not in self.list_filters)
        sizes = [self.size(argument) for argument in arguments]
        is_text = isinstance(value, str)
        if name == "replace" and len(arguments) > 1:
            cost += (value.count(str(arguments[0])) if is_text else cost) * sizes[1]
        elif name == "join":  # as a method: value is the separator
            cost = sum(sizes, cost)
            lists = [x for x in (value, *arguments) if isinstance(x, (list, tuple))]
            cost += max([len(x) * (cost - self.size(x)) for x in lists], default=0)
        elif name in ("format", "format_map", "translate"):
            if is_text and re.search(r"\d{4}|\*|\{[^}]*\{", value.replace("{{", "")):
                refuse("a format pads to thousands of characters")
            fields = str(value).count("%") + str(value).count("{")  # each may be padded to 999 characters
            cost += cost * sum(sizes) if name == "translate" else fields * (1000 + sum(sizes))
        elif name in ("indent", "tojson"):  # arguments appear in every line, or between all items
            cost *= 1 + sum(sizes)
        elif name in ("split", "rsplit", "splitlines"):
            is_separated = arguments and isinstance(arguments[0], str)
            cost += 2 * ITEM * (value.count(arguments[0]) if is_separated else cost // 2)
        elif name == "striptags":  # copies the text for each tag
            cost *= 1 + str(value).count("<")
        elif name == "sum" and any(isinstance(argument, LISTS) for argument in arguments):
            cost *= 1 + len(value)  # copies the list for each item
        elif name == "strftime":
            cost = 256 * sum(sizes)
        elif name in self.list_filters:
            dots = [argument.count(".") for argument in arguments if isinstance(argument, str)]
            cost = (cost + sum(sizes)) * (1 + max(dots, default=0))  # "a.b.c" is looked up in steps
            cost *= ITEM if is_text else 1  # a list of its characters
        else:
            cost += sum(sizes)
        for number in arguments:
            if type(number) is int:
                cost *= max(1, abs(number))
        return cost

    def getattr(self, obj, attribute):
        """Every x.name in a template; as jinja's, but faster for the keys of messages and what is PLAIN."""
        if type(obj) is dict and attribute in obj and attribute not in OF_DICTS:
            return obj[attribute]
        if (type(obj), attribute) in PLAIN:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj, attr, value):
        """As jinja's, which looks only at the type and the name, but takes long."""
        key = type(obj), attr
        if key not in self.safe_attributes:
            if len(self.safe_attributes) > 1000:
                self.safe_attributes.clear()
            self.safe_attributes[key] = super().is_safe_attribute(obj, attr, value)
        return self.safe_attributes[key]

    def counted(self, name, function):
        """A filter that spends its cost before it runs."""

        @functools.wraps(function)  # copies jinja_pass_arg, with which jinja passes a context
        def constant_filter(*values, **named):
            self.spend(1)
            return function(*values, **named)

        @functools.wraps(function)
        def counted_filter(*values, **named):
            at = int(getattr(function, "jinja_pass_arg", None) is not None)  # where the filtered value is
            value, rest = values[at], values[at + 1 :]
            if name in ("join", "sum") and isinstance(value, types.GeneratorType):
                value = list(value)
            if name == "round" and any(abs(number) > 1000 for number in rest if isinstance(number, int)):
                refuse("a number of thousands of digits")
            self.spend(self.cost(name, value, [*rest, *named.values()]))
            if name in self.lazy_filters:
                value = self.turns(value)
            return function(*values[:at], value, *rest, **named)

        return constant_filter if name in self.constant_filters else counted_filter

    def turns(self, items):
        """The items of a list or generator; each of them spends 1."""
        for item in items or ():
            self.spend(1)
            yield item

    def searched(self, value):
        """A value that is about to be searched or compared; with a text, that is faster than to copy it."""
        self.spend(len(value) // ITEM + 1 if isinstance(value, str) else self.size(value, False))
        return value

    def counted_test(self, function):
        """A test, such as `is in`, that spends its cost before it runs."""

        @functools.wraps(function)
        def counted_test(*values):
            for value in values:
                self.searched(value)
            return function(*values)

        return counted_test

    def call(self, context, function, /, *values, **named):
        """Every call in a template: methods of texts and numbers spend cost(), others their inputs' size."""
        inputs = [*values, *(value for key, value in named.items() if key not in FRAME)]
        is_method = type(function) is types.BuiltinMethodType and type(function.__self__) is str
        if is_method and function.__name__ in SHORTENING and len(inputs) == len(values):
            if all(type(value) is str for value in values):
                self.spend(len(function.__self__) + sum(map(len, values)))
                return function(*values)
        method = getattr(function, "__wrapped__", function)  # jinja wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, (str, int)):
            values = [list(v) if name == "join" and isinstance(v, types.GeneratorType) else v for v in values]
            self.spend(self.cost(name, owner, [*values, *inputs[len(values) :]]))
        elif name == "strftime":
            self.spend(self.cost(name, None, values))
        else:
            inputs += [owner] * (name == "copy")
            self.spend(sum(self.size(value, False) for value in inputs) + 1)
        result = super().call(context, function, *values, **named)
        if isinstance(result, bytes):  # their methods and operators are not counted
            refuse("it makes bytes; a template can only use text")
        return result

    def call_binop(self, context, operator, left, right):
        """Every operator of intercepted_binops in a template."""
        if operator == "+" and type(left) is type(right) is str:
            self.spend(len(left) + len(right))
            return left + right
        if operator == "%" and isinstance(left, str):
            argument = right if isinstance(right, (str, tuple, dict)) else str(right)
            self.spend(self.cost("format", left, [argument]))
        elif operator == "+":
            self.spend(self.size(left, False) + self.size(right, False))
        elif operator == "*":
            for times, value in ((left, right), (right, left)):
                if isinstance(times, int):
                    size = 0 if isinstance(value, int) else self.size(value, False)
                    self.spend(max(1, times) * size)
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            if (sum(bits) if operator == "*" else bits[0] * abs(right)) > 4096:
                refuse("a number of thousands of digits")
        return super().call_binop(context, operator, left, right)

    def shown(self, value):
        """Every value that is printed. A text adds no cost; a list may hold another list a billion times."""
        if not isinstance(value, str):
            self.spend(self.size(value))
        return value

    def concat(self, pieces):
        """Every block of output that a template puts together."""
        counted = []
        for piece in pieces:
            self.spend(len(piece) + 1)
            counted.append(piece)
        return "".join(counted)

    def _parse(self, source, name, filename):
        return Counted().visit(super()._parse(source, name, filename))
