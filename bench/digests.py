"""Digests of what small, fixed runs compute: equal before and after a change that is not meant to alter results.

    python bench/digests.py --json before.json                      # at the old commit
    python bench/digests.py --json after.json --against before.json # at the new one; exits with 1 if anything differs

Every run goes through the command line, so the two commits need not share an internal name. Digests hold on one machine
with one torch and one number of threads; they say nothing elsewhere. About ten minutes on two cores.

SHA-256 is taken of each published `dictionary.safetensors`, and of the documents `eval/*`, `matrix`, `measures`,
`lineage`, `circuits/*` and `survey` with schema numbers and whatever was measured by the clock left out.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BASE = """
[sites]
layers = [2, 3, 4, 5]
[data]
context = 64
[dictionary]
n_latents = 512
k = 16
target_l0 = 16.0
[train]
batch_tokens = 256
[evaluate]
tokens = 2048
"""
SMALL = "root_tokens = 16384\ntransfer_tokens = 8192\nmoment_tokens = 8192\nrefit_tokens = 4096\n"
CLOCK = ("seconds", "schema", "asked")
"""Keys that begin with one of these are left out of a document before it is hashed: time, versions, the question."""


def recipe(preset: str = "hub", plan: str = "", **sections: str) -> str:
    """A small recipe: `plan` are further lines of [plan], and each of `sections` further lines of that section."""
    text = BASE
    for name, lines in sections.items():
        header = f"[{name}]\n"
        if header in text:
            text = text.replace(header, header + lines + "\n")
        else:
            text += f"{header}{lines}\n"
    return f'{text}[plan]\npreset = "{preset}"\n{SMALL}{plan}\n'


LEGS = """
[[plan.legs]]
id = "root"
layer = 4
tokens = 16384
[[plan.legs]]
id = "child"
layer = 3
parent = "root"
tokens = 8192
fork_at = 0.5
method = "procrustes"
reuse = 2
[[plan.legs]]
id = "other-shape"
layer = 3
parent = "root"
tokens = 8192
architecture = "jumprelu"
n_latents = 768
k = 12
[[plan.legs]]
id = "aimed"
layer = 5
parent = "root"
tokens = 16384
goal_fvu = 0.6
predicted_fvu = 0.5
[[plan.legs]]
id = "control"
layer = 3
tokens = 8192
control_of = "child"
control_kind = "full"
"""

RUNS = {
    "scratch": recipe("scratch"),
    "forward": recipe("forward"),
    "backward": recipe("backward"),
    "alternate": recipe("alternate"),
    "hub": recipe("hub", "controls = [3]", train="snapshots = [0, 0.5]"),
    "paper": recipe("paper"),
    "auto": recipe("auto", "fvu_ratio = 1.2\nsurvey_tokens = 8192"),
    "batchtopk": recipe("hub", dictionary='architecture = "batchtopk"'),
    "jumprelu": recipe("hub", dictionary='architecture = "jumprelu"'),
    "relu": recipe("hub", dictionary='architecture = "relu"'),
    "identity": recipe("hub", 'method = "identity"\nrefit = false'),
    "rescale": recipe("hub", 'method = "rescale"'),
    "raw": recipe("hub", dictionary="normalise = false", model='dtype = "float32"'),
    "mlp_out": recipe("hub", sites='module = "mlp_out"'),
    "attn_z": recipe("alternate", sites='module = "attn_z"'),
    "epochs": recipe("hub", data="epochs = 2\noutlier_norm = 0\nprepend_bos = false"),
    "legs": recipe("hub").replace(SMALL, "moment_tokens = 8192\nrefit_tokens = 4096\n") + LEGS,
}


class Cli:
    """Runs `saerelay` with one interpreter, in one directory."""

    def __init__(self, python: str, folder: Path) -> None:
        self.command = [python, "-m", "saerelay"]
        self.folder = folder
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}

    def __call__(self, *arguments: str) -> None:
        """Run a command to its end; RuntimeError with its last lines if it fails."""
        done = subprocess.run(
            [*self.command, *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"saerelay {' '.join(arguments)}: exit {done.returncode}\n{done.stderr[-2000:]}")

    def interrupted(self, *arguments: str, log: Path) -> None:
        """Run a command and send it SIGTERM as soon as its training log has a line."""
        process = subprocess.Popen(
            [*self.command, *arguments], cwd=self.folder, env=self.environment, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (log.is_file() and log.stat().st_size):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.wait()


def train(cli: Cli, name: str, text: str) -> Path:
    """Train a recipe and evaluate it; its directory."""
    (cli.folder / f"{name}.toml").write_text(text, encoding="utf-8")
    cli("train", f"{name}.toml", "--out", name)
    cli("eval", name)
    return cli.folder / name


def analyses(cli: Cli) -> list[Path]:
    """The hub with everything that is measured of a run."""
    if not (cli.folder / "hub").exists():
        train(cli, "hub", RUNS["hub"])
    cli("matrix", "hub")
    cli("measures", "hub")
    cli("report", "hub", "--quick")
    cli("circuits", "hub", "--task", "brackets", "--prompts", "20")
    return [cli.folder / "hub"]


def cache(cli: Cli) -> list[Path]:
    """A run that writes its activations, and one that reads them."""
    text = recipe("hub", data='cache = "activations"')
    return [train(cli, name, text) for name in ("cache-written", "cache-read")]


def resume(cli: Cli) -> list[Path]:
    """A run that is interrupted, and goes on."""
    text = recipe("hub", "controls = [3]", train="snapshots = [0, 0.5]\ncheckpoint_every = 4096")
    run = cli.folder / "resume"
    (cli.folder / "resume.toml").write_text(text, encoding="utf-8")
    cli.interrupted("train", "resume.toml", "--out", "resume", log=run / "metrics.jsonl")
    cli("train", "resume.toml", "--out", "resume", "--resume")
    return [run]


def extend(cli: Cli) -> list[Path]:
    """A finished run that gets more tokens and another layer."""
    run = train(cli, "extend", recipe("hub"))
    more = recipe("hub").replace("root_tokens = 16384", "root_tokens = 24576")
    more = more.replace("[2, 3, 4, 5]", "[1, 2, 3, 4, 5]")
    (cli.folder / "more.toml").write_text(more, encoding="utf-8")
    cli("train", "more.toml", "--out", "extend", "--extend")
    cli("eval", "extend")
    return [run]


def hop(cli: Cli) -> list[Path]:
    """Hops of one SAE: ours, the same from another tool's file, and to another shape."""
    folder = cli.folder
    if not (folder / "batchtopk").exists():
        train(cli, "batchtopk", RUNS["batchtopk"])
    (folder / "hop.toml").write_text(RUNS["batchtopk"], encoding="utf-8")
    cli("export", "batchtopk", "--format", "dictionary_learning", "--out", "foreign")
    source = sorted(path.parent for path in (folder / "foreign").rglob("config.json"))[0]

    common = ("--recipe", "hop.toml", "--to-layer", "5")
    cli("hop", "--from", "batchtopk/legs/L4", *common, "--out", "hop-own")
    cli("hop", "--from", str(source), *common, "--out", "hop-foreign", "--tokens", "0")
    cli("hop", "--from", "batchtopk/legs/L4", *common, "--out", "hop-reshaped", "--n-latents", "640", "--k", "8")
    names = ("hop-own", "hop-foreign", "hop-reshaped")
    for name in names:
        cli("eval", name)
    return [folder / name for name in names]


