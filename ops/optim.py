"""AdamW on this rank's parts, on the device or in host memory."""

import torch
from torch.optim.adamw import adamw

from ops.memory import local


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019): torch's fused kernel on this rank's parts.

    torch.optim.AdamW is the same arithmetic, but imports torch's compiler, 0.7 s before the first step; and its
    gradients are clipped in a pass of their own over memory.

    param_groups  dicts with params, lr and weight_decay, as torch.optim's
    state         parameter -> dict(step, exp_avg, exp_avg_sq), as torch.optim's; empty before the first step
    """

    def __init__(self, groups, lr, betas, eps):
        self.param_groups, self.state = [{"lr": lr, **group} for group in groups], {}
        self.settings = dict(beta1=betas[0], beta2=betas[1], eps=eps, amsgrad=False, maximize=False, fused=True)

    @torch.no_grad()
    def step(self, grad_scale=1.0):
        """Update each parameter that has a gradient, which is divided by grad_scale first."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p not in self.state:
                    self.state[p] = dict(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                                         exp_avg_sq=torch.zeros_like(p))
            moments, variances, steps = ([local(self.state[p][key]) for p in params]
                                         for key in ("exp_avg", "exp_avg_sq", "step"))
            scale = torch.full((), grad_scale, device=params[0].device) if params and grad_scale != 1 else None
            adamw([local(p) for p in params], [local(p.grad) for p in params], moments, variances, [], steps,
                  lr=group["lr"], weight_decay=group["weight_decay"], grad_scale=scale, **self.settings)

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


class HostAdamW(AdamW):
    """AdamW whose moments and fp32 master weights lie in host memory; parameters and gradients stay on the device.

    Saves 12 bytes a parameter of device memory; costs a copy of the gradients down and of the weights up, each step.
    host maps each parameter to its master.
    """

    def __init__(self, groups, **settings):
        self.host = {p: torch.nn.Parameter(p.detach().to("cpu", torch.float32, copy=True))
                     for group in groups for p in group["params"]}
        super().__init__([{**group, "params": [self.host[p] for p in group["params"]]} for group in groups], **settings)

    @torch.no_grad()
    def step(self, grad_scale=1.0):
        for p, master in self.host.items():
            master.grad = p.grad.to("cpu", torch.float32)
        super().step(grad_scale)
        super().zero_grad()
        self.publish()

    @torch.no_grad()
    def publish(self):
        """Copy the masters into the parameters."""
        for p, master in self.host.items():
            p.copy_(master)

    def zero_grad(self):
        for p in self.host:
            p.grad = None
