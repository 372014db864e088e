"""Streaming statistics of activations, on which maps are fitted: float32 centred products, summed in float64."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from saerelay.sae.dictionary import ROWS_AT_ONCE


@dataclass
class Moments:
    """Mean and covariance of paired activations of two sites, streamed batch by batch.

    >>> moments = Moments.empty(2, 2)
    >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    >>> moments.add(x, 3 * x)
    >>> moments.mean_target.tolist(), moments.cross.tolist()
    ([3.0, 3.0], [[3.0, 0.0], [0.0, 3.0]])

    Shapes: source width S, target width T. Products are centred on the first batch's mean before they are formed in
    float32, so that a large common offset costs no precision. All tensors lie on one device, and maps are fitted on
    that device.
    """

    n_source: int
    """Width S."""
    n_tokens: int
    shift: Tensor
    """float64 (S + T): the first batch's mean."""
    total: Tensor
    """float64 (S + T): Σ (x − shift)."""
    products: Tensor
    """float64 (S + T, S + T): Σ (x − shift)(x − shift)ᵀ."""
    _covariance: Tensor | None = field(default=None, repr=False)
    """Cached covariance of the tokens added so far; None until it is asked for."""

    @classmethod
    def empty(cls, n_source: int, n_target: int, device: torch.device | str = "cpu") -> "Moments":
        """Moments of no tokens yet."""
        n = n_source + n_target
        zeros = torch.zeros(n, dtype=torch.float64, device=device)
        return cls(n_source, 0, zeros.clone(), zeros.clone(), torch.zeros(n, n, dtype=torch.float64, device=device))

    def add(self, source: Tensor, target: Tensor) -> None:
        """Add activations (B, S) and (B, T) of the same tokens."""
        self._covariance = None
        for start in range(0, source.shape[0], ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            x = torch.cat([source[rows], target[rows]], dim=1).float()
            if self.n_tokens == 0:
                self.shift = x.mean(dim=0).to(self.shift)
            x = x - self.shift.to(x)
            self.n_tokens += x.shape[0]
            self.total += x.sum(dim=0).to(self.total)
            self.products += (x.T @ x).to(self.products)

    def scaled(self, source: Tensor, target: Tensor) -> "Moments":
        """The moments of activations divided by positive factors, (S) and (T)."""
        factors = torch.cat([source, target]).to(self.total)
        return Moments(
            self.n_source,
            self.n_tokens,
            shift=self.shift / factors,
            total=self.total / factors,
            products=self.products / torch.outer(factors, factors),
        )

    def between(self, source: slice, target: slice) -> "Moments":
        """The moments of two slices of the S + T dimensions, as those of a source and a target."""
        all_places = torch.arange(len(self.shift), device=self.shift.device)
        places = torch.cat([all_places[source], all_places[target]])
        n_source = len(range(len(self.shift))[source])
        products = self.products[places][:, places]
        return Moments(n_source, self.n_tokens, self.shift[places], self.total[places], products)

    @property
    def n_target(self) -> int:
        """Width T."""
        return len(self.shift) - self.n_source

    @property
    def keeps_width(self) -> bool:
        """Whether the target is as wide as the source."""
        return self.n_target == self.n_source

    @property
    def mean(self) -> Tensor:
        """float64 (S + T)."""
        return self.shift + self.total / self.n_tokens

    @property
    def covariance(self) -> Tensor:
        """float64 (S + T, S + T), divided by the number of tokens."""
        if self._covariance is None:
            offset = self.total / self.n_tokens
            self._covariance = self.products / self.n_tokens - torch.outer(offset, offset)
        return self._covariance

    @property
    def mean_source(self) -> Tensor:
        """float64 (S)."""
        return self.mean[: self.n_source]

    @property
    def mean_target(self) -> Tensor:
        """float64 (T)."""
        return self.mean[self.n_source :]

    @property
    def cov_source(self) -> Tensor:
        """float64 (S, S)."""
        return self.covariance[: self.n_source, : self.n_source]

    @property
    def cov_target(self) -> Tensor:
        """float64 (T, T)."""
        return self.covariance[self.n_source :, self.n_source :]

    @property
    def cross(self) -> Tensor:
        """float64 (T, S): covariance of target with source."""
        return self.covariance[self.n_source :, : self.n_source]

    def state(self) -> dict[str, Tensor]:
        """All fields, as tensors."""
        counts = torch.tensor([self.n_source, self.n_tokens])
        return {"counts": counts, "shift": self.shift, "total": self.total, "products": self.products}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> "Moments":
        """Undo `state`."""
        n_source, n_tokens = state["counts"].tolist()
        return cls(n_source, n_tokens, state["shift"], state["total"], state["products"])
