"""Loss, perplexity and token accuracy of a model: python tools/evaluate.py MODEL FILE [FILE ...] [flags]

    python tools/evaluate.py outputs/checkpoints/latest my.json
    torchrun --nproc_per_node 2 tools/evaluate.py outputs/checkpoints/best math=a.json general=b.json --json

Each FILE is a set, with a line of its own: what --val_data of sft.py takes, also NAME=FILE. MODEL is a model
directory, a step directory, an adapter, a hub id or `tiny`. A step directory has the settings of its run,
with which the conversations are read, and the fp32 weights, if those in its files are rounded: the numbers
are those of the run's validation. Nothing is written.
"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import dataclasses
import json
import math
import os
import sys

import data
import sft
from disk import checkpoint, resume
from disk.run import ModelPaths
from ranks import gate, processes
from screen import validation
from settings import errors, parser
from settings.parser import check, parse, setting
from text.sources import set_names
from text.template import ChatTokenizer

USAGE = "python tools/evaluate.py MODEL FILE [FILE ...] [flags]"
OF_RUN = {*resume.DATA, "quantize", "dtype"} - {"train_data", "val_split", "tokenizer", "chat_template"}
SHARED = [*OF_RUN, "tokenizer", "chat_template", "cache_dir", "packing", "strategy", "tp", "sp",
          "replicas", "timeout", "param_offload"]  # settings of sft.py that this program has too


@dataclasses.dataclass
class Own:
    """The settings that only this program has."""

    model: str = setting("./outputs/checkpoints/latest", "model or adapter directory, hub id, or tiny",
                         group="evaluate")
    data: str = setting("./data/example_sft.json", "sets of conversations, as --val_data of sft.py")
    base: str | None = setting(None, "base model of an adapter; none: as adapter_config.json names it")
    json: bool = setting(False, "print the result as one line of JSON, and nothing else")
    micro_batch_size: int = setting(1, "a micro-batch holds at most micro_batch_size × max_length tokens",
                                    low=1)

    def __post_init__(self):
        if self.tp > 1:
            self.strategy = "megatron"
        check(self)
        processes.check_strategy(self.strategy, self.tp, self.sp, self.replicas)


def config_class():
    """The dataclass of all settings: those of Own, and the SHARED ones of sft.py."""
    changes = {"cache_dir": {"help": "directory that caches tokenised data; none: no cache"},
               "quantize": {"needs": "", "unless": "tp"}}
    fields = []
    for field in dataclasses.fields(sft.Config):
        if field.name in SHARED:
            metadata = {**field.metadata, "env": None, "presets": (), **changes.get(field.name, {})}
            metadata["group"] = None if fields else "as in sft.py"
            default = None if field.name == "cache_dir" else field.default  # it would write
            fields.append((field.name, field.type, dataclasses.field(default=default, metadata=metadata)))
    cls = dataclasses.make_dataclass("Config", fields, bases=(Own,))
    cls.__doc__ = f"Evaluate a model: {USAGE}"
    return cls


Config = config_class()


def settings_of_run(given, fields):
    """The Assignments of the run that saved the step directory --model, for settings.parser.parse."""
    path = os.path.join(given.get("model", fields["model"].default), resume.SETTINGS)
    if not os.path.isfile(path):
        return []
    all_fields = {field.name: field for field in dataclasses.fields(sft.Config)}
    return [assignment._replace(source="run") for assignment in parser.read_yaml(path, all_fields)
            if assignment.name in OF_RUN]


def arguments_of(argv):
    """The arguments with MODEL and each FILE as flags: NAME=FILE would be read as name=value."""
    n = next((i for i, argument in enumerate(argv) if argument.startswith("-")), len(argv))
    if n == 0 or n == 1 and "=" in argv[0]:  # only flags, or name=value
        return argv
    if n == 1:
        raise errors.UserError(f"{argv[0]}: no FILE follows; write {USAGE}")
    return [f"--model={argv[0]}", f"--data={json.dumps(argv[1:n])}", *argv[n:]]


def specs_of(spec):
    """[(label, spec)] of the sets in --data: those with names together, and each other one alone."""
    try:
        specs = list(map(str, json.loads(spec)))  # of arguments_of
    except ValueError:
        specs = [spec]
    named = [part for part in specs if set_names(part)]
    return [(None, ",".join(named))] * bool(named) + [(part, part) for part in specs if part not in named]


def evaluate(cfg, ranks, paths):
    """Measure each set of cfg.data; return ({name: conversations}, {name: validation.Result}, ledger lines).

    cfg    sft.Config, with the sets in val_data
    paths  ModelPaths
    """
    ranks.set_phase("tokenise")
    state = checkpoint.state_of(paths.adapter or paths.model)
    tokenizer = ChatTokenizer(paths.tokenizer, paths.config.vocab_size, cfg.chat_template,
                              cfg.template_kwargs or state.get("template_kwargs"), state.get("date"))
    options = dict(data.options_of(cfg), split="validation", progress=ranks.show_progress)
    loaded = [(label, spec, data.load(spec, tokenizer, **options)) for label, spec in specs_of(cfg.val_data)]
    ranks.wait_for_slower()
    ranks.agree("inputs", {"data": ":" + " ".join(dataset.digest for *_, dataset in loaded)})
    ranks.set_phase("load")
    model, _ = sft.build(cfg, paths, ranks, trains=False)
    has_masters = checkpoint.load_masters(paths.adapter or paths.model, model)
    ranks.set_phase("evaluation")
    sizes, results = {}, {}
    lines = ["weights  the fp32 ones of training_state/"] if has_masters else []
    for label, spec, dataset in loaded:
        sets = validation.sets_of(dataset, spec)
        found = validation.measure(sft.evaluate, model, dataset, sets, cfg, ranks)
        for name, result in found.items():
            sizes[name or label], results[name or label] = len(sets[name].ids), result
        lines += dataset.ledger.lines(dataset.files)
    return sizes, results, lines


def values_of(size, result):
    """What is printed about a set, as a dict."""
    perplexity = math.exp(result.loss) if result.loss < 700 else math.inf
    return dict(loss=result.loss, perplexity=perplexity, accuracy=result.accuracy, tokens=result.tokens,
                conversations=size)


def table(rows):
    """The lines of [(name, values_of())]."""
    width = max(len(name) for name, _ in [("set", None), *rows])
    yield (f"{'set':{width}} {'loss':>10} {'perplexity':>12} {'accuracy':>10} {'targets':>12} "
           f"{'conversations':>14}")
    for name, row in rows:
        yield (f"{name:{width}} {row['loss']:10.4f} {row['perplexity']:12.4f} {100 * row['accuracy']:8.2f} % "
               f"{row['tokens']:12,} {row['conversations']:14,}")


def main():
    own, _ = parse(Config, arguments_of(sys.argv[1:]), resumed=settings_of_run)
    paths = ModelPaths.of_model(own.model, own.base, own.tokenizer)
    shared = {name: getattr(own, name) for name in (*SHARED, "micro_batch_size")}
    cfg = sft.Config(**{**shared, "model": own.model, "val_data": own.data, "use_lora": bool(paths.adapter),
                        "gradient_checkpointing": False, "compile": False})
    with processes.start(cfg.tp, cfg.timeout, same=gate.program(cfg), sp=cfg.sp,
                         replicas=cfg.replicas) as ranks:
        sizes, results, lines = evaluate(cfg, ranks, paths)
    if ranks.rank:
        return
    rows = {name: values_of(sizes[name], result) for name, result in results.items()}
    if len(rows) > 1:
        whole = values_of(sum(sizes.values()), validation.together(results))
    else:
        whole = next(iter(rows.values()))
    if own.json:
        print(json.dumps({"model": own.model, **whole, "sets": rows}))
        return
    print(f"model    {own.model} ({paths.config.model_type}), {cfg.dtype_on(ranks.device)} on "
          f"{ranks.world_size} × {ranks.device.type}", *lines, sep="\n")
    print(*table([*rows.items(), *[("together", whole)] * (len(rows) > 1)]), sep="\n")


if __name__ == "__main__":
    errors.run(main)
