"""RunState: the directory of a run, what it continues from, and what it remembers from step to step.

What is restored on resume, and what a checkpoint stores for the next one. disk/checkpoint.py chooses the
checkpoint and verifies it; disk/resume.py compares its settings with those of this run.
"""

import collections
import dataclasses
import datetime
import math
import os
import statistics
import sys
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from disk import checkpoint, files, foreign, layout, lock, peft, pretrained, resume, shards, space
from families.config import ModelConfig
from ops import forecast, optim
from ops.forecast import AUTO, GB
from ranks import gate, processes
from settings.errors import UserError
from text.template import ChatTokenizer


# Settings for which `auto` chooses: a resumed run with the same ones takes what it chose before. Beside them
# the number of ranks.
PLACE = ("tp", "sp", "replicas", "max_length")


@dataclass
class ModelPaths:
    """The directories of a model, its adapter (if any) and its tokenizer; the content of config.json.

    is_tied  pretrained.tied_in_files: whether the head is the embedding, where config.json is wrong
    """

    model: str
    adapter: str | None
    tokenizer: str
    config_json: dict
    is_tied: bool | None = None

    @classmethod
    def find(cls, model, adapter=None, tokenizer=None):
        """The ModelPaths of these directories.

        `tokenizer` is by default the adapter's directory if it has a tokenizer, otherwise the model's.
        """
        if tokenizer is None:
            has_tokenizer = adapter and os.path.exists(os.path.join(adapter, "tokenizer.json"))
            tokenizer = adapter if has_tokenizer else model
        foreign.check_model(model)
        foreign.check_tokenizer(tokenizer)
        config_json = files.read_json(os.path.join(model, "config.json"))
        if adapter and isinstance(config_json, dict):  # it may have been trained with --resize_embeddings
            for name, entry in pretrained.weight_entries(adapter).items():
                if name in pretrained.EMBEDDINGS and entry.shape:
                    rows = max(entry.shape[0], ModelConfig.from_dict(config_json).vocab_size)
                    config_json = layout.with_values(config_json, vocab_size=rows)
        return cls(model, adapter, tokenizer, config_json, pretrained.tied_in_files(model))

    @classmethod
    def of_model(cls, name, base=None, tokenizer=None):
        """The ModelPaths of a model: a directory, a step directory, a hub id or "tiny"; or of an adapter.

        base  of an adapter; None: as adapter_config.json names it

        Raises UserError if `base` is given for a full model, or if an adapter has no base model.
        """
        directory = files.follow(pretrained.model_directory(name))  # a run may move `latest` meanwhile
        if base and not pretrained.is_adapter(directory):
            raise UserError(f"--base {base} has no effect: {name} is a full model, not an adapter; remove "
                            "--base")
        if tokenizer:
            tokenizer = pretrained.model_directory(tokenizer, "--tokenizer", pretrained.MODEL_FILES)
        if pretrained.is_adapter(directory):
            return cls.find(peft.base_directory(directory, base), directory, tokenizer)
        return cls.find(directory, tokenizer=tokenizer)

    @property
    def is_multimodal(self):
        """Whether the model is the text model of a multimodal one."""
        return layout.is_multimodal(self.config_json)

    @property
    def config(self):
        config = ModelConfig.from_dict(self.config_json)
        if self.is_tied is None:
            return config
        return dataclasses.replace(config, tie_word_embeddings=self.is_tied)

    def resized(self, cfg):
        """--resize_embeddings: these paths, with a vocab_size for all ids of the tokenizer.

        pretrained.read_weight fills the new rows, and checkpoints have the new vocab_size in config.json.
        With --tp the size is a multiple of it, so that the rows can be split.

        Raises UserError where it has no effect, and with LoRA where the new rows would not be saved.
        """
        size, rows = tokenizer_size(self.tokenizer), self.config.vocab_size
        if size <= rows:
            raise UserError(f"--resize_embeddings has no effect: the tokenizer of {self.tokenizer} has "
                            f"{size} ids, the model's embedding has {rows} rows; remove it")
        lacks = {"embed_tokens", "lm_head"}
        lacks -= {name.strip() for name in (cfg.lora_modules_to_save or "").split(",")}
        is_saved = not lacks or (self.config.tie_word_embeddings and len(lacks) == 1)  # tied: one tensor
        if cfg.use_lora and not is_saved:
            raise UserError("--resize_embeddings with --use_lora: the new rows would be neither trained nor "
                            "saved; add --lora_modules_to_save embed_tokens,lm_head")
        size = -(-size // cfg.tp) * cfg.tp
        return dataclasses.replace(self, config_json=layout.with_values(self.config_json, vocab_size=size))


def tokenizer_size(directory):
    """The number of ids of a tokenizer: the highest id + 1."""
    path = os.path.join(directory, "tokenizer.json")
    files.read_json(path)  # raises for what is not JSON; the package's own errors do not name the file
    ids = Tokenizer.from_str(files.read_file(path).decode()).get_vocab(with_added_tokens=True).values()
    return max(ids, default=-1) + 1


class RunState:
    """The state of a run outside model and optimizer.

    step             the last optimizer step that was taken
    best             {"val_loss", "step", "behind"}: the lowest val_loss so far, its step, and the number of
                     validations after it
    best_saved       {"val_loss", "step"}: of the saved steps, the one with the lowest val_loss. Pruning keeps
                     it, and the link `best` names it. Without --keep_best, `best` may not be saved
    norms            the last 64 gradient norms, before clipping; the loop appends to them
    owes_evaluation  a signal interrupted the evaluation after `step`; resume repeats it before the next step
    baseline         {digest of a validation set: its loss before the first step}
    judged           digest of the validation set whose val_loss counts for `best`
    lowest           {digest of a validation set: {"val_loss", "step"} of its lowest loss}
    date             of the first start, an ISO text: a chat template may print it
    paths            ModelPaths: where the weights come from. A checkpoint is a model directory too
    chosen           what `auto` means in this run, {"micro_batch_size": conversations,
                     "checkpointed_blocks": number, "gradient_reduction": "step" or "micro_batch"}, and the
                     "world_size" and PLACE that it was chosen for
    lr               the learning rate of `step`
    lines            what the banner says about settings and resume
    has_saved        whether this process has saved a checkpoint

    state.json of a checkpoint stores them as "step", "best", "best_saved", "norms", "chosen", "date", "lr",
    "baseline", "judged", "lowest" and, for owes_evaluation, "is_cut". It also has "template_kwargs",
    "total_steps", "val_split", the number of "ranks", the fingerprint of the "model" that the run started
    from ("base" with LoRA), and the digests of the training "data" and of "val_data".
    """

    def __init__(self, cfg, ranks, origins):
        """Start a new run, or open and verify the checkpoint that --resume_from names.

        origins  of the settings, from settings.parser.parse

        Raises UserError where the output directory already contains a run, or the checkpoint is incomplete or
        of the other kind (full or LoRA) than cfg asks for. A failed resume never trains.
        """
        self.cfg, self.is_writer, self.has_saved = cfg, ranks.rank == 0, False
        if cfg.gradient_reduction != AUTO and ranks.world_size == 1 and not cfg.param_offload:
            raise UserError(f"--gradient_reduction {cfg.gradient_reduction} has no effect: one process has "
                            "no others to sum gradients with; remove it, or use --gradient_reduction auto")
        ranks.warn_of_idle(cfg.batch_size if cfg.batch_tokens is None else ranks.dp_size)
        self.root = os.path.join(cfg.output_dir, "checkpoints")
        os.makedirs(self.root, exist_ok=True)
        self.resumed, skipped, self.saved, self.settings = None, [], {"step": 0}, {}
        if cfg.resume_from:
            names = map(os.path.basename, checkpoint.candidates(cfg.resume_from, self.root))
            ranks.agree("resume", {"checkpoints to resume": ", ".join(names) or "none"})
            self.resumed, skipped = checkpoint.open_newest(cfg.resume_from, self.root)
        if not cfg.selfcheck:  # which writes nothing
            self.check_output()
        if self.resumed:
            self.saved = checkpoint.load_state(self.resumed)
            self.settings = resume.saved_settings(self.resumed, cfg)
        self.step, self.lr = self.saved["step"], self.saved.get("lr")
        self.lines = [*resume.lines(self.resumed, self.settings, cfg, origins), *skipped]
        self.world_size, before = ranks.world_size, self.saved.get("ranks", ranks.world_size)
        if before != ranks.world_size:
            self.lines.append(f"changed: ranks {before!r:.60} -> {ranks.world_size} (steps hold the same)")
        self.best = self.saved.get("best") or {"val_loss": None, "step": 0, "behind": 0}
        self.best_saved = self.find_best_saved()
        self.last_judged = None  # (step, val_loss) of the last validation
        self.norms = collections.deque(self.saved.get("norms", ()), maxlen=64)
        self.owes_evaluation = bool(self.saved.get("is_cut"))
        self.baseline, self.judged = self.saved.get("baseline") or {}, None
        self.lowest = self.saved.get("lowest") or {}
        self.chosen = {}
        today = ranks.broadcast(datetime.date.today().toordinal())  # another node may be in another day
        self.date = self.saved.get("date") or datetime.date.fromordinal(today).isoformat()
        self.paths = self.find_paths()
        self.pending = None  # the checkpoint.Save that is written in the background

    def check_output(self):
        """Raise UserError if this run would overwrite another one, or a file that no run wrote."""
        if self.resumed and os.path.dirname(self.resumed) == os.path.realpath(self.root):
            return
        has_run = checkpoint.steps_in(self.root) or os.path.lexists(os.path.join(self.root, "latest"))
        if has_run:  # one that never saved is overwritten
            if self.resumed:
                raise UserError(f"--resume_from {self.cfg.resume_from} belongs to another run than the one "
                                f"in --output_dir {self.cfg.output_dir}; use another --output_dir")
            raise UserError(f"{self.cfg.output_dir} already contains a run; use --resume_from auto to "
                            "continue it, or another --output_dir for a new run")
        lock.check_is_free(self.cfg.output_dir)

    def find_best_saved(self):
        """`best_saved` of the resumed run, if that checkpoint is there; an older version did not save it."""
        return self.if_there(self.saved.get("best_saved") or {
            name: self.best[name] for name in ("val_loss", "step")})

    def if_there(self, saved):
        """{"val_loss", "step"} if that step's checkpoint is there, otherwise those of no step."""
        is_there = os.path.isdir(os.path.join(self.root, f"step_{saved['step']}"))
        return saved if is_there else {"val_loss": None, "step": 0}

    def compared(self, train_set):
        """What must be the same on all ranks, for Ranks.agree. Every rank calls it."""
        values = {"training data": f":{train_set.digest} {train_set.weights}",
                  "validation data": f":{self.identity['val_data']}",
                  "config.json": gate.digest(repr(self.paths.config).encode()),
                  "model": f":{self.identity.get('base') or self.identity.get('model')}"}
        if self.paths.adapter and not self.resumed:
            values["adapter"] = ":" + pretrained.fingerprint(self.paths.adapter, shares=True)
        return values

    def find_paths(self):
        """The ModelPaths of this run. Raises UserError for an adapter without --use_lora, and the reverse."""
        cfg = self.cfg
        adapter = (self.resumed or cfg.resume_adapter) if cfg.use_lora else None
        if self.resumed and pretrained.is_adapter(self.resumed) != cfg.use_lora:
            if cfg.use_lora:
                raise UserError(f"{self.resumed} is a full model, not a LoRA adapter; drop --use_lora")
            raise UserError(f"{self.resumed} is a LoRA adapter, not a full model; add --use_lora")
        if adapter and not self.resumed:  # on resume, identify() compares the base model's fingerprint
            peft.check_base(adapter, cfg.model)
        is_full_checkpoint = self.resumed and not adapter
        model = self.resumed if is_full_checkpoint else pretrained.model_directory(cfg.model)
        tokenizer = None
        if cfg.tokenizer:
            tokenizer = pretrained.model_directory(cfg.tokenizer, "--tokenizer", pretrained.MODEL_FILES)
        paths = ModelPaths.find(model, adapter, tokenizer)
        # a checkpoint of a run with --resize_embeddings has its rows already
        return paths if self.resumed or not cfg.resize_embeddings else paths.resized(cfg)

    @property
    def chat_template(self):
        """--chat_template; None if it names a template of the first model: a checkpoint has only that."""
        name, cfg = self.cfg.chat_template, self.cfg
        is_name = name and not os.path.isfile(name) and not cfg.tokenizer
        return None if self.resumed and is_name and name == self.settings.get("chat_template") else name

    def tokenizer(self):
        """The ChatTokenizer of this run: with its chat template, and the date of its first start."""
        return ChatTokenizer(self.paths.tokenizer, self.paths.config.vocab_size, self.chat_template,
                             self.cfg.template_kwargs, self.date)

    def choose_memory(self, build, ranks):
        """The settings with a choice in place of `auto`: conversations of a micro-batch, checkpointed blocks,
        when gradients are reduced.

        build  sft.build. It creates the model on meta, which takes some milliseconds

        A resumed run takes what it chose before if the layout of ranks and max_length are the same and it
        still fits: then the same numbers come out.
        Sets ranks.planned, the PlannedRun: an out-of-memory error says with it which settings would help.
        Raises UserError if nothing fits.
        """
        ranks.set_phase("load")
        cfg, meta = self.cfg, processes.single_process(torch.device("meta"))
        model, _ = build(
            dataclasses.replace(cfg, dtype=cfg.dtype_on(ranks.device), compile=False), self.paths, meta)
        run = forecast.PlannedRun.of(
            model, cfg, world_size=ranks.world_size, cuda=ranks.device.type == "cuda")
        settings = {"micro_batch_size": cfg.micro_batch_size,
                    "checkpointed_blocks": cfg.gradient_checkpointing,
                    "gradient_reduction": cfg.gradient_reduction if run.is_sharded else "step"}
        if settings["gradient_reduction"] != AUTO:
            run = dataclasses.replace(run, gradient_reduction=settings["gradient_reduction"])
        ranks.planned, self.memory_line = run, None
        automatic = [name for name, value in settings.items() if value == AUTO]
        if not automatic:
            return cfg
        capacity = forecast.smallest(forecast.device_memory(ranks.device), ranks)
        place = {"world_size": ranks.world_size, **{name: getattr(cfg, name) for name in PLACE}}
        before = self.chosen_before()
        if all(before.get(key) == value for key, value in place.items()):
            again = {name: before[name] for name in set(automatic) & before.keys()}
            repeated = dataclasses.replace(run, **again)
            if forecast.memory(repeated)["device"] <= forecast.FILL * capacity:  # else on a smaller device
                settings.update(again)
                run = repeated
        reduction = settings["gradient_reduction"]
        if AUTO in (settings["micro_batch_size"], settings["checkpointed_blocks"]):
            run = forecast.choose(run, capacity, micro_batch_size=settings["micro_batch_size"],
                                  gradient_checkpointing=settings["checkpointed_blocks"],
                                  reduction=reduction)
        elif reduction == AUTO:
            run = dataclasses.replace(run, gradient_reduction=forecast.gradient_reduction(run, capacity))
        self.chosen = {**place, **{name: getattr(run, name) for name in automatic}}
        if automatic != ["gradient_reduction"]:
            planned = forecast.memory(run)["device"]
            self.memory_line = (
                f"memory   micro_batch_size {run.micro_batch_size} ({run.tokens:,} tokens), "
                f"{run.checkpointed_blocks} of {model.config.num_hidden_layers} blocks checkpointed: "
                f"forecast {planned / GB:.1f} of {capacity / GB:.1f} GiB")
        ranks.planned = run
        changes = {"micro_batch_size": run.micro_batch_size, "gradient_reduction": run.gradient_reduction}
        if cfg.gradient_checkpointing == AUTO:
            changes["gradient_checkpointing"] = run.checkpointed_blocks
        return dataclasses.replace(cfg, **changes)

    def chosen_before(self):
        """What the resumed checkpoint says about `auto`. Raises UserError if that is not a choice."""
        before = self.saved.get("chosen", {})
        lowest = {"checkpointed_blocks": 0, **dict.fromkeys(("world_size", "micro_batch_size", *PLACE), 1)}

        def is_choice(name, value):
            if name == "gradient_reduction":
                return value in ("step", "micro_batch")
            return type(value) is int and value >= lowest.get(name, math.inf)

        if not isinstance(before, dict) or not all(is_choice(*item) for item in before.items()):
            raise UserError(f"{self.resumed}: `chosen` in its state.json must be numbers, it is "
                            f"{before!r:.60}; set --micro_batch_size, --gradient_checkpointing and "
                            "--gradient_reduction")
        return {"sp": 1, "replicas": 1, **before}  # an older version had neither

    def identify(self, train_set, val_set, ranks):
        """Record what a resume must not change: data, order of steps, model, settings of the adapter.

        Raises UserError where the resumed checkpoint was made with other values, or the ranks differ.
        """
        cfg = self.cfg
        ranks.wait_for_slower()  # the tokens may be cached on this node, and not on another
        self.warn_of_positions(train_set)
        self.identity = dict(data=train_set.digest, seed=cfg.seed, batch_size=cfg.batch_size,
                             batch_tokens=cfg.batch_tokens)
        if not cfg.use_lora:
            self.identity["freeze"] = cfg.freeze  # another set of tensors has optimizer state
        else:
            self.identity.update({name: getattr(cfg, name) for name in resume.ADAPTER})
        self.identity["val_split"] = cfg.val_split
        if self.resumed:
            resume.check_identity(self.saved, self.identity, self.settings, cfg)
        self.identity.update(self.fingerprints())
        self.identity["val_data"] = val_set.digest if val_set else None
        ranks.agree("inputs", self.compared(train_set))

    def judge_by(self, digest):
        """Note the validation set by whose loss judge() goes. If it is another one, so is the best step."""
        self.judged, before = digest, self.saved.get("judged")
        is_other = before != digest
        if before is None:  # saved by an older version: it went by all validation data
            is_other = self.saved.get("val_data", self.identity["val_data"]) != self.identity["val_data"]
        if not is_other or self.best["val_loss"] is None:
            return
        known = self.lowest.get(digest)
        if known:
            self.lines.append(f"best     goes by another validation set now: its lowest val_loss is "
                              f"{known['val_loss']:.4f}, of step {known['step']}")
        else:
            self.lines.append(f"best     begins anew: the val_loss {self.best['val_loss']:.4f} of step "
                              f"{self.best['step']} is of other validation data")
        known = known or {"val_loss": None, "step": 0}
        self.best, self.best_saved = {**known, "behind": 0}, self.if_there(known)

    def fingerprints(self):
        """{"base" with LoRA, otherwise "model": the fingerprint of the model that the run started from}.

        A resumed full run has its weights from the checkpoint. So the model itself may have moved; if it is
        there, it must be the same. Raises UserError for another one.
        """
        key, model, then = "base" if self.cfg.use_lora else "model", self.paths.model, self.saved.get("base")
        if self.resumed and not self.cfg.use_lora:
            then = self.saved.get(key)
            model = resume.first_model(self.cfg.model, self.settings.get("model")) if then else None
            if model is None:
                return {key: then}
        now = pretrained.fingerprint(model, shares=True)
        if then and not pretrained.is_same(then, now):
            first = self.settings.get("model", self.cfg.model)
            remedy = f"Type --model {first if first != self.cfg.model else 'DIR with that model'}"
            raise UserError(f"--resume_from {self.cfg.resume_from}: the run started from another base model "
                            f"than --model {self.cfg.model}: their weights differ. {remedy}, or start a new "
                            "run with another --output_dir")
        return {key: now}

    def schedule(self, total_steps, lr_at):
        """Note the number of steps of the run; if a resume changes its schedule, say what the rate does.

        lr_at  (step, total_steps, cfg) -> learning rate
        """
        self.total_steps, before = total_steps, self.saved.get("total_steps", total_steps)
        changed = {name for name, *_ in resume.changes(self.settings, self.cfg)} & {*resume.SCHEDULE}
        if self.lr is not None and self.step < total_steps and (changed or before != total_steps):
            now = lr_at(self.step + 1, total_steps, self.cfg)
            rates = f"{self.lr:.2e} at step {self.step:,} -> {now:.2e} at step {self.step + 1:,}"
            jumps = f"{now:.2e}" != f"{self.lr:.2e}"
            advice = " (docs/continue.md says how to avoid a jump)" if jumps else ""
            warmup = math.ceil(self.settings.get("warmup_ratio", 0) * before)  # of the run so far
            if warmup <= self.step < math.ceil(self.cfg.warmup_ratio * total_steps):
                advice = (f" (in the warm-up again; --warmup_ratio {(warmup - 0.5) / total_steps:.3g} keeps "
                          f"that of {warmup:,} steps)" if warmup else " (in a warm-up; --warmup_ratio 0)")
            self.lines.append(f"schedule computed anew for {total_steps:,} steps (it was {before:,}): lr "
                              f"{rates}{advice}")

    def warn_of_positions(self, train_set):
        """Print a warning if conversations are longer than the model's positions go."""
        limit = self.paths.config.max_positions
        n_longer = int((train_set.n_tokens > limit).sum())
        if n_longer and any(rope and rope.ends_at_length for rope in self.paths.config.ropes):
            raise UserError(f"{n_longer:,} of {len(train_set):,} conversations have more than {limit:,} "
                            "tokens, and the model's dynamic rope scaling is supported up to there; "
                            f"--max_length {limit} cuts them")
        if n_longer and self.is_writer:
            print(f"warning: {n_longer:,} of {len(train_set):,} conversations have more than {limit:,} "
                  f"tokens, the model's max_position_embeddings; the longest has "
                  f"{train_set.n_tokens.max():,}. The model never saw such positions; --max_length {limit} "
                  "cuts them", file=sys.stderr)

    def restore(self, model, optimizer, tokenizer):
        """If a checkpoint is resumed, load the optimizer's state and the fp32 master weights.

        In any run, read what every later checkpoint will contain beside the weights.
        """
        paths = self.paths
        generation = pretrained.generation_config(paths.model, paths.config_json, tokenizer.stop_token_id)
        self.eos_ids = np.atleast_1d(generation["eos_token_id"]).tolist()
        if self.cfg.use_lora:
            self.shard_map = shards.adapter_shard_map(model, paths.is_multimodal)
        else:
            self.shard_map = shards.shard_map(model, paths.model)
        self.exported = pretrained.export_files(
            paths.model, paths.config_json, paths.tokenizer, tokenizer, model.peft_config)
        self.checkpoint_bytes = space.checkpoint_bytes(
            model, optimizer, self.shard_map, {**self.exported, **resume.export(self.cfg)})
        if self.resumed:
            checkpoint.load_training_tensors(self.resumed, model, optimizer)
            if self.is_writer and os.path.dirname(self.resumed) == os.path.realpath(self.root):
                self.restore_links()
        if isinstance(optimizer, optim.MasterWeights):
            optimizer.publish()

    def restore_links(self):
        """Point latest and best at the resumed run: later steps in this directory are of an abandoned run.

        A kill between the moves of the two links also leaves the second one out of date.
        """
        checkpoint.set_link(self.root, self.step)
        best = os.path.join(self.root, "best")
        if self.best_saved["val_loss"] is not None:
            checkpoint.set_link(self.root, self.best_saved["step"], "best")
        elif os.path.lexists(best) and not (os.path.isdir(best) and not os.path.islink(best)):
            os.remove(best)  # of other validation data

    @property
    def stops_early(self):
        """--early_stopping N: whether the last N validations brought no lower val_loss."""
        return bool(self.cfg.early_stopping) and self.best["behind"] >= self.cfg.early_stopping

    def note_lowest(self, digest, step, val_loss):
        """Remember the lowest loss of each validation set: a resume may name another one by --keep_best."""
        known = self.lowest.get(digest)
        if math.isfinite(val_loss) and (known is None or val_loss < known["val_loss"]):
            self.lowest[digest] = {"val_loss": val_loss, "step": step}

    def judge(self, step, val_loss):
        """Compare a val_loss with the best so far; return whether it is lower."""
        self.last_judged = step, val_loss
        self.best["behind"] += 1
        best = self.best["val_loss"]
        # nan compares as false with everything: as the best it would stay the best
        is_best = math.isfinite(val_loss) and (best is None or not val_loss >= best)
        if is_best:
            self.best = {"val_loss": val_loss, "step": step, "behind": 0}
        return is_best

    @property
    def norm_limit(self):
        """--max_grad_norm_factor: the factor times the median of the last 64 norms, once 16 are known."""
        factor = self.cfg.max_grad_norm_factor
        if factor and len(self.norms) >= 16:
            return factor * statistics.median(self.norms)
        return math.inf

    def is_best_saved(self):
        """Whether this step's checkpoint has the lowest val_loss of those that are saved; remembers it."""
        step, val_loss = self.last_judged or (None, math.nan)
        lowest = self.best_saved["val_loss"]
        is_best = step == self.step and math.isfinite(val_loss) and (lowest is None or not val_loss >= lowest)
        if is_best:
            self.best_saved = {"val_loss": val_loss, "step": step}
        return is_best

    def save(self, model, optimizer, is_last):
        """Write the checkpoint of the last step, then delete older ones as --keep_checkpoints says.

        Every rank calls it. With --async_save it returns when host memory has a copy of all that is saved,
        unless the run ends; `publish` completes the checkpoint later.
        """
        self.publish()
        self.check_lock()
        links = ("latest", "best") if self.is_best_saved() else ("latest",)
        state = {
            **self.identity,
            "best": self.best,
            "judged": self.judged,
            "baseline": self.baseline,
            "lowest": self.lowest,
            "best_saved": self.best_saved,
            "is_cut": self.owes_evaluation,
            "norms": list(self.norms),
            "chosen": self.chosen,
            "ranks": self.world_size,
            "date": self.date,
            "lr": self.lr,
            "total_steps": self.total_steps,
            "template_kwargs": self.cfg.template_kwargs,  # for chat.py
        }
        contents = dict(model=model, optimizer=optimizer, shard_map=self.shard_map, state=state, links=links,
                        exported={**self.exported, **resume.export(self.cfg)}, timeout=self.cfg.timeout)
        self.has_saved = True
        if self.cfg.async_save and not is_last:
            self.pending = checkpoint.start_save(self.root, self.step, in_background=True, **contents)
        else:
            checkpoint.save(self.root, self.step, **contents)
            self.prune(self.step)

    def disk_lines(self, steps_per_epoch):
        """The banner's line about the disk, and a warning or None (space.lines); None if nothing is saved."""
        cfg, place = self.cfg, (self.step, self.total_steps)
        n_left = space.saves_left(*place, cfg.save_steps, steps_per_epoch)
        if not n_left:
            return None
        if cfg.keep_best and cfg.eval_steps != cfg.save_steps:
            n_left += space.saves_left(*place, cfg.eval_steps, steps_per_epoch)
        n_there = sum(step <= self.step for step in checkpoint.steps_in(self.root))
        return space.lines(self.checkpoint_bytes, keep=cfg.keep_checkpoints, n_there=n_there, n_left=n_left,
                           has_best=self.identity["val_data"] is not None, directory=cfg.output_dir)

    def publish(self, waits=True):
        """Complete the checkpoint that is written in the background, if there is one. Every rank calls it.

        waits  False: only if all ranks have written their files. Costs an all-reduce on the host

        Raises the error of the writing, such as a full disk.
        """
        if self.pending and (waits or self.pending.is_written()):
            self.check_lock()
            self.pending.finish()
            self.prune(self.pending.step)
            self.pending = None

    def check_lock(self):
        """Raise UserError on the rank that writes if another run writes to the output directory now."""
        if self.is_writer:
            lock.check(self.cfg.output_dir)

    def prune(self, step):
        if self.is_writer:
            checkpoint.prune(self.root, self.cfg.keep_checkpoints, step, self.best_saved["step"])
