"""Muon for matrices with AdamW for all else, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer


class Muon(Optimizer):
    """torch's Muon (Keller Jordan's) for the matrices of the blocks, AdamW for embeddings, head, norms and biases.

    Queries, keys and values are a matrix each. Both learn at one rate and decay.

    Args:
        params: parameters or groups; `matrices`, set by a stage, is how many a weight stacks, by default 1; 0 is AdamW.
        lr: learning rate.
        weight_decay: times learning rate and parameter, subtracted.
        momentum: decay rate of Muon's running average of the gradient.
        adjust_lr_fn: match_rms_adamw scales Muon's updates by 0.2 sqrt(max(rows, columns)), to the size of AdamW's
            (2502.16982, section 2.2); original by sqrt(max(1, rows / columns)), for a rate of its own.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        unused = [torch.zeros(1, 1)]  # each step gives them their parameters
        self._muon = torch.optim.Muon(unused, **shared, momentum=momentum, adjust_lr_fn=adjust_lr_fn)
        self._adamw = AdamW(unused, **shared, betas=betas, eps=eps)
        super().__init__(params, {**shared, "matrices": 1})
        for group in self.param_groups:
            if group["matrices"] and any(p.ndim != 2 for p in group["params"]):
                raise ValueError("Muon is for matrices; give the group of other parameters matrices=0")
            group.update({**(self._muon if group["matrices"] else self._adamw).defaults, **group})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what the closure returns."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._muon.state.clear()
        self._muon.param_groups = [{**g, "params": self._views(g)} for g in self.param_groups if g["matrices"]]
        self._muon.step()
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if not group["matrices"]]
        self._adamw.step()
        return loss

    def _views(self, group: dict[str, Any]) -> list[Tensor]:
        """The matrices of a group's weights, each with its gradient, and with its momentum in torch's Muon."""
        views = []
        for p in (p for p in group["params"] if p.grad is not None):
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            tensors = (p.detach(), p.grad, self.state[p]["momentum_buffer"])
            for view, gradient, momentum in zip(*(t.chunk(group["matrices"]) for t in tensors), strict=True):
                view.grad, self._muon.state[view] = gradient, {"momentum_buffer": momentum}
                views.append(view)
        return views