SCENARIOS = {"analyses": analyses, "cache": cache, "resume": resume, "extend": extend, "hop": hop}
"""What is done beyond training and evaluating the recipes of RUNS; each returns the directories it made."""


def run_all(cli: Cli, only: list[str]) -> dict[str, str]:
    """All digests, by run and file; with `only`, those of some runs and scenarios."""
    digests: dict[str, str] = {}
    for name in [*RUNS, *SCENARIOS]:
        if only and name not in only:
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        directories = [train(cli, name, RUNS[name])] if name in RUNS else SCENARIOS[name](cli)
        for directory in directories:
            digests |= digests_of(directory)
    return digests


def digests_of(run: Path) -> dict[str, str]:
    """Digests of what a run directory holds."""
    found: dict[str, str] = {}
    for path in sorted(run.rglob("dictionary.safetensors")):
        found[f"{run.name}/{path.relative_to(run)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    documents = [*run.glob("eval/*.json"), *run.glob("circuits/*.json")]
    documents += [run / f"{name}.json" for name in ("matrix", "measures", "lineage", "survey")]
    for path in sorted(documents):
        if path.is_file():
            content = json.dumps(without_clock(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True)
            found[f"{run.name}/{path.relative_to(run)}"] = hashlib.sha256(content.encode()).hexdigest()
    return found


def without_clock(data: Any) -> Any:
    """A document without schema numbers and seconds."""
    if isinstance(data, dict):
        return {key: without_clock(value) for key, value in data.items() if not key.startswith(CLOCK)}
    if isinstance(data, list):
        return [without_clock(value) for value in data]
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the digests here")
    parser.add_argument("--against", type=Path, help="compare with digests written earlier")
    parser.add_argument("--only", default="", help="some runs, with commas between them")
    parser.add_argument("--keep", type=Path, help="leave the run directories here")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has saerelay")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        digests = run_all(Cli(options.python, folder), [name for name in options.only.split(",") if name])
    if options.json:
        options.json.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
    print(f"{len(digests)} digests")
    if not options.against:
        return
    before = json.loads(options.against.read_text(encoding="utf-8"))
    if options.only:
        before = {key: value for key, value in before.items() if key in digests}
    differing = sorted(key for key in before.keys() | digests.keys() if before.get(key) != digests.get(key))
    print("\n".join(f"differs: {key}" for key in differing) or "all equal")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
