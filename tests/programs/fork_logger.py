"""docs/fork.md, a logger of your own: every number reaches it, a resumed run continues under its id, and one
that fails does not end the run. Starts in a copy that has the change. A module stands in for MLflow."""

import importlib.machinery
import json
import os
import sys
import types

from helpers import TINY, metrics, sft_main


class MlflowClient:
    """What the logger uses of mlflow.MlflowClient; the server is a list in this process."""

    experiments, calls = {}, []

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name):
        self.experiments[name] = types.SimpleNamespace(experiment_id=name)
        return name

    def create_run(self, experiment_id, run_name=None):
        self.calls.append(("create_run", experiment_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"id{len(self.calls)}"))

    def log_metric(self, run_id, key, value, step=None):
        if key == os.environ.get("FAILS"):
            raise ConnectionError("no server")
        self.calls.append(("log_metric", run_id, key, value, step))

    def set_terminated(self, run_id):
        self.calls.append(("set_terminated", run_id))


module = types.ModuleType("mlflow")
module.MlflowClient, module.__spec__ = MlflowClient, importlib.machinery.ModuleSpec("mlflow", None)
sys.modules["mlflow"] = module
FLAGS = ("--model", TINY, "--cache_dir", "none", "--lr", "1e-3", "--no-gradient_checkpointing",
         "--logger", "console,mlflow")

NAMED = (*FLAGS, "--project", "p", "--run_name", "r", "--output_dir", "out")
sft_main(*NAMED, "--max_steps", 2)
sft_main(*NAMED, "--max_steps", 4, "--resume_from", "auto")
created, *others = MlflowClient.calls
assert created == ("create_run", "p", "r") and others.count(("set_terminated", "id1")) == 2
logged = {(call[2], call[4]): call[3] for call in others if call[0] == "log_metric"}
expected = {(f"train/{name}", line["step"]): value for line in metrics("out") for name, value in line.items()
            if name != "step"}
assert logged == expected and len(expected) > 30, (logged, expected)

os.environ["FAILS"] = "train/loss"
sft_main(*FLAGS, "--max_steps", 2, "--output_dir", "fails")
assert len(metrics("fails")) == 2
with open("fails/mlflow_id", encoding="utf-8") as f:
    assert json.load(f)["run_id"] != "id1"
