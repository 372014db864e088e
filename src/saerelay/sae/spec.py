"""Specifications of dictionaries, the names of transfer methods, and how much work a transfer takes. Pure Python."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, SerializeAsAny, SerializerFunctionWrapHandler, model_serializer, model_validator

from saerelay.sae.architectures import ARCHITECTURES, Architecture, TopK, architecture_named
from saerelay.spec import Count, Described, OrAuto, Spec

Method = Literal["identity", "rescale", "procrustes", "affine"]
"""How a dictionary is carried to another site."""
MethodOrAuto = Method | Literal["auto"]
"""`auto`: the map that measures best."""
LegMethod = MethodOrAuto | Literal["random"]
"""`random`: no map, but a random dictionary in the place of the parent's; for controls."""
WITHOUT_MAP: tuple[LegMethod, ...] = ("identity", "random")
"""Methods that need no fitted map."""


class Solver(NamedTuple):
    """How the normal equations of a refit are solved."""

    direct_latents: int
    """Largest number of latents for which they are factored (1 GiB for 16384); wider dictionaries iterate."""
    tolerance: float
    """Iterations stop at residuals of this share of the right-hand side ..."""
    iterations: int
    """... and after this many at the latest."""


REFIT = Solver(direct_latents=16_384, tolerance=1e-3, iterations=200)
TRIAL = Solver(direct_latents=8_192, tolerance=0.05, iterations=20)
"""The refit of a trial (`trials`), which is rougher: to factor takes a third of the time of a few iterations."""
TRIAL_ROWS = 32_768
"""Largest number of rows that a trial uses; a quarter of them is held out."""
L0_ROWS = 8_192
"""Rows on which L0 is measured and set: the least that a hop reads."""


class AnyDictionarySpec(Spec):
    """The specification of a dictionary, except for its size.

    The keys of the chosen architecture are written beside the others; keys of other architectures may be present too,
    as in the output of `saerelay init`, and are ignored.
    """

    normalise: bool = Field(
        default=True, description="train on centred, rescaled activations; false reproduces the paper"
    )
    skip_connection: bool = Field(
        default=False,
        description="transcoders (sites.module_out): an affine path beside the latents, in closed form",
        exclude_if=lambda given: not given,
    )
    matryoshka: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(),
        description="shares of the latents, from the first, that learn to reconstruct by themselves, such as "
        "[0.0625, 0.25]; [] for none",
        exclude_if=lambda given: not given,
    )
    activation: SerializeAsAny[Architecture] = TopK()
    """The architecture, with its own keys."""

    @property
    def architecture(self) -> str:
        """The name of the architecture."""
        return self.activation.name

    @property
    def l0(self) -> float | None:
        """Number of active latents per token that is asked for; None if it follows from a penalty."""
        return self.activation.l0

    def prefixes(self, n_latents: int) -> list[int]:
        """The number of latents of each of the nested dictionaries; the last has all.

        >>> AnyDictionarySpec(matryoshka=(0.25,)).prefixes(64)
        [16, 64]
        """
        nested = {max(1, round(share * n_latents)) for share in self.matryoshka}
        return sorted(nested | {n_latents})

    def changed(self, **changes: Any) -> Self:
        """See `Spec.changed`; keys of the architecture may be changed too."""
        own = {key: changes.pop(key) for key in type(self.activation).model_fields if key in changes}
        if own:
            changes["activation"] = self.activation.changed(**own)
        return super().changed(**changes)

    def described(self) -> Iterator[Described]:
        """See `Spec.described`; the keys of all architectures are included."""
        names = ", ".join(architecture.name for architecture in ARCHITECTURES)
        yield Described("architecture", self.architecture, names)
        for item in super().described():
            if item.key != "activation":
                yield item
        for key, architectures in _keys_of_architectures().items():
            default = architectures[0].model_fields[key]
            used_by = ", ".join(architecture.name for architecture in architectures)
            value = getattr(self.activation, key, default.default)
            yield Described(key, value, f"{used_by}: {default.description}")

    @classmethod
    def all_keys(cls) -> list[str]:
        """See `Spec.all_keys`."""
        own = [key for key in cls.model_fields if key != "activation"]
        return ["architecture", *own, *_keys_of_architectures()]

    @model_validator(mode="before")
    @classmethod
    def _choose_architecture(cls, data: Any) -> Any:
        """Give its keys to the architecture that is named."""
        if not isinstance(data, dict) or isinstance(data.get("activation"), Spec | dict):
            return data
        rest = dict(data)
        chosen = architecture_named(rest.pop("architecture", TopK.name))
        own = {key: rest[key] for key in chosen.model_fields if key in rest}
        for key in _keys_of_architectures():
            rest.pop(key, None)
        rest.setdefault("activation", chosen.model_validate(own))  # a file's own `activation` is an error, said below
        return rest

    @model_serializer(mode="wrap")
    def _spread_architecture(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write the architecture's name and keys beside the others."""
        data = handler(self)
        own = data.pop("activation", {})
        return {"architecture": self.architecture, **data, **own}


MAX_EXPANSION = 1e6
"""Far above any sensible expansion, and small enough that the number of latents is still a count."""


class DictionarySpec(AnyDictionarySpec):
    """What an SAE looks like, and how sparse it is.

    >>> spec = DictionarySpec.parse({"architecture": "batchtopk", "k": 24, "expansion": 16})
    >>> spec.activation
    BatchTopK(k=24, aux_weight=0.03125)
    >>> spec.sized(768).n_latents
    12288
    """

    expansion: float = Field(
        default=8, gt=0, le=MAX_EXPANSION, description="latents per dimension of the model's activations ..."
    )
    n_latents: OrAuto[Annotated[Count, Field(gt=0)]] = Field(
        default="auto", description='... or their number; "auto": by expansion'
    )

    def sized(self, width: int) -> "SizedDictionarySpec":
        """Return the spec with its number of latents settled, for activations of a given width."""
        return SizedDictionarySpec(
            normalise=self.normalise,
            skip_connection=self.skip_connection,
            matryoshka=self.matryoshka,
            activation=self.activation,
            n_latents=max(1, round(self.expansion * width)) if self.n_latents == "auto" else self.n_latents,
        )


class SizedDictionarySpec(AnyDictionarySpec):
    """A dictionary whose number of latents is settled."""

    n_latents: Count

    def with_architecture(self, name: str) -> "SizedDictionarySpec":
        """Return the spec with another architecture at the same L0, with defaults for its other keys."""
        if name == self.architecture:
            return self
        activation = architecture_named(name)()
        if self.l0:
            activation = activation.with_l0(self.l0)
        return self.changed(activation=activation)

    def with_l0(self, l0: float) -> "SizedDictionarySpec":
        """Return the spec with another number of active latents per token."""
        return self.changed(activation=self.activation.with_l0(l0))


def _keys_of_architectures() -> dict[str, list[type[Architecture]]]:
    """Every key that some architecture has, with the architectures that have it."""
    found: dict[str, list[type[Architecture]]] = {}
    for architecture in ARCHITECTURES:
        for key in architecture.model_fields:
            found.setdefault(key, []).append(architecture)
    return found


def takes_sparse_step(device: str) -> bool:
    """Whether training uses `kernels.sparse_step`: on CPUs, and on GPUs with Triton. Elsewhere it uses autograd."""
    return device == "cpu" or (device.startswith("cuda") and find_spec("triton") is not None)
