"""Parameter groups, AdamW on this rank's shards, and fp32 master weights of any optimizer.

To use another optimizer, write a class with AdamW's methods and return it from `choose`. Checkpoints then
contain the state that its `new_state` names, tools/plan.py counts it, and --optimizer_offload works with it.
"""

import itertools
import math

import torch
from torch.optim.adamw import adamw

from ops.memory import is_split, local


def parameter_groups(model, weight_decay, lora_plus_ratio=1.0):
    """The trained parameters in three groups, dicts with params, weight_decay and lr_ratio (a factor of lr).

    Matrices and the kernels of convolutions decay; vectors (norms, biases, A_log and dt_bias of linear
    attention, DoRA's magnitudes) do not. LoRA's B matrices form their own group, with lora_plus_ratio as its
    lr_ratio (LoRA+, arXiv 2402.12354). A group may be empty.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    vectors = [p for _, p in trained if p.ndim < 2]
    matrices = [p for name, p in trained if p.ndim >= 2 and ".lora_B." not in name]
    lora_b = [p for name, p in trained if p.ndim >= 2 and ".lora_B." in name]
    return [dict(params=vectors, weight_decay=0.0, lr_ratio=1.0),
            dict(params=matrices, weight_decay=weight_decay, lr_ratio=1.0),
            dict(params=lora_b, weight_decay=weight_decay, lr_ratio=lora_plus_ratio)]


def choose(model, cfg):
    """(class, parameter groups) of a run's optimizer. Training and the forecast of memory both ask here."""
    groups = parameter_groups(model, cfg.weight_decay, cfg.lora_plus_ratio)
    return AdamW, groups


def create(model, cfg):
    """The optimizer of a run, for a model with weights. cfg: sft.Config."""
    optimizer_class, groups = choose(model, cfg)
    return build(optimizer_class, groups, offload=cfg.optimizer_offload, **hyperparameters(cfg))


def hyperparameters(cfg):
    return dict(lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=1e-8)


def state_itemsizes(model, cfg):
    """{name of a trained parameter: bytes of optimizer state for each of its elements}, without the master.

    It asks new_state, which allocates nothing here: the parameters that it gets are on meta.
    """
    optimizer_class, groups = choose(model, cfg)
    on_meta = {p: torch.nn.Parameter(torch.empty(p.shape, device="meta"))
               for group in groups for p in group["params"]}
    groups = [{**group, "params": [on_meta[p] for p in group["params"]]} for group in groups]
    optimizer = optimizer_class(groups, **hyperparameters(cfg))
    return {name: sum(t.element_size() for t in optimizer.new_state(on_meta[p]).values())
            for name, p in model.named_parameters() if p in on_meta}


def build(optimizer_class, groups, *, lr, betas, eps, offload=False):
    """The optimizer of a run: an optimizer_class over `groups`.

    Parameters in bf16 get fp32 masters, and gradients in fp32.

    offload  keep masters and the optimizer's state in host memory, whatever the parameters' dtype. Any class
             with AdamW's methods can be offloaded, because it sees nothing but the masters. It sees one at a
             time: there is an instance for each, so it cannot compare parameters
    """
    def new(groups):
        return optimizer_class(groups, lr=lr, betas=betas, eps=eps)

    parameters = [p for group in groups for p in group["params"]]
    if not offload and all(p.dtype == torch.float32 for p in parameters):
        return new(groups)
    masters = {}
    for p in parameters:
        device = "cpu" if offload else p.device
        masters[p] = torch.nn.Parameter(p.detach().to(device, torch.float32, copy=True))
    if offload:
        return HostMasterWeights([new([{**group, "params": [masters[p]]}])
                                  for group in groups for p in group["params"]], masters)
    groups = [{**group, "params": [masters[p] for p in group["params"]]} for group in groups]
    return MasterWeights([new(groups)], masters)


