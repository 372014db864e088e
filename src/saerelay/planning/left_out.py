"""How many positions are left out because of the norm of their activations, and which token most of them hold."""

from saerelay.document import Record

SHARE_WORTH_SAYING = 0.01
"""Share of positions above which users are told that positions are left out."""


class LeftOut(Record):
    """Positions that are not trained or measured on, because their norm is far above that of the others."""

    site: str | None
    """The site where norms are looked at; null if no positions are left out for their norm."""
    n: int
    """Number of positions left out."""
    n_read: int
    """Number of positions read."""
    token: int | None = None
    """Id of the token that most of them hold."""
    n_of_token: int = 0
    """Number of positions left out that hold it."""

    @property
    def note(self) -> str:
        """A sentence, if more than a hundredth of the positions are left out; else "".

        >>> LeftOut(site="L4", n=30, n_read=1000, token=50, n_of_token=28).note[:60]
        'left out as outliers of norm: 3.0% of the positions read (30'
        """
        if self.n <= SHARE_WORTH_SAYING * self.n_read:
            return ""
        return (
            f"left out as outliers of norm: {self.n / self.n_read:.1%} of the positions read ({self.n:,}, of which "
            f"{self.n_of_token:,} hold token {self.token}, the most frequent), by their norm at {self.site}; "
            "data.outlier_norm = 0 keeps them all"
        )
