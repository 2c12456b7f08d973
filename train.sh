#!/usr/bin/env bash
# Sets up on first use and starts sft.py with its presets, the environment and the flags given. Works from any folder.
#   ./train.sh --model tiny        ./train.sh --help        MODEL_PATH=DIR LEARNING_RATE=1e-5 ./train.sh --epochs 1
#   ./train.sh --setup FILE        only makes sure that FILE's packages are there; prints the Python that has them
# The environment that sft.py reads then, --help says for what: MODEL_PATH TOKENIZER_PATH TRAIN_DATA VAL_DATA MAX_LENGTH
# BATCH_SIZE MICRO_BATCH_SIZE PACKING NUM_EPOCHS MAX_STEPS SEED LEARNING_RATE SCHEDULER WARMUP_RATIO WEIGHT_DECAY
# GRAD_CLIP USE_LORA LORA_RANK LORA_ALPHA STRATEGY TP PARAM_OFFLOAD OPTIMIZER_OFFLOAD GRADIENT_CHECKPOINTING DTYPE
# COMPILE OUTPUT_DIR RESUME_FROM SAVE_STEPS KEEP_CHECKPOINTS EVAL_STEPS LOGGER WANDB_PROJECT CONFIG
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Does this Python have what a requirements file asks for? A newer version than tested passes, with a line that says so.
has_packages() {
    "$1" - "$2" 2>/dev/null <<'PY'
import os, re, sys
from importlib.metadata import version
def check(path):
    for line in open(path):
        if line.startswith("-r "):
            check(os.path.join(os.path.dirname(path), line[3:].strip()))
        elif match := re.match(r"([\w-]+)>=([\d.]+)(?:,<([\d.]+))?", line):
            have, low, high = (tuple(map(int, re.findall(r"\d+", v)[:2])) if v else None
                               for v in (version(match[1]), match[2], match[3]))
            if have < low:
                sys.exit(1)
            if high and have >= high:
                note = f"train.sh: {match[1]} {version(match[1])} is newer than what is tested ({match[0]})\n"
                os.write(3, note.encode())
sys.version_info >= (3, 10) or sys.exit(1)
check(sys.argv[1])
PY
} 3>&2

setup() { # requirements file -> $python
    python=$here/.venv/bin/python
    for candidate in "${PYTHON:-}" "$python" python python3; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null && has_packages "$candidate" "$1"; then
            python=$candidate
            return
        fi
    done
    echo "train.sh: installing $(basename "$1") into $here/.venv, once" >&2
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv "$here/.venv"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$1" >&2
}

if [ "${1:-}" = --setup ]; then
    setup "$here/$2"
    echo "$python"
    exit
fi
setup "$here/requirements.txt"

# From another folder the example data is the project's. Only defaults are weaker than words before --environment.
preset=()
[ -e data/example_sft.json ] || preset=(--train_data "$here/data/example_sft.json")

# Processes: --n_gpus (or N_GPUS) on this node; NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT for several nodes.
n_gpus=${N_GPUS:-1} flags=()
while [ $# -gt 0 ]; do
    case "$1" in
        --n_gpus) n_gpus=${2:?--n_gpus needs a number}; shift ;;
        --n_gpus=*) n_gpus=${1#*=} ;;
        *) flags+=("$1") ;;
    esac
    shift
done
case "$n_gpus" in *[!0-9]* | 0 | "") echo "train.sh: error: --n_gpus $n_gpus: it must be a number, at least 1" >&2; exit 2 ;; esac
run=("$here/sft.py" ${preset[@]+"${preset[@]}"} --environment ${flags[@]+"${flags[@]}"})
[ "$n_gpus" -gt 1 ] || [ "${NNODES:-1}" -gt 1 ] || exec "$python" "${run[@]}"
[ -n "${OMP_NUM_THREADS:-}" ] || export OMP_NUM_THREADS=1 # without a GPU each process would take all cores

# torchrun would give a step and its checkpoint 30 s after a signal and end with 1 and a traceback. So it is deaf to
# Ctrl-C, SIGTERM and Slurm's SIGUSR1, and its children get SIGUSR1 for each, every second, as they are deaf while Python
# starts. Our exit code is 130, 143 or 0, as sft.py's is alone.
(
    trap '' INT TERM USR1
    exec "$python" -m torch.distributed.run --nproc_per_node "$n_gpus" --nnodes "${NNODES:-1}" \
        --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" \
        --signals_to_handle SIGHUP,SIGQUIT "${run[@]}"
) &
torchrun=$!
children() { pgrep -P "$torchrun" || cat "/proc/$torchrun/task/$torchrun/children"; }
stop() {
    [ "$1 ${code:-}" != "130 130" ] || kill -KILL "$torchrun" $(children) # Ctrl-C again
    code=${code:-$1}
    while kill -0 "$torchrun"; do kill -USR1 $(children); sleep 1; done 2>/dev/null &
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 0' USR1
while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun" && result=0 || result=$?; done
[ "$result" = 0 ] || [ "${code:-}" = 130 ] || exit "$result"
exit "${code:-$result}"
