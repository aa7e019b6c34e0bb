"""LAMB, which torch.optim does not have."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from vitlit.errors import UserError


class LAMB(Optimizer):
    """AdamW's direction, scaled for each tensor by |parameter| / |direction| (1904.00962, algorithm 2).

    Like NVIDIA's FusedLAMB, with which DeiT III was trained: gradients are first clipped by their global norm, and
    tensors without weight decay are not scaled.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay rates of the running averages of the gradient and its square.
        eps: added to the denominator.
        weight_decay: times the parameter, added to the direction before scaling.
        max_grad_norm: the largest global norm of the gradients; None for no clipping.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"LAMB takes no lr {lr}, eps {eps}, weight_decay {weight_decay}, betas {betas}")
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise UserError(f"LAMB's max_grad_norm {max_grad_norm} is not above 0; null is no clipping")
        self.max_grad_norm = max_grad_norm
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what the closure returns."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        clip = None
        if self.max_grad_norm is not None and gradients:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            clip = (norm / self.max_grad_norm).clamp(min=1.0)
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self._update(group, parameters, clip)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor], clip: Tensor | None) -> None:
        beta1, beta2 = group["betas"]
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            self.state[p]["step"] += 1
        step = self.state[parameters[0]]["step"]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if clip is not None:
            gradients = list(torch._foreach_div(gradients, clip))
        means = [self.state[p]["mean"] for p in parameters]
        squares = [self.state[p]["square"] for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, math.sqrt(1 - beta2**step))
        torch._foreach_add_(denominators, group["eps"])
        directions = list(torch._foreach_div(means, denominators))
        torch._foreach_div_(directions, 1 - beta1**step)
        if group["weight_decay"]:
            torch._foreach_add_(directions, parameters, alpha=group["weight_decay"])
            sizes = torch.stack(torch._foreach_norm(parameters))
            lengths = torch.stack(torch._foreach_norm(directions))
            ratios = torch.where((sizes > 0) & (lengths > 0), sizes / lengths, 1.0)
            torch._foreach_mul_(directions, list(ratios.unbind()))
        torch._foreach_add_(parameters, directions, alpha=-group["lr"])
