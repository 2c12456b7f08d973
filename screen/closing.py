"""What a run prints when it ends: its result, what it took, and the commands that come next.

The commands work in a shell in the current directory: the paths are quoted, the programs named with theirs.
"""

import os
import shlex

from disk import space
from screen import report
from settings import venv


def result_lines(directory):
    """Lines about the run in a directory, with its steps before a resume: losses, speed, memory, disk."""
    run, lines = report.Run(directory), []
    first, last = run.values_at(0), run.values_at(-1)
    if first.get("loss") is not None and last.get("loss") is not None:
        lines.append(f"loss     {first['loss']:.4f} in step {first['step']:,}, {last['loss']:.4f} in step "
                     f"{last['step']:,}")
    judged = run.judged_set()
    step, best = run.lowest(judged)
    if best is not None:
        of_set = f" of {judged}" if judged else ""
        link = os.path.join(directory, "checkpoints", "best")
        is_saved = os.path.basename(os.path.realpath(link)) == f"step_{step}"
        where = f": {link}" if is_saved else ""
        lines.append(f"val_loss {best:.4f}{of_set} after step {step:,} is the lowest{where}")
    forgetting = [(name, run.forgetting(name)) for name in run.last_sets()]
    texts = [f"{value:+.4f}" + f" of {name}" * bool(name) for name, value in forgetting if value is not None]
    if texts:
        lines.append(f"forgot   {', '.join(texts)}: the last val_loss minus the one before training; above 0 "
                     "it is worse")
    speed, memory = run.median("tokens_per_second"), run.peak_memory()
    took = [f"{report.duration(last.get('seconds') or 0)} of training"]
    took += [f"{speed:,.0f} tokens/s"] if speed is not None else []
    took += [f"{memory:.2f} GiB of memory at most"] if memory is not None else []
    return [*lines, f"took     {', '.join([*took, space.text(space.used(directory)) + ' on the disk'])}"]


def command_lines(cfg, latest, *, is_complete, world_size, stops_early=False, times=2):
    """Lines with commands: to look at the report, try the result, train on, and publish it.

    cfg          the settings as the run was started
    latest       the path of the last checkpoint
    is_complete  no step is left: training on needs more of them
    stops_early  --early_stopping ended the run, and would end it again
    times        how much longer a complete run becomes
    """
    directory, latest = shlex.quote(cfg.output_dir), shlex.quote(latest)
    n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    start = venv.command("sft.py")
    if world_size > 1:
        start = f"bash {venv.quoted('train.sh')} --n_gpus {n_gpus}"
    if world_size > n_gpus:  # train.sh reads the other variables, which each node has in its environment
        start = f"NNODES={world_size // n_gpus} {start}"
    more = ""
    if is_complete:
        more = f" --epochs {times * cfg.epochs:g}"
        if cfg.max_steps:
            more = f" --max_steps {times * cfg.max_steps}"
    more += " --early_stopping none" * stops_early
    return [f"report   {os.path.join(cfg.output_dir, 'report.html')}",
            f"try it   {venv.command('chat.py')} {latest}",
            f"resume   {start} --output_dir {directory} --resume_from auto{more}",
            f"push     {venv.command('tools/push.py')} {latest} ORG/NAME"]
