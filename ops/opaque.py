"""Operations that torch.compile does not look into, for functions whose code it could not trace.

A call is one operation of a compiled block, so the block stays one graph for all packings. (With
torch.compiler.disable instead, a block breaks into two graphs around the call.) The price: only the arguments
are kept, and backward computes the function again, with autograd.
"""

import torch


def operation(name, schema, n, function, like):
    """Register sft::NAME, which computes a function, and its backward. Returns the callable operation.

    schema    of the arguments, such as "Tensor q, Tensor offsets, int window"
    n         the first n arguments are the tensors that get gradients
    function  from the arguments to a tensor that is not a view of one of them
    like      number of the argument whose shape and dtype the result has
    """

    def forward(*arguments):
        return function(*arguments).contiguous()

    def backward(grad, *arguments):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in arguments[:n]]
            y = function(*inputs, *arguments[n:])
        return list(torch.autograd.grad(y, inputs, grad))

    def keep(ctx, inputs, output):
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.numbers = inputs[len(tensors) :]  # tensors come first

    def gradients(ctx, grad):
        arguments = (*ctx.saved_tensors, *ctx.numbers)
        return *of_backward(grad, *arguments), *[None] * (len(arguments) - n)

    # Not custom_op: it would switch autograd off inside of `backward`.
    torch.library.define(f"sft::{name}", f"({schema}) -> Tensor")
    torch.library.define(f"sft::{name}_backward", f"(Tensor grad, {schema}) -> Tensor[]")
    torch.library.impl(f"sft::{name}", "default")(forward)
    torch.library.impl(f"sft::{name}_backward", "default")(backward)
    torch.library.register_fake(f"sft::{name}", lambda *x: x[like].new_empty(x[like].shape))
    torch.library.register_fake(
        f"sft::{name}_backward", lambda grad, *x: [t.new_empty(t.shape) for t in x[:n]])
    torch.library.register_autograd(f"sft::{name}", gradients, setup_context=keep)
    of_backward = getattr(torch.ops.sft, f"{name}_backward")
    return getattr(torch.ops.sft, name)
