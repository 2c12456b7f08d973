"""The structure of the project, checked on its source: imports, file names, lengths, and forbidden constructs.

Each rule is a function that takes {path: source} and returns a list of breaches, one string each. So each rule can be
tested on source with a planted breach.
"""

import ast
import functools
import os
import re
from itertools import chain

import pytest
from helpers import ROOT

LEVELS = [  # from the bottom up; a module may import lower levels, and its own level if that makes no circle
    ("disk.files", "settings.errors"),
    ("text", "ops", "ranks", "disk", "settings", "families.config", "families.rope", "families.rows"),
    ("model", "fsdp"),
    ("data", "lora", "families"),
    ("screen",),
    ("sft", "chat", "tools"),
]
TOP = {"sft.py", "model.py", "data.py", "lora.py", "fsdp.py", "chat.py"}
BUDGETS = {"sft.py": 350, "model.py": 300, "data.py": 350, "lora.py": 130, "fsdp.py": 130}  # each may grow by a tenth
TOGETHER, LONGEST, TRAIN, COLUMNS, FAMILY = 1400, 80, 90, 110, 130
SHARED = ("config", "rope", "rows", "registry")  # of families/; the others have the blocks of one family each


def project():
    """{path: source} of all code outside tests/."""
    sources = {}
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith((".", "__")) and (
            folder != ROOT or name not in ("tests", "models", "data", "docs", "outputs"))]
        for name in names:
            if name.endswith((".py", ".sh")):
                path = os.path.join(folder, name)
                with open(path, encoding="utf-8") as f:
                    sources[os.path.relpath(path, ROOT)] = f.read()
    return sources


@pytest.fixture(scope="module")
def code():
    return project()


parsed = functools.cache(ast.parse)


def trees(files):
    """[(path, syntax tree), ...] of the Python files, sorted by path."""
    return [(path, parsed(text)) for path, text in sorted(files.items()) if path.endswith(".py")]


# ---- imports ------------------------------------------------------------------------------------------------------


def module_of(path):
    """disk/files.py -> disk.files; disk/__init__.py -> disk"""
    return path.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", ".")


def level(module):
    """The number of a module's level in LEVELS: by its full name, otherwise by its folder; len(LEVELS) if by neither."""
    for name in (module, module.partition(".")[0]):
        for number, names in enumerate(LEVELS):
            if name in names:
                return number
    return len(LEVELS)


