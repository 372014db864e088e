"""SAE Relay: sparse autoencoders for every layer of a language model, by training one and relaying it to the others.

>>> import saerelay as sr
>>> str(sr.Site(3))
'L3'

A finished run: `suite = sr.load("runs/a"); sae = suite[sr.Site(3)]; z = sae.encode(x); x_hat = sae.decode(z)`.

Public names are listed in `__init__.pyi` and imported on first use, so that `saerelay --help` does not wait for torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
