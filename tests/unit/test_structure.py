"""The shape of the project, read off its files: who imports whom, how long things are, and what is not written.

Each rule is a function of {path: source} that returns its breaches as texts, so that it can be tried on planted ones.
"""

import ast
import functools
import os
import re
from itertools import chain

import pytest
from helpers import ROOT

LEVELS = [  # from the bottom up; a module imports those of lower levels, and of its own without circles
    ("disk.files", "settings.errors"),
    ("text", "ops", "ranks", "disk", "settings", "families.config"),
    ("model", "fsdp"),
    ("data", "lora", "families"),
    ("screen",),
    ("sft", "chat", "tools"),
]
TOP = {"sft.py", "model.py", "data.py", "lora.py", "fsdp.py", "chat.py"}
BUDGETS = {"sft.py": 350, "model.py": 300, "data.py": 350, "lora.py": 130, "fsdp.py": 130}  # each may grow by a tenth
TOGETHER, LONGEST, TRAIN, COLUMNS = 1400, 80, 90, 110


def project():
    """{path: source} of the code, tests apart."""
    found = {}
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith((".", "__")) and (
            folder != ROOT or name not in ("tests", "models", "data", "docs", "outputs"))]
        for name in names:
            if name.endswith((".py", ".sh")):
                path = os.path.join(folder, name)
                with open(path, encoding="utf-8") as f:
                    found[os.path.relpath(path, ROOT)] = f.read()
    return found


@pytest.fixture(scope="module")
def code():
    return project()


parsed = functools.cache(ast.parse)


def trees(files):
    """[(path, its syntax tree), ...]"""
    return [(path, parsed(text)) for path, text in sorted(files.items()) if path.endswith(".py")]


# ---- imports ------------------------------------------------------------------------------------------------------


def module_of(path):
    """disk/files.py -> disk.files; disk/__init__.py -> disk"""
    return path.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", ".")


def level(module):
    """The number of the level whose names the module has, or is in; a longer name goes before a shorter."""
    for name in (module, module.partition(".")[0]):
        for number, names in enumerate(LEVELS):
            if name in names:
                return number
    return len(LEVELS)


def imports(files):
    """[(importing module, imported one, line, is it inside a function), ...], of modules in `files` alone."""
    modules, found = {module_of(path) for path in files if path.endswith(".py")}, []
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
                    found.append((module_of(path), name, node.lineno, id(node) in in_functions))
    return found


def upward(files):
    """Imports of a module that stands above."""
    return [f"{a} (line {line}) imports {b}, which stands above it" for a, b, line, _ in imports(files)
            if level(b) > level(a)]


def circles(files):
    """Modules that import each other, over any number of steps."""
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

    return [f"{name} imports itself, over others" for name in sorted(below) if name in reached(name)]


def of_tools(files):
    """What the trainer has of the tools: the check of a step, where it is needed."""
    return [f"{a} (line {line}) imports {b}" for a, b, line, inside in imports(files) if b.startswith("tools")
            and not a.startswith("tools") and not (a == "sft" and b == "tools.selfcheck" and inside)]


def ranks_of_data(files):
    """Ranks know of no data, and of no text."""
    return [f"{a} (line {line}) imports {b}" for a, b, line, _ in imports(files)
            if a.startswith("ranks.") and (b == "data" or b.startswith("text"))]


def a_map(files):
    """All imports, by level."""
    found = {}
    for a, b, *_ in imports(files):
        found.setdefault(a, set()).add(b)
    modules = sorted({module_of(path) for path in files if path.endswith(".py")}, key=lambda m: (-level(m), m))
    return "\n".join(f"{level(m)}  {m}: {', '.join(sorted(found.get(m, ())))}" for m in modules)


IMPORTS = {
    upward: {"disk/files.py": "", "data.py": "", "disk/run.py": "def f():\n    from data import Sampler"},
    circles: {"ops/a.py": "import ops.b", "ops/b.py": "def f():\n    from ops import c", "ops/c.py": "from ops.a import x"},
    of_tools: {"sft.py": "from tools import selfcheck", "tools/selfcheck.py": "", "tools/__init__.py": ""},
    ranks_of_data: {"ranks/a.py": "from text import b", "text/b.py": ""},
}


