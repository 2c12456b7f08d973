"""Print old figures of tools/gpu_check.py beside new ones: `python tools/bench.py --compare FILE` starts it.

FILE is a results.json of tools/gpu_check.py. The new figures are those of --directory OUT, or of a run of
gpu_check with the stages that are ok in FILE; its OUT is a new directory in TMPDIR, which is kept. Printed
are the two machines, each figure of stages that are ok in both, and ours / TRL's for each pair of stages.
"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass

from settings.errors import UserError, printable, run
from settings.parser import check, parse, setting
from tools import gpu_check
from tools.gpu_check import COMPARED, CPU_LIMIT, OK, SPEED, STAGES, flat

WIDTH = 110  # columns of the table, at most
SLACK = 10  # seconds per stage beside its limit, to start and to end it
# top-level keys that are no measurement: `first` is the time of day of TRL's first step
NO_FIGURES = {"stage", "seconds", "limit", "first", "cores"}


@dataclass
class Config:
    """Print figures of tools/gpu_check.py beside new ones: python tools/bench.py --compare FILE [flags]"""

    compare: str | None = setting(None, "a results.json of tools/gpu_check.py: the old figures",
                                  group="compare")
    directory: str | None = setting(None, "OUT of gpu_check with the new results; none: measure them now",
                                    needs="compare", unless="device")
    device: str | None = setting(None, "what the run is on; none: what FILE is of", ("cpu", "cuda"),
                                 needs="compare")

    def __post_init__(self):
        check(self)


# ------------------------------------------------------------------------------------------------------------
# old and new results


def read(path, origin):
    """{name: result} of a results.json, in the order of STAGES. Raises UserError for any other file.

    origin  the setting that names the file, for errors
    """
    rule = "it must be a results.json of tools/gpu_check.py, such as docs/gpu.json"
    try:
        with open(path, encoding="utf-8") as f:
            results = json.load(f)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{origin}: there is no file {path}; {rule}") from None
    except ValueError as error:
        raise UserError(f"{origin}: {path} is not JSON ({str(error):.80}); {rule}") from error
    fits = isinstance(results, list) and all(
        isinstance(result, dict) and all(isinstance(result.get(key), str) for key in ("name", "status"))
        for result in results)
    if not fits:
        raise UserError(f"{origin}: {path} is no list of results with a name and a status; {rule}")
    return {result["name"]: result for result in gpu_check.in_order(results)}


def is_of_gpu(results):
    """Whether results are of a GPU: only there stage 0 asks nvidia-smi and limits are not CPU_LIMIT."""
    return any("nvidia_smi" in result or result.get("limit", CPU_LIMIT) != CPU_LIMIT
               for result in results.values())


def gpu(results):
    """The name of the GPU; "" if it is not known, as without stage 0."""
    return str(results.get("hardware", {}).get("gpu") or "").partition("\n")[0]


def machine(results):
    """What results were measured on, as a text: GPU, driver, torch and cores."""
    hardware = results.get("hardware", {})
    driver = str(hardware.get("nvidia_smi") or "unknown").partition(",")[0]
    words = ["CPU, tiny shapes"]
    if is_of_gpu(results):
        words = [gpu(results) or "unknown GPU", f"driver {driver}"]
    words.append(f"torch {flat(hardware).get('versions.torch') or 'unknown'}")
    if "cores" in hardware:
        words.append(f"{hardware['cores']} CPU cores")
    return ", ".join(words)


def device_for(cfg, old):
    """The device of the new run. Raises UserError where it would not be comparable with the old results."""
    if not is_of_gpu(old):
        if cfg.device == "cuda":
            raise UserError(f"--device cuda: {cfg.compare} was measured on the CPU with tiny shapes, which "
                            "compare with nothing on a GPU; use --device cpu, or a FILE of a GPU")
        return "cpu"
    import torch  # a second, which --directory does not need
    if cfg.device == "cpu" or not torch.cuda.is_available():
        is_tiny = cfg.device == "cpu"
        reason = "--device cpu measures tiny shapes" if is_tiny else "torch finds no GPU here"
        raise UserError(f"--compare {cfg.compare} was measured on a GPU ({gpu(old) or 'unknown'}), and "
                        f"{reason}; use --device cuda on a machine with one, or --directory OUT for results "
                        "that exist")
    return "cuda"


def measure(cfg, old):
    """Run gpu_check with the stages that are ok in the old results; return its directory OUT."""
    device = device_for(cfg, old)
    stages = [stage for stage in STAGES if stage.name in old and old[stage.name]["status"] == OK]
    if not stages:
        raise UserError(f"--compare {cfg.compare}: none of the stages of tools/gpu_check.py is ok in it; use "
                        "another results.json")
    out = tempfile.mkdtemp(prefix="compare_")
    seconds = sum(gpu_check.limit_of(stage, device) + SLACK for stage in stages)
    print(f"measuring {len(stages)} stages, at most {seconds:g} s; the results are kept in {out}", flush=True)
    subprocess.run([sys.executable, gpu_check.__file__, out, str(seconds), "--device", device,
                    "--stages", ",".join(stage.name for stage in stages)])  # it prints which stages failed
    print()
    return out


# ------------------------------------------------------------------------------------------------------------
# the table


def figures(result):
    """{dotted key: number} of a result; checks are no figures."""
    return {key: value for key, value in flat(result).items() if key not in NO_FIGURES
            and isinstance(value, (int, float)) and not isinstance(value, bool)}


def rows_of(old, new):
    """Yield (stage, quantity, old, new) for each figure that both have, then for each ratio to TRL.

    old, new  {name: figures of a stage that is ok}
    """
    for name in [name for name in old if name in new]:
        for key, value in old[name].items():
            if key in new[name]:
                yield name, key, value, new[name][key]
    for ours, theirs, _ in COMPARED:
        speeds = [(stages.get(ours, {}).get(f"long.{SPEED}"), stages.get(theirs, {}).get(SPEED))
                  for stages in (old, new)]
        if all(map(all, speeds)):
            yield "ours / TRL", f"{ours} / {theirs}", *(a / b for a, b in speeds)


def not_compared(old, new):
    """Yield "name (old status, new status)" for stages that are not ok in both."""
    for name in {**old, **new}:
        status = [results.get(name, {}).get("status", "absent") for results in (old, new)]
        if status != [OK, OK]:
            yield f"{name} ({status[0]}, {status[1]})"


def table(old, new):
    """The lines to print for two {name: result}; [] if they have no figure in common."""
    fine = [{name: figures(result) for name, result in results.items() if result["status"] == OK}
            for results in (old, new)]
    rows = list(rows_of(*fine))
    if not rows:
        return []
    lines = [f"{label}: {machine(results)}"[:WIDTH] for label, results in (("old", old), ("new", new))]
    is_known = gpu(old) and gpu(new)
    if is_of_gpu(old) and (gpu(old) != gpu(new) or not is_known):
        differ = "The GPUs differ" if is_known else "One of the GPUs is not known"
        lines.append(f"{differ}: speeds of two GPUs cannot be compared, only ratios between stages of one "
                     "column.")
    first = max(len(name) for name, *_ in rows)
    second = min(max(len(key) for _, key, *_ in rows), WIDTH - first - 37)  # 37: three numbers and the gaps
    lines += ["", f"{'stage':{first}} {'quantity':{second}} {'old':>12} {'new':>12} {'new/old':>9}"]
    for name, key, before, after in rows:
        ratio = f"{after / before:.3f}" if before else "-"
        lines.append(f"{name:{first}} {key:{second}.{second}} {before:>12,.6g} {after:>12,.6g} {ratio:>9}")
    others = ", ".join(not_compared(old, new))
    if others:
        lines += ["", *textwrap.wrap(f"Not compared, with their status in old and new: {others}", WIDTH)]
    return lines


def main():
    cfg, _ = parse(Config, sys.argv[1:])
    if not cfg.compare:
        raise UserError("--compare FILE is missing; use python tools/bench.py --compare docs/gpu.json")
    old = read(cfg.compare, f"--compare {cfg.compare}")
    out = cfg.directory or measure(cfg, old)
    new = read(os.path.join(out, "results.json"), f"--directory {out}")
    if is_of_gpu(old) != is_of_gpu(new):
        raise UserError(f"--directory {out}: one of it and {cfg.compare} was measured on a GPU, the other on "
                        "the CPU with tiny shapes; use an OUT of the same kind")
    lines = table(old, new)
    if not lines:
        raise UserError(f"--directory {out}: it has no figure in common with {cfg.compare}; ok in FILE are "
                        f"{', '.join(name for name in old if old[name]['status'] == OK) or 'no stages'}")
    print(printable("\n".join(lines)))  # FILE may hold anything


if __name__ == "__main__":
    run(main)
