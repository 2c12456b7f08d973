#!/usr/bin/env bash
# Start sft.py from any folder, with a Python that has the packages. Creates .venv on first use.
#   ./train.sh --model tiny     ./train.sh --help     MODEL_PATH=DIR LEARNING_RATE=1e-5 ./train.sh --epochs 1
#   ./train.sh --setup FILE     only install the packages of FILE, if missing, and print the Python to use
# sft.py then reads these environment variables (see --help): MODEL_PATH TOKENIZER_PATH TRAIN_DATA VAL_DATA
# MAX_LENGTH BATCH_SIZE MICRO_BATCH_SIZE PACKING NUM_EPOCHS MAX_STEPS SEED LEARNING_RATE SCHEDULER
# WARMUP_RATIO WEIGHT_DECAY GRAD_CLIP USE_LORA LORA_RANK LORA_ALPHA STRATEGY TP SP PARAM_OFFLOAD
# OPTIMIZER_OFFLOAD GRADIENT_CHECKPOINTING DTYPE COMPILE OUTPUT_DIR RESUME_FROM SAVE_STEPS KEEP_CHECKPOINTS
# EVAL_STEPS LOGGER WANDB_PROJECT CONFIG
# ranks/launch.py reads these, for several processes: N_GPUS NNODES NODE_RANK MASTER_ADDR MASTER_PORT
# and, where they are not set, those of Slurm, Kubernetes, SageMaker and SkyPilot: docs/cluster.md
set -eu
here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")") # through links; without cd, which obeys CDPATH

# Python gets a file or -I, never - or -m alone: those import modules from the current directory, which may
# be anyone's. Python 3.10 has no -P. Stderr is discarded: after a signal, bash prints source.
has_packages() {
    "$1" "$here/ranks/packages.py" "$2"
} >/dev/null 2>&1

setup() { # requirements file -> $python
    python=$here/.venv/bin/python
    for candidate in "${PYTHON:-}" "$python" python python3; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null && has_packages "$candidate" "$1"; then
            python=$candidate
            return
        fi
    done
    echo "train.sh: installing $(basename "$1") into $here/.venv (first run only)" >&2
    [ -x "$python" ] || "${PYTHON:-python3}" -I -m venv "$here/.venv"
    # only what is missing or too old: with all of FILE, pip would replace a torch newer than its range
    missing=$("$python" -I "$here/ranks/packages.py" "$1") || [ $? = 1 ]
    "$python" -I -m pip install --quiet --disable-pip-version-check -r /dev/stdin <<<"$missing" >&2
}

if [ "${1:-}" = --setup ]; then
    if [ ! -f "$here/${2:-}" ]; then
        echo "train.sh: error: --setup needs a requirements file, such as requirements.txt" >&2
        exit 2
    fi
    setup "$here/$2"
    echo "$python"
    exit
fi
setup "$here/requirements.txt"
exec "$python" "$here/ranks/launch.py" "$@"
