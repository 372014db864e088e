"""Transcoders in circuit-tracer's format, against circuit-tracer itself (0.5.0, of which only `transcoder` is needed).

python bench/transcoders.py              # exports random transcoders, loads them with circuit-tracer, compares
python bench/transcoders.py --fixtures   # writes tests/data/transcoders with circuit-tracer's own classes
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.single_layer_transcoder import (
    SingleLayerTranscoder,
    TranscoderSet,
    load_transcoder_set,
)
from safetensors.torch import save_file
from torch import nn

from saerelay.interop import write_dictionary
from saerelay.interop.origin import Origin
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site

D, F = 8, 24
DATA = Path(__file__).parents[1] / "tests" / "data" / "transcoders"
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
CPU = torch.device("cpu")


def random_dictionary(architecture: str, seed: int, *, skip: bool) -> Dictionary:
    """A transcoder that fires now and then."""
    g = torch.Generator().manual_seed(seed)
    return Dictionary(
        architecture=architecture,
        W_enc=torch.randn(F, D, generator=g),
        b_enc=torch.randn(F, generator=g),
        W_dec=torch.randn(F, D, generator=g),
        b_dec=3 + torch.randn(D, generator=g),
        k=5 if architecture == "batchtopk" else None,
        threshold=None if architecture == "relu" else torch.rand(F, generator=g),
        W_skip=torch.randn(D, D, generator=g) if skip else None,
    )


def compare() -> None:
    """Export sets of three layers, and compare what circuit-tracer makes of them."""
    x = 3 + torch.randn(200, D, generator=torch.Generator().manual_seed(0))
    for architecture in ("relu", "jumprelu", "batchtopk"):
        for skip in (False, True):
            ours = [random_dictionary(architecture, layer, skip=skip) for layer in range(3)]
            with TemporaryDirectory() as place:
                for layer, dictionary in enumerate(ours):
                    sites = {"site": Site(layer, "mlp_in"), "site_out": Site(layer, "mlp_out")}
                    write_dictionary(place, dictionary, Origin(model="demo", **sites), "circuit-tracer")
                config = yaml.safe_load((Path(place) / "config.yaml").read_text())
                assert config["model_kind"] == "transcoder_set"
                keys = {key: config[key] for key in (*HOOKS, "scan")}
                files = {layer: f"{place}/layer_{layer}.safetensors" for layer in range(3)}
                theirs = load_transcoder_set(files, **keys, device=CPU, lazy_encoder=False, lazy_decoder=False)
                differences = []
                for layer, dictionary in enumerate(ours):
                    differences.append(float((theirs[layer](x) - dictionary(x)).abs().max()))
                assert theirs.skip_connection == skip
                assert (theirs.feature_input_hook, theirs.feature_output_hook) == tuple(HOOKS.values())
            print(f"{architecture:10} skip {skip!s:5}: largest difference {max(differences):.1e}")
            assert max(differences) < 1e-4


def fixtures() -> None:
    """Sets written by circuit-tracer's classes, and what they compute."""
    for name, skip, threshold in (("relu", False, False), ("jumprelu", False, True), ("jumprelu-skip", True, True)):
        torch.manual_seed(0)
        transcoders = {}
        for layer in range(2):
            activation = JumpReLU(torch.rand(F)) if threshold else nn.functional.relu
            one = SingleLayerTranscoder(D, F, activation, layer, skip_connection=skip, device=CPU, dtype=torch.float32)
            for parameter in (one.W_enc, one.W_dec, one.b_enc, one.b_dec, one.W_skip):
                if parameter is not None:
                    parameter.data.normal_()
            transcoders[layer] = one
        whole = TranscoderSet(transcoders, **HOOKS, scan="demo")
        whole.to_safetensors(str(DATA / name))
        config = {"model_name": "demo", "model_kind": "transcoder_set", **HOOKS, "scan": "demo"}
        (DATA / name / "config.yaml").write_text(yaml.safe_dump(config))
        x = torch.randn(20, D)
        with torch.no_grad():
            expected = {"x": x, "codes": whole[1].encode(x), "x_hat": whole[1](x)}
        save_file(expected, DATA / name / "expected.safetensors")


if __name__ == "__main__":
    fixtures() if "--fixtures" in sys.argv else compare()
