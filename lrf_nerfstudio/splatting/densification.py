"""gsplat's default densification with an upper bound on the number of Gaussians."""

from dataclasses import dataclass
from typing import Any

import torch
from gsplat.strategy import DefaultStrategy


@dataclass
class BoundedDefaultStrategy(DefaultStrategy):
    """3DGS densification that never grows beyond `cap_max` Gaussians.

    Where more Gaussians ask to be split or duplicated than there is room for, those with the largest gradients are.
    """

    cap_max: int = 1_000_000

    @torch.no_grad()
    def _grow_gs(self, params: Any, optimizers: Any, state: dict[str, Any], step: int) -> tuple[int, int]:
        room = self.cap_max - len(params["means"])
        if room <= 0:
            return 0, 0
        gradients = state["grad2d"] / state["count"].clamp_min(1)
        candidates = gradients > self.grow_grad2d
        if step < self.refine_scale2d_stop_iter:
            candidates |= state["radii"] > self.grow_scale2d
        if int(candidates.sum()) > room:
            # Splitting and duplicating both add one Gaussian. Whoever is not chosen is shown to the parent class as one
            # without gradient and size; it clears these statistics right after growing in any case.
            rejected = torch.ones_like(candidates)
            rejected[torch.where(candidates, gradients, -torch.inf).topk(room).indices] = False
            state["grad2d"][rejected] = 0
            if "radii" in state:
                state["radii"][rejected] = 0
        return super()._grow_gs(params, optimizers, state, step)
