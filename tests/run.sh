#!/usr/bin/env bash
# The tests: sets up what they need (transformers and peft as oracles), then runs pytest with the arguments.
#   tests/run.sh      tests/run.sh -k signal      tests/run.sh tests/unit/test_model.py
# --full also runs every layout of the laws and all slow tests.
# --repo also runs the tests of this repository's own prose, sizes and diffs, which a fork need not pass.
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$("$here/../train.sh" --setup requirements-dev.txt)
# without a path among the arguments: all tests. The value of an option is not a path, as in -k unit
path=none last=
for word in "$@"; do
    case $last in -[kmnopWc]) ;; *) [ ! -e "${word%%::*}" ] || path=given ;; esac
    last=$word
done
[ "$path" = given ] || set -- "$here" "$@"
# two workers, each file in one of them: processes with one thread each leave a core idle otherwise
# the directories of tests that passed are removed: they are 7 GB
exec "$python" -m pytest -q -n 2 --dist loadfile --rootdir "$here" -o tmp_path_retention_policy=failed "$@"