class AdamW:
    """Adam with decoupled weight decay (Loshchilov, Hutter 2019): torch's fused kernel on this rank's shards.

    Not a torch.optim.Optimizer. That computes the same, but importing it loads torch's compiler, which takes
    0.7 s, and clipping the gradients for it takes one more pass over their memory.

    param_groups  dicts with params, lr, weight_decay; other keys are kept, so `choose` can mark a group
    group_of      parameter -> its group
    state         parameter -> {name: tensor} as new_state makes it; empty before the first step
    """

    def __init__(self, groups, lr, betas, eps):
        self.param_groups = [{"lr": lr, **group} for group in groups]
        self.group_of = {p: group for group in self.param_groups for p in group["params"]}
        self.state, self.betas, self.eps = {}, betas, eps
        # per group, as fp32 on its device: the number of updates, once for each parameter
        self.counts = [torch.zeros(len(group["params"]), device=group["params"][0].device)
                       for group in groups if group["params"]]

    @property
    def updates(self):
        """Updates so far, for bias correction. Fewer than the run's steps if some were skipped.

        A checkpoint restores it. Reading it waits for the device.
        """
        return int(self.counts[0][0]) if self.counts else 0

    @updates.setter
    def updates(self, count):
        for counts in self.counts:
            counts.fill_(count)

    def new_state(self, p):
        """The state of p before its first update, {name: tensor that is shaped and sharded like p}.

        Checkpoints save and restore these tensors by name. "master" is reserved (disk/checkpoint.py).
        """
        return {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def state_of(self, p):
        """The state of p, created on first use."""
        if p not in self.state:
            self.state[p] = self.new_state(p)
        return self.state[p]

    def master(self, p):
        """The tensor that is updated for a parameter of the model: the parameter itself."""
        return p

    @torch.no_grad()
    def step(self, grad_scale=None, skip=None):
        """Update each parameter that has a gradient. On a device, the host waits for nothing.

        grad_scale  () fp32 tensor; the kernel first divides the gradients by it
        skip        () fp32 tensor; if it is 1, nothing changes: neither weights nor state nor `updates`
        """
        if self.counts and self.counts[0].device.type == "cpu":
            # With --param_offload they are on the GPU: torch would not wait for its copy, and read too early.
            grad_scale, skip = (None if number is None else number.cpu() for number in (grad_scale, skip))
            if grad_scale is not None and grad_scale == 1:
                grad_scale = None  # saves the kernel from writing the gradients
        groups = [group for group in self.param_groups if group["params"]]
        for group, counts in zip(groups, self.counts, strict=True):
            self.update_group(group, counts, grad_scale, skip)

    def update_group(self, group, counts, grad_scale, skip):
        """Update one group, and its `counts`. A subclass may update some groups in another way."""
        updated = [i for i, p in enumerate(group["params"]) if p.grad is not None]
        if not updated:
            return
        params, counts = [group["params"][i] for i in updated], counts.unbind()
        states = [self.state_of(p) for p in params]
        adamw([local(p) for p in params], [local(p.grad) for p in params],
              [local(state["exp_avg"]) for state in states],
              [local(state["exp_avg_sq"]) for state in states], [], [counts[i] for i in updated],
              grad_scale=grad_scale, found_inf=skip,
              lr=group["lr"], weight_decay=group["weight_decay"], beta1=self.betas[0],
              beta2=self.betas[1], eps=self.eps, amsgrad=False, maximize=False, fused=True)

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


class MasterWeights:
    """Optimizers of fp32 copies of the model's parameters, the masters; same methods as AdamW.

    The masters are on the device. The model computes in bf16 without FSDP2, which would cast for each
    micro-batch.

    optimizers  built on the masters; all have the same class, and from now on the same `state`
    masters     parameter of the model -> its fp32 copy, which one of the optimizers updates
    """

    def __init__(self, optimizers, masters):
        self.optimizers, self.masters, self.state = optimizers, masters, {}
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.optimizer_of = {p: optimizer for optimizer in optimizers
                             for group in optimizer.param_groups for p in group["params"]}
        for optimizer in optimizers:
            optimizer.state = self.state
        for p in masters:
            if not is_split(p):
                p.grad_dtype = torch.float32  # a step's micro-batches are summed in fp32

    @property
    def updates(self):
        return self.optimizers[0].updates

    @updates.setter
    def updates(self, count):
        for optimizer in self.optimizers:
            optimizer.updates = count

    def new_state(self, p):
        return self.optimizer_of[p].new_state(p)

    def state_of(self, p):
        return self.optimizer_of[p].state_of(p)

    def master(self, p):
        """The fp32 copy of a trained parameter; a frozen parameter has no copy and is returned itself."""
        return self.masters.get(p, p)

    @torch.no_grad()
    def step(self, grad_scale=None, skip=None):
        """As AdamW.step. The host waits for nothing."""
        for p, master in self.masters.items():
            master.grad = None if p.grad is None else p.grad.to(torch.float32)
        for optimizer in self.optimizers:
            optimizer.step(grad_scale, skip)
            optimizer.zero_grad()
        self.publish()

    @torch.no_grad()
    def publish(self):
        """Copy the masters into the model's parameters."""
        weights, masters = ([local(p) for p in params] for params in (self.masters, self.masters.values()))
        torch._foreach_copy_(weights, masters)  # one kernel for many parameters

    def zero_grad(self):
        for p in self.masters:
            p.grad = None


class HostMasterWeights(MasterWeights):
    """Masters in host memory (--optimizer_offload), with an optimizer and its state there for each of them.

    With AdamW the host holds 12 bytes per parameter, which the device is spared. Gradients come to the host,
    and weights leave it, through two buffers, each as large as this rank's largest shard in fp32. While the
    host updates one parameter, the gradient of the next one arrives. Copies that start during backward would
    save little more, and need a buffer for each parameter.

    optimizers  one for each master, in their order
    """

    def __init__(self, optimizers, masters):
        super().__init__(optimizers, masters)
        self.stream = CopyStream(next(iter(masters)).device)
        size = max(local(p).numel() for p in masters)
        self.buffers = [self.stream.empty(size) for _ in range(2)]

    @torch.no_grad()
    def step(self, grad_scale=None, skip=None):
        """As AdamW.step. But the host computes, so it waits for the device once, to read the two numbers.

        When it returns, weights are still on their way to the device; what is queued later sees them. The
        gradient of a parameter is None as soon as the host has it.
        """
        if skip is not None and skip.item():
            return
        grad_scale = None if grad_scale is None else grad_scale.cpu()
        optimizer_of = {p: optimizer for p, optimizer in zip(self.masters, self.optimizers, strict=True)
                        if p.grad is not None}
        copies = map(self.fetch, optimizer_of, itertools.cycle(self.buffers))
        next_copy = next(copies, None)
        for p, optimizer in optimizer_of.items():
            # the next gradient takes the other buffer, after the weight that leaves it
            (buffer, arrival), next_copy = next_copy, next(copies, None)
            self.stream.wait(arrival)
            p.grad = None
            master = self.masters[p]
            master.grad = with_shard(master, part(buffer, master))
            optimizer.step(grad_scale)
            optimizer.zero_grad()
            weight = part(buffer, p)
            weight.copy_(local(master))
            local(p).copy_(weight, non_blocking=True)

    def fetch(self, p, buffer):
        """Queue the copy of p's gradient into a buffer; return the buffer and the event behind the copy."""
        return buffer, self.stream.copy(part(buffer, self.masters[p]), local(p.grad))


def part(buffer, p):
    """The start of a flat fp32 buffer, as a tensor with dtype and shape of this rank's shard of p."""
    shard = local(p)
    return buffer.view(shard.dtype)[:shard.numel()].view(shard.shape)


def with_shard(p, shard):
    """A tensor that is sharded like p, with `shard` as this rank's shard, in the shard's memory."""
    if not is_split(p):
        return shard
    # As FSDP2 makes them. DTensor.from_local would move the shard to the device of the mesh.
    return type(p.data)(shard, p._spec, requires_grad=False)


class CopyStream:
    """A CUDA stream for copies to the host, beside the device's computation and the host's.

    On any other device a copy is done when `copy` returns. All that needs CUDA is here.
    """

    def __init__(self, device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def empty(self, size):
        """A flat fp32 buffer in host memory; pinned on CUDA, so that the host does not wait for its copies.

        torch rounds pinned memory up to a power of two bytes.
        """
        return torch.empty(size, pin_memory=self.stream is not None)

    def copy(self, target, source):
        """Copy after all that the current stream has queued. Returns what `wait` needs."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event):
        """Wait until a copy is done; `event` is what `copy` returned."""
        if event is not None:
            event.synchronize()


def set_lr(optimizer, lr):
    """Set each group's learning rate to lr times its lr_ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


def update(optimizer, loss, norm, *, lr, grad_clip, norm_limit=math.inf):
    """Clip the gradient by its norm and update the weights. The host waits for nothing.

    loss, norm  () tensors on the device: of the step, and of its gradient
    grad_clip   the largest norm; 0: no clipping

    Weights and state stay as they are if loss or norm is not finite, or if the norm exceeds norm_limit.
    """
    set_lr(optimizer, lr)
    norm = norm.double()  # the host compares the same number with the same limit later
    grad_scale = ((norm + 1e-6) / grad_clip).clamp(min=1).float() if grad_clip else None
    is_valid = loss.isfinite() & norm.isfinite() & (norm <= norm_limit)
    optimizer.step(grad_scale, skip=(~is_valid).float())
    optimizer.zero_grad()


class ChangeMeter:
    """Measures which fraction of the weights an update changes: an update below their precision changes none.

    It compares about 65,536 elements, spread over all weights that this rank updates. Only every tenth step,
    because the host needs time for it.
    """

    def __init__(self, optimizer):
        self.weights = [p for group in optimizer.param_groups for p in group["params"]]
        self.before = None

    def start(self, step):
        """Call it before the update of a step."""
        self.before = self.sample() if step % 10 == 1 else None

    def changed(self):
        """Call it after the update. Returns the fraction, a () tensor; None if the step is not measured."""
        if self.before is None:
            return None
        return (self.sample() != self.before).float().mean()

    def sample(self):
        flat = [local(p).detach().flatten() for p in self.weights]
        stride = 1 + sum(p.numel() for p in flat) // 2**16
        return torch.cat([p[::stride] for p in flat])
