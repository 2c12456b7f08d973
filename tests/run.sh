#!/usr/bin/env bash
# The tests: sets up what they need (transformers and peft as oracles), then runs pytest with the arguments given.
# --full: every layout of the laws and what else takes long.
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$("$here/../train.sh" --setup requirements-dev.txt)
[ "${1:-}" != --full ] || set -- --full "$here" "${@:2}"
# two workers, each file in one of them: processes with one thread each leave a core idle otherwise
exec "$python" -m pytest -q -n 2 --dist loadfile --rootdir "$here" "${@:-$here}"
