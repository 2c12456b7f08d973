"""The next-token loss that never holds the logits of a whole micro-batch."""

import torch

IGNORE = -100  # a target that is not trained



def chunked_cross_entropy(hidden, weight, targets, chunk=256, first=0, combine=None, each=None):
    """Next-token loss, summed, without the (N, V) logits: only target rows reach the head, `chunk` at a time.

    hidden   (N, C)  after the final norm
    weight   (V, C)  lm_head, possibly the tied embedding
    targets  (N,)    int64; rows with IGNORE contribute nothing and cost nothing
    each     (N,)    fp32, if given: takes the loss of each target
    returns  ()      fp32, nats summed over the targets

    weight may be a part of the vocabulary, from word `first` on; combine(tensor, "max" or "sum") then combines a
    tensor over all parts in place.
    """
    rows = (targets != IGNORE).nonzero().squeeze(1)  # a device sync on CUDA: the number of targets decides the shapes
    losses = torch.empty(len(rows), dtype=torch.float32, device=hidden.device)
    total = _ChunkedCrossEntropy.apply(hidden[rows], weight, targets[rows], losses, chunk, first, combine,
                                       torch.is_grad_enabled())
    if each is not None:
        each[rows] = losses
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forms the gradient of each chunk in forward, while its logits are at hand: nothing is computed twice, and one
    (chunk, V) buffer is alive instead of the three (N, V) ones of plain cross-entropy. The price is that the
    gradients of hidden and weight, which backward would make anyway, live from forward on."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, losses, chunk, first, combine, grad_enabled):
        combine = combine or (lambda tensor, how: None)
        hidden_grad = torch.empty_like(hidden) if grad_enabled and ctx.needs_input_grad[0] else None
        weight_grad = None
        if grad_enabled and ctx.needs_input_grad[1]:
            weight_grad = torch.empty_like(weight, dtype=torch.float32)  # whatever the dtype, as it sums over chunks
            if not len(targets) or hidden.dtype != torch.float32:
                weight_grad.zero_()  # otherwise the first chunk's product overwrites it
        buffer = hidden.new_empty(min(chunk, len(targets)), weight.shape[0])  # for all chunks: new memory costs time
        for start in range(0, len(targets), chunk):
            h, t = hidden[start : start + chunk], targets[start : start + chunk, None] - first
            logits = torch.mm(h, weight.T, out=buffer[: len(h)]).float()  # (chunk, V); from here on changed in place
            largest = logits.amax(dim=1, keepdim=True)
            combine(largest, "max")
            logits -= largest
            inside = ((t >= 0) & (t < weight.shape[0])).float()  # 1 where the target is among these words
            t = t.clamp(0, weight.shape[0] - 1)
            picked = logits.gather(1, t) * inside
            sums = torch.cat((logits.exp_().sum(dim=1, keepdim=True), picked), dim=1)
            combine(sums, "sum")
            torch.sub(sums[:, 0].log(), sums[:, 1], out=losses[start : start + chunk])
            if hidden_grad is None and weight_grad is None:
                continue
            logits /= sums[:, :1]  # the probabilities; less the one-hot target it is the gradient of the logits
            logits.scatter_add_(1, t, -inside)
            if hidden_grad is not None:
                torch.mm(logits.to(h.dtype), weight, out=hidden_grad[start : start + chunk])
            if weight_grad is not None and h.dtype == torch.float32:
                weight_grad.addmm_(logits.T, h, beta=min(start, 1))  # without a second (V, C) buffer
            elif weight_grad is not None:
                weight_grad += logits.to(h.dtype).T @ h
        if hidden_grad is not None:
            combine(hidden_grad, "sum")
        ctx.grads = hidden_grad, weight_grad if weight_grad is None else weight_grad.to(weight.dtype)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):
        if ctx.grads is None:
            raise RuntimeError("the loss has been differentiated once already, and its gradients were scaled in place; "
                               "compute the loss anew")
        hidden_grad, weight_grad = ctx.grads
        ctx.grads = None
        for g in (hidden_grad, weight_grad):
            if g is not None:
                g.mul_(grad)
        return hidden_grad, weight_grad, None, None, None, None, None, None