@pytest.mark.parametrize("rule", IMPORTS, ids=lambda rule: rule.__name__)
def test_imports_run_downwards(rule, code):
    breaches = rule(code)
    assert not breaches, "\n".join([f"{rule.__doc__} Each module, by level, and what it imports:", a_map(code), *breaches])


@pytest.mark.parametrize("rule", IMPORTS, ids=lambda rule: rule.__name__)
def test_a_planted_import_is_found(rule):
    assert rule(IMPORTS[rule]), a_map(IMPORTS[rule])


def test_sft_may_import_the_check_of_a_step_where_it_is_needed():
    assert not of_tools({"sft.py": "def f():\n    from tools import selfcheck", "tools/selfcheck.py": ""})


@pytest.mark.repo
def test_levels_name_what_there_is(code):
    """Else a module would stand above all, or a level would be of nothing."""
    modules = {module_of(path) for path in code if path.endswith(".py")}
    assert [m for m in sorted(modules) if level(m) == len(LEVELS)] == []
    assert [n for n in chain(*LEVELS) if not any(f"{m}.".startswith(f"{n}.") for m in modules)] == []


# ---- files --------------------------------------------------------------------------------------------------------


def folders(files):
    """Folders of modules that are no packages: a namespace package loses to any other of its name."""
    found = {os.path.dirname(path) for path in files if path.endswith(".py")} - {""}
    return [f"{folder}/ has no __init__.py" for folder in sorted(found) if f"{folder}/__init__.py" not in files]


def top(files):
    """Files of the top level but the six that people read first."""
    found = {path for path in files if "/" not in path and path.endswith(".py")}
    return [f"{path} is {'missing' if path in TOP else 'one too many'}" for path in sorted(found ^ TOP)]


WORDS = {"model.py": "mesh|dtensor|rank|fsdp|torch.dist", "data.py": "mesh|dtensor|fsdp|torch.dist",
         "text/formats.py": "mesh|dtensor|rank|fsdp"}


def of_others(files):
    """Words of other processes, of which the model and the data know nothing; data.py knows ranks as two integers."""
    return [f"{path}: {word}" for path, words in WORDS.items()
            for word in re.findall(rf"\b\w*(?:{words})\w*", files.get(path, ""), re.IGNORECASE)]


FILES = {folders: {"ops/loss.py": ""}, top: {**dict.fromkeys(TOP, ""), "optim.py": ""},
         of_others: {"model.py": "x = 1  # of each Rank"}}


@pytest.mark.repo
@pytest.mark.parametrize("rule", FILES, ids=lambda rule: rule.__name__)
def test_files_are_where_they_belong(rule, code):
    assert rule(code) == []


@pytest.mark.parametrize("rule", FILES, ids=lambda rule: rule.__name__)
def test_a_planted_file_is_found(rule):
    assert len(rule(FILES[rule])) == 1


# ---- sizes --------------------------------------------------------------------------------------------------------


def budgets(files):
    """Lines of the five files that tell the story."""
    lines = {path: len(files.get(path, "").splitlines()) for path in BUDGETS}
    found = [f"{path} has {n} lines; its budget is {BUDGETS[path]} and a tenth" for path, n in lines.items()
             if n > 1.1 * BUDGETS[path]]
    total = sum(lines.values())
    return found + [f"together they have {total} lines, above {TOGETHER}"] * (total > TOGETHER)


def lengths(files):
    """Functions that do not fit on a screen."""
    found = []
    for path, tree in trees(files):
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                n, most = node.end_lineno - node.lineno + 1, TRAIN if (path, node.name) == ("sft.py", "train") else LONGEST
                found += [f"{path}:{node.lineno} {node.name} has {n} lines, above {most}"] * (n > most)
    return found


