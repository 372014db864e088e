"""Activations of several layers mapped to one of them: the training data of an SAE that these layers share.

`inherit.align` fits the maps when such a leg begins; `Cohort` mixes its batches by them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saerelay.sae.maps import AffineMap
from saerelay.site import Site


@dataclass(frozen=True, eq=False)
class Alignment:
    """Maps that take the activations of other sites to one site, `home`, so that all look alike there.

    >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    >>> alignment = Alignment(Site(5), {Site(6): (turn, torch.zeros(2))})
    >>> there = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    >>> alignment.rows({Site(5): there, Site(6): there})
    tensor([[1., 0.],
            [0., 2.],
            [3., 0.],
            [0., 4.]])
    """

    home: Site
    maps: Mapping[Site, tuple[Tensor, Tensor]]
    """A (D, D) and c (D), float32, of each other site: x at home is about A x + c."""

    @classmethod
    def fitted(cls, home: Site, maps: Mapping[Site, AffineMap], device: torch.device) -> "Alignment":
        """Build from maps of other sites to `home`."""
        return cls(
            home, {site: (m.A.to(device, torch.float32), m.c.to(device, torch.float32)) for site, m in maps.items()}
        )

    def rows(self, activations: Mapping[Site, Tensor]) -> Tensor:
        """Mix the sites' batches (B, D) of the same tokens into one (B, D), float32: sites take turns, row by row."""
        mixed = activations[self.home].to(torch.float32, copy=True)
        n_sites = 1 + len(self.maps)
        for turn, (site, (A, c)) in enumerate(self.maps.items(), start=1):
            mixed[turn::n_sites] = torch.addmm(c, activations[site][turn::n_sites].float(), A.T)
        return mixed

    def tensors(self) -> dict[str, Tensor]:
        """The maps by name, to be saved."""
        named = {}
        for site, (A, c) in self.maps.items():
            named[f"{site}.A"] = A
            named[f"{site}.c"] = c
        return named

    @classmethod
    def restore(cls, home: Site, sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> "Alignment | None":
        """Undo `tensors`; None if there are no other sites."""
        if not sites:
            return None
        return cls(home, {site: (tensors[f"{site}.A"], tensors[f"{site}.c"]) for site in sites})