def imports(files):
    """[(importing module, imported module, line, whether inside a function), ...], for modules in `files` only."""
    modules, result = {module_of(path) for path in files if path.endswith(".py")}, []
    for path, tree in trees(files):
        in_functions = {id(node) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
                        for node in ast.walk(f)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                if isinstance(node, ast.ImportFrom) and name not in modules:
                    name = node.module  # a name inside the module
                if name in modules:
                    result.append((module_of(path), name, node.lineno, id(node) in in_functions))
    return result


def upward(files):
    """A module must not import one of a higher level."""
    return [f"{a} (line {line}) imports {b}, which is of a higher level" for a, b, line, _ in imports(files)
            if level(b) > level(a)]


def circles(files):
    """Modules must not import each other, directly or through others."""
    below = {}
    for a, b, *_ in imports(files):
        below.setdefault(a, set()).add(b)

    def reached(start):
        seen, todo = set(), [start]
        while todo:
            for name in below.get(todo.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    todo.append(name)
        return seen

    return [f"{name} imports itself through others" for name in sorted(below) if name in reached(name)]


def tools_in_the_trainer(files):
    """The trainer must not import tools, except sft.py tools.selfcheck inside a function."""
    return [f"{a} (line {line}) imports {b}" for a, b, line, inside in imports(files) if b.startswith("tools")
            and not a.startswith("tools") and not (a == "sft" and b == "tools.selfcheck" and inside)]


def data_in_ranks(files):
    """ranks/ must not import data.py or text/."""
    return [f"{a} (line {line}) imports {b}" for a, b, line, _ in imports(files)
            if a.startswith("ranks.") and (b == "data" or b.startswith("text"))]


def family_files(files):
    """families/NAME.py is found through the table of families/registry.py only, or imported by another family's file."""
    shared = [f"families.{name}" for name in SHARED]
    return [f"{a} (line {line}) imports {b}" for a, b, line, _ in imports(files)
            if b.startswith("families.") and b not in shared and (not a.startswith("families.") or a in shared)]


def import_map(files):
    """All imports as text, one line per module, by level."""
    imported = {}
    for a, b, *_ in imports(files):
        imported.setdefault(a, set()).add(b)
    modules = sorted({module_of(path) for path in files if path.endswith(".py")}, key=lambda m: (-level(m), m))
    return "\n".join(f"{level(m)}  {m}: {', '.join(sorted(imported.get(m, ())))}" for m in modules)


IMPORTS = {  # rule -> source that breaks it
    upward: {"disk/files.py": "", "data.py": "", "disk/run.py": "def f():\n    from data import Sampler"},
    circles: {"ops/a.py": "import ops.b", "ops/b.py": "def f():\n    from ops import c",
              "ops/c.py": "from ops.a import x"},
    tools_in_the_trainer: {"sft.py": "from tools import selfcheck", "tools/selfcheck.py": "", "tools/__init__.py": ""},
    data_in_ranks: {"ranks/a.py": "from text import b", "text/b.py": ""},
    family_files: {"sft.py": "from families import b", "families/b.py": "", "families/__init__.py": ""},
}


@pytest.mark.parametrize("rule", IMPORTS, ids=lambda rule: rule.__name__)
def test_imports_run_downwards(rule, code):
    """The message contains the rule, all imports, and the breaches."""
    breaches = rule(code)
    assert not breaches, "\n".join([f"{rule.__doc__} All imports, by level:", import_map(code), *breaches])


@pytest.mark.parametrize("rule", IMPORTS, ids=lambda rule: rule.__name__)
def test_a_planted_import_is_found(rule):
    """Each rule reports the source that breaks it."""
    assert rule(IMPORTS[rule]), import_map(IMPORTS[rule])


def test_sft_may_import_selfcheck_inside_a_function():
    """The only tool that a run starts."""
    assert not tools_in_the_trainer({"sft.py": "def f():\n    from tools import selfcheck", "tools/selfcheck.py": ""})


@pytest.mark.repo
def test_levels_contain_every_module_and_nothing_else(code):
    """Otherwise a module would be above all levels, or a name in LEVELS would have no module."""
    modules = {module_of(path) for path in code if path.endswith(".py")}
    assert [m for m in sorted(modules) if level(m) == len(LEVELS)] == []
    assert [n for n in chain(*LEVELS) if not any(f"{m}.".startswith(f"{n}.") for m in modules)] == []


# ---- files --------------------------------------------------------------------------------------------------------


def folders(files):
    """Folders with modules need an __init__.py: a namespace package loses to any other package of its name."""
    with_modules = {os.path.dirname(path) for path in files if path.endswith(".py")} - {""}
    return [f"{folder}/ has no __init__.py" for folder in sorted(with_modules) if f"{folder}/__init__.py" not in files]


def top(files):
    """The top level has exactly the six files that people read first."""
    present = {path for path in files if "/" not in path and path.endswith(".py")}
    return [f"{path} is {'missing' if path in TOP else 'unexpected'}" for path in sorted(present ^ TOP)]


FORBIDDEN = {"model.py": "mesh|dtensor|rank|fsdp|torch.dist", "data.py": "mesh|dtensor|fsdp|torch.dist",
         **dict.fromkeys(("text/sources.py", "text/containers.py", "text/formats.py"), "mesh|dtensor|rank|fsdp")}


def distributed_words(files):
    """The model and the data know nothing about other processes; data.py knows ranks only as two integers."""
    return [f"{path}: {word}" for path, pattern in FORBIDDEN.items()
            for word in re.findall(rf"\b\w*(?:{pattern})\w*", files.get(path, ""), re.IGNORECASE)]


FILES = {  # rule -> source with one breach
    folders: {"ops/loss.py": ""},
    top: {**dict.fromkeys(TOP, ""), "optim.py": ""},
    distributed_words: {"model.py": "x = 1  # of each Rank"},
}


@pytest.mark.repo
@pytest.mark.parametrize("rule", FILES, ids=lambda rule: rule.__name__)
def test_files_are_where_they_belong(rule, code):
    """The rules about folders, the top level and forbidden words."""
    assert rule(code) == []


@pytest.mark.parametrize("rule", FILES, ids=lambda rule: rule.__name__)
def test_a_planted_file_is_found(rule):
    """Each rule reports exactly its planted breach."""
    assert len(rule(FILES[rule])) == 1


# ---- sizes --------------------------------------------------------------------------------------------------------


def budgets(files):
    """The five files that people read first have a budget of lines, each and together; so has a family's file."""
    lines = {path: len(files.get(path, "").splitlines()) for path in BUDGETS}
    breaches = [f"{path} has {n} lines; its budget is {BUDGETS[path]} plus a tenth" for path, n in lines.items()
                if n > 1.1 * BUDGETS[path]]
    breaches += [f"{path} has {len(text.splitlines())} lines, more than {FAMILY}" for path, text in files.items()
                 if path.startswith("families/") and module_of(path).removeprefix("families.") not in SHARED
                 and len(text.splitlines()) > FAMILY]
    total = sum(lines.values())
    if total > TOGETHER:
        breaches.append(f"together they have {total} lines, more than {TOGETHER}")
    return breaches


def lengths(files):
    """A function fits on a screen."""
    breaches = []
    for path, tree in trees(files):
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                n = node.end_lineno - node.lineno + 1
                limit = TRAIN if (path, node.name) == ("sft.py", "train") else LONGEST
                if n > limit:
                    breaches.append(f"{path}:{node.lineno} {node.name} has {n} lines, more than {limit}")
    return breaches


def columns(files):
    """Lines are at most 110 columns wide."""
    return [f"{path}:{i} has {len(line)} columns" for path, text in sorted(files.items())
            for i, line in enumerate(text.splitlines(), 1) if len(line) > COLUMNS]


# ---- forbidden constructs -----------------------------------------------------------------------------------------


def conditionals(files):
    """No conditional expression inside another, or as the condition of an if or a while."""
    breaches = []
    for path, tree in trees(files):
        for node in ast.walk(tree):
            if isinstance(node, ast.IfExp) and any(isinstance(n, ast.IfExp) for n in ast.walk(node) if n is not node):
                breaches.append(f"{path}:{node.lineno} a conditional expression inside another")
            if isinstance(node, (ast.If, ast.While)):
                operands = [node.test]
                for operand in operands:  # grows while it is read: and, or and not have operands of their own
                    if isinstance(operand, ast.BoolOp):
                        operands += operand.values
                    elif isinstance(operand, ast.UnaryOp):
                        operands.append(operand.operand)
                if any(isinstance(operand, ast.IfExp) for operand in operands):
                    breaches.append(f"{path}:{node.lineno} a conditional expression as a condition")
    return breaches


def patches(files):
    """No function is assigned to an attribute: a subclass or an argument shows better what is called."""
    functions = {}  # module -> names of its functions
    for path, tree in trees(files):
        functions[module_of(path)] = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    breaches = []
    for path, tree in trees(files):
        methods = {id(f) for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body}
        named = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and id(n) not in methods}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                named |= {a.asname or a.name for a in node.names if a.name in functions.get(node.module, ())}
        for node in ast.walk(tree):
            pairs = []
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        pairs += zip(target.elts, node.value.elts)
                    else:
                        pairs.append((target, node.value))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
                pairs = [(ast.Attribute(), node.args[2])]
            for target, value in pairs:
                is_function = isinstance(value, ast.Lambda) or isinstance(value, ast.Name) and value.id in named
                if isinstance(target, ast.Attribute) and is_function:
                    breaches.append(f"{path}:{node.lineno} a function is assigned to an attribute")
    return breaches


def newer_syntax(files):
    """Syntax that Python 3.10, which train.sh accepts, can't read; and -P, which it lacks."""
    found = []
    for path, source in files.items():
        if not path.endswith(".py"):
            found += [f"{path}: -P" for _ in re.findall(r"^[^#\n]*\$python.* -\w*P", source, re.M)]
            continue
        try:
            ast.parse(source, feature_version=(3, 10))
        except SyntaxError as error:
            found.append(f"{path}: {error}")
    return found


def private_words(files):
    """Words that this project once used in place of the field's: detected, untrusted, atomic, skip, continue, setting."""
    pattern = (r"\btold\b|stranger's|whole or absent|made whole|\bleft out\b|\bleave out\b|step in hand|goes on\b"
               r"|to the last bit|\bknobs?\b|holds a run")
    return [f"{path}:{i} {word}" for path, text in sorted(files.items())
            for i, line in enumerate(text.splitlines(), 1) for word in re.findall(pattern, line, re.IGNORECASE)]


LONG = "def f():\n" + "    x = 1\n" * LONGEST
RULES = {  # rule -> sources that break it
    budgets: [{"lora.py": "\n" * 144}, {"families/a.py": "\n" * 131}, dict.fromkeys(("sft.py", "model.py", "data.py"), "\n" * 1000)],
    lengths: [{"ops/a.py": LONG}, {"sft.py": f"class A:\n{LONG.replace('def', ' def', 1)}"},
              {"sft.py": LONG.replace("f()", "train()") + "    x = 1\n" * 10}],
    columns: [{"train.sh": "#" * 111}],
    conditionals: [{"a.py": "x = 1 if a else 2 if b else 3"}, {"a.py": "x = f(1 if a else 2) if b else 3"},
                   {"a.py": "if a if b else c:\n    pass"}, {"a.py": "while not d or (a if b else c):\n    pass"}],
    patches: [{"a.py": "def f(m):\n    m.forward = lambda x: x"}, {"a.py": "def g():\n    pass\nm.forward = g"},
              {"a.py": "from ops.b import g as h\nself.product = h", "ops/b.py": "def g():\n    pass"},
              {"a.py": "def g():\n    pass\na, m.f = 1, g"}, {"a.py": "setattr(m, 'f', lambda x: x)"}],
    newer_syntax: [{"a.py": "try:\n    f()\nexcept* OSError:\n    pass"}, {"train.sh": 'exec "$python" -P f'}],
    private_words: [{"a.py": "x = 1  # Left out here"}, {"a.py": "# a knob"}],
}


@pytest.mark.repo
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_repository_keeps_its_rules(rule, code):
    """Limits on sizes and style. They run with --repo only, so a fork may break them."""
    breaches = rule(code)
    assert not breaches, "\n".join([rule.__doc__, *breaches])


@pytest.mark.repo
def test_the_documents_have_no_private_words():
    """All pages but the diary, which stays as it was written."""
    pages = {}
    for folder in (ROOT, os.path.join(ROOT, "docs")):
        for name in os.listdir(folder):
            if name.endswith((".md", ".yaml")) and name != "diary.md":
                with open(os.path.join(folder, name), encoding="utf-8") as f:
                    pages[name] = f.read()
    assert len(pages) > 10
    assert private_words(pages) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_planted_breach_is_found(rule):
    """Each rule reports each source that breaks it."""
    for planted in RULES[rule]:
        assert rule(planted), planted


@pytest.mark.parametrize("rule, fine", [
    (lengths, {"ops/a.py": LONG[:-10], "sft.py": LONG.replace("f()", "train()") + "    x = 1\n" * 9}),
    (conditionals, {"a.py": "x = (1 if a else 2, 3 if b else 4)\nif x[0 if a else 1]:\n    pass"}),
    (patches, {"a.py": "class A:\n    def g(self):\n        self.g = g\n        self.x, y = 1, lambda: 0"})],
    ids=lambda value: getattr(value, "__name__", ""))
def test_allowed_code_is_not_reported(rule, fine):
    """Just within the limits, or similar to a breach."""
    assert rule(fine) == []
