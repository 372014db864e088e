"""A small world to break things in: a random model, tokens, recipes, finished runs, and the commands that are tried."""

import json
import re
import shutil
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

RECIPE = """
[model]
name = "{place}/model"
dtype = "float32"
device = "cpu"
[data]
tokens = "{place}/tokens.npy"
context = 16
block_tokens = 256
[dictionary]
n_latents = 48
k = 4
[plan]
preset = "forward"
root_tokens = {root_tokens}
transfer_tokens = 512
moment_tokens = 256
refit_tokens = 256
{auto}
[train]
batch_tokens = 64
checkpoint_every = 256
[evaluate]
tokens = 256
"""
AUTO = 'fvu_ratio = 1.5\nsurvey_tokens = "1k"'


class Command(NamedTuple):
    """A command line in which RUN stands for the directory that it works in, and PLACE for the world."""

    name: str
    words: str
    base: str = ""
    """The finished run that it begins with; "" for none."""

    def line(self, place: Path, run: Path) -> list[str]:
        """The words of the command line."""
        return [word.replace("RUN", str(run)).replace("PLACE", str(place)) for word in self.words.split()]


COMMANDS = (
    Command("train", "train PLACE/r.toml --out RUN"),
    Command("extend", "train PLACE/more.toml --out RUN --extend", base="trained"),
    Command("auto", "train PLACE/auto.toml --out RUN"),
    Command("cache", "train PLACE/cache.toml --out RUN"),
    Command("hop", "hop --from PLACE/trained/legs/L0 --to-layer 1 --recipe PLACE/r.toml --out RUN --tokens 512"),
    Command(
        "hop-model",
        "hop --from PLACE/trained/legs/L0 --to-layer 1 --recipe PLACE/r.toml --out RUN --tokens 512 "
        "--from-model PLACE/model",
    ),
    Command("eval", "eval RUN", base="trained"),
    Command("matrix", "matrix RUN --tokens 256", base="trained"),
    Command("measures", "measures RUN --tokens 256", base="trained"),
    Command("show", "show RUN 1 3", base="trained"),
    Command("circuits", "circuits RUN --task PLACE/p.jsonl --n-prompts 8 --k 2", base="trained"),
    Command("judge", "judge RUN --n 2", base="trained"),
    Command("report", "report RUN --quick", base="reported"),
    Command("transcoders", "train PLACE/transcoders.toml --out RUN"),
    Command("plan", "plan PLACE/auto.toml --write RUN/planned.toml", base="trained"),
    Command("interpret", "interpret RUN --explainer m --n 2 --yes", base="trained"),
    Command("score", "score RUN PLACE/answers.json", base="judged"),
    Command("push", "push PLACE/trained me/other"),
    Command("pull", "pull hf://me/saes --out RUN"),
    Command("export", "export PLACE/trained --format saelens --out RUN"),
    Command("import", "import PLACE/trained/legs/L0 --out RUN"),
)


def build(place: Path) -> None:
    """Make the model, the tokens and the recipes."""
    import numpy as np
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=101,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPTNeoXForCausalLM(config).save_pretrained(place / "model")
    steps = np.random.default_rng(0).integers(1, 4, size=60_000).cumsum() % 100 + 1
    np.save(place / "tokens.npy", steps.astype(np.uint16))
    prompt = json.dumps({"prompt": [1, 2, 3], "right": [4], "wrong": [5]})
    (place / "p.jsonl").write_text("\n".join([prompt] * 8))
    recipe = RECIPE.format(place=place, root_tokens=1024, auto="")
    (place / "r.toml").write_text(recipe)
    (place / "more.toml").write_text(RECIPE.format(place=place, root_tokens=1536, auto=""))
    auto = RECIPE.format(place=place, root_tokens=4096, auto=AUTO).replace('"forward"', '"auto"')
    (place / "auto.toml").write_text(auto.replace("transfer_tokens = 512\n", ""))
    transcoders = '[sites]\nmodule = "mlp_in"\nmodule_out = "mlp_out"\n[data]'
    (place / "transcoders.toml").write_text(recipe.replace("[data]", transcoders))
    cache = f'[data]\ncache = "{place}/cache"\nepochs = 2'
    (place / "cache.toml").write_text(recipe.replace("[data]", cache))


def answers(judged: Path) -> str:
    """What a judge exports who says yes to every latent of the one page of a run."""
    [key] = (judged / "judging").glob("*.json")
    items = [item["item"] for item in json.loads(key.read_text())["items"]]
    return json.dumps({"schema": 1, "page": key.stem, "judge": "Ada", "answers": dict.fromkeys(items, "yes")})


def fingerprint(run: Path) -> dict[str, str]:
    """What a command left behind, but for times: each file with a digest; of pages and pictures the names alone."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or name.startswith("state/") or name.endswith(".lock"):
            continue
        if name.startswith(("report/", "judging/")):
            found[re.sub(r"[0-9a-f]{12}", "ID", name)] = ""
            continue
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
            content = json.dumps([_timeless(json.loads(line)) for line in lines]).encode()
        if path.suffix == ".safetensors" and "features" in name:
            content = content[int.from_bytes(content[:8], "little") :]  # its header says when it was made
        content = content.replace(str(run).encode(), b"RUN")
        found[name] = blake2b(content, digest_size=8).hexdigest()
    return found


def _timeless(data: Any) -> Any:
    """JSON without seconds."""
    if isinstance(data, dict):
        return {key: _timeless(value) for key, value in data.items() if "second" not in key}
    if isinstance(data, list):
        return [_timeless(value) for value in data]
    return data


def difference(found: dict[str, str], expected: dict[str, str]) -> str:
    """In which files two fingerprints differ; "" if they do not."""
    names = sorted({*found, *expected})
    return ", ".join(name for name in names if found.get(name) != expected.get(name))


def fresh(run: Path, base: str, place: Path) -> None:
    """The directory that a command begins with: a copy of its base, or nothing."""
    for left in [run, *run.parent.glob(f".{run.name}*")]:
        if left.is_dir():
            shutil.rmtree(left)
    shutil.rmtree(place / "cache", ignore_errors=True)
    if base:
        shutil.copytree(place / base, run)


def chosen(names: Sequence[str]) -> list[Command]:
    """The commands with these names, or all."""
    return [command for command in COMMANDS if not names or command.name in names]