def columns(files):
    """Lines that are too wide."""
    return [f"{path}:{i} has {len(line)} columns" for path, text in sorted(files.items())
            for i, line in enumerate(text.splitlines(), 1) if len(line) > COLUMNS]


# ---- what is not written ------------------------------------------------------------------------------------------


def conditionals(files):
    """Conditional expressions inside others, or as the condition of an if or a while."""
    found = []
    for path, tree in trees(files):
        for node in ast.walk(tree):
            if isinstance(node, ast.IfExp) and any(isinstance(n, ast.IfExp) for n in ast.walk(node) if n is not node):
                found.append(f"{path}:{node.lineno} a conditional expression inside another")
            if isinstance(node, (ast.If, ast.While)):
                parts = [node.test]
                for part in parts:
                    parts += {ast.BoolOp: lambda p: p.values, ast.UnaryOp: lambda p: [p.operand]}.get(
                        type(part), lambda p: [])(part)
                if any(isinstance(part, ast.IfExp) for part in parts):
                    found.append(f"{path}:{node.lineno} a conditional expression as a condition")
    return found


def patches(files):
    """Functions put into an attribute of an object, where a subclass or an argument would say what is called."""
    functions = {}  # module -> names of its functions
    for path, tree in trees(files):
        functions[module_of(path)] = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    found = []
    for path, tree in trees(files):
        classes = {id(f) for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body}
        named = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and id(n) not in classes}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                named |= {a.asname or a.name for a in node.names if a.name in functions.get(node.module, ())}
        for node in ast.walk(tree):
            pairs = []
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                    pairs += zip(target.elts, node.value.elts) if both else [(target, node.value)]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
                pairs = [(ast.Attribute(), node.args[2])]
            for target, value in pairs:
                is_function = isinstance(value, ast.Lambda) or isinstance(value, ast.Name) and value.id in named
                if isinstance(target, ast.Attribute) and is_function:
                    found.append(f"{path}:{node.lineno} a function is put into an attribute")
    return found


LONG = "def f():\n" + "    x = 1\n" * LONGEST
RULES = {  # rule -> [a breach, ...]
    budgets: [{"lora.py": "\n" * 144}, dict.fromkeys(("sft.py", "model.py", "data.py"), "\n" * 1000)],
    lengths: [{"ops/a.py": LONG}, {"sft.py": f"class A:\n{LONG.replace('def', ' def', 1)}"},
              {"sft.py": LONG.replace("f()", "train()") + "    x = 1\n" * 10}],
    columns: [{"train.sh": "#" * 111}],
    conditionals: [{"a.py": "x = 1 if a else 2 if b else 3"}, {"a.py": "x = f(1 if a else 2) if b else 3"},
                   {"a.py": "if a if b else c:\n    pass"}, {"a.py": "while not d or (a if b else c):\n    pass"}],
    patches: [{"a.py": "def f(m):\n    m.forward = lambda x: x"}, {"a.py": "def g():\n    pass\nm.forward = g"},
              {"a.py": "from ops.b import g as h\nself.product = h", "ops/b.py": "def g():\n    pass"},
              {"a.py": "def g():\n    pass\na, m.f = 1, g"}, {"a.py": "setattr(m, 'f', lambda x: x)"}],
}


@pytest.mark.repo
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_repository_keeps_its_rules(rule, code):
    breaches = rule(code)
    assert not breaches, "\n".join([rule.__doc__, *breaches])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_planted_breach_is_found(rule):
    for planted in RULES[rule]:
        assert rule(planted), planted


@pytest.mark.parametrize("rule, fine", [
    (lengths, {"ops/a.py": LONG[:-10], "sft.py": LONG.replace("f()", "train()") + "    x = 1\n" * 9}),
    (conditionals, {"a.py": "x = (1 if a else 2, 3 if b else 4)\nif x[0 if a else 1]:\n    pass"}),
    (patches, {"a.py": "class A:\n    def g(self):\n        self.g = g\n        self.x, y = 1, lambda: 0"})],
    ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_no_breach_is_left_alone(rule, fine):
    assert rule(fine) == []
