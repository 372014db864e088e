"""The fuzz harness: `python tests/faults/fuzz.py --n 2000 --seed 0` gives commands damaged and hostile files.

Recipes, plans, saved states, SAEs of other tools, and JSONL are changed at random: bytes, JSON values, TOML values.
Whatever they hold, a command ends within seconds with exit code 0, or with 2 and one message; it needs little memory,
writes nothing but what it was told to, and a run that goes on gives the same weights.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", COLUMNS="200")
sys.path.insert(0, str(Path(__file__).parent))

from world import build

SECONDS = 60
"""After which an input is said to hang."""
MEMORY = 6 * 2**30
"""Bytes of address space that inputs may need beyond what the process has."""

NASTY: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x", "\x1b[2J", "[/]",
    "/etc/passwd", "../../..", "\u202e", "9" * 5000, "1000B", [], [[]], {}, {"a": {}}, ["x"] * 3, [0] * 1000,
)  # fmt: skip
NASTY_TOML = (
    "inf", "-inf", "nan", "-1", "0", "1e308", "9223372036854775807", "99999999999999999999999", '""', '"x"', "[]",
    "[[]]", "{}", "true", '"1000B"', '"-5"', '"auto"', '"\\u001b[2J"', "[0, 0]", "[-1]", '["/etc/passwd"]', '"[/]"',
    "1979-05-27", "0x10", '"\\u202e"', '"/dev/zero"', "[" * 500 + "]" * 500, "[1e6]", "1_000", "9" * 5000,
)  # fmt: skip


class Ended(Exception):
    """A command did not end in time."""


def call(words: list[str]) -> tuple[int, str]:
    """Run a command line in this process: its exit code (70 for a traceback) and what it printed."""
    from saerelay.cli import main

    said = io.StringIO()
    sys.argv = ["saerelay", *words]
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main()
        return 0, said.getvalue()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
        return code, said.getvalue()
    except BaseException:
        return 70, f"{said.getvalue()}\n{traceback.format_exc()}"
    finally:
        signal.alarm(0)


# --- changes at random ------------------------------------------------------------------------------------------------


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut off, doubled, or put in."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(changed) + 1) if rng.random() < 0.5 else rng.randrange(min(400, len(changed)) + 1)
        match rng.randrange(5):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                changed[at:at] = changed[at : at + rng.randrange(64)]
            case 3:
                changed[at:at] = rng.randbytes(rng.randrange(1, 9))
            case _:
                del changed[at : at + rng.randrange(16)]
    return bytes(changed)


def change_json(content: bytes, rng: random.Random) -> bytes:
    """One value of a JSON file replaced, removed, or nested."""
    data = json.loads(content)
    holders: list[Any] = []
    waiting = [data]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict | list) and part:
            holders.append(part)
            waiting += part.values() if isinstance(part, dict) else part
    holder = rng.choice(holders)
    key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    match rng.randrange(4):
        case 0:
            del holder[key]
        case 1:
            return json.dumps(data).replace(json.dumps(holder[key]), "[" * 3000 + "]" * 3000, 1).encode()
        case _:
            holder[key] = rng.choice(NASTY)
    return json.dumps(data).encode()


def change_toml(content: bytes, rng: random.Random) -> bytes:
    """One value of a TOML file replaced, or a key doubled or misspelt."""
    lines = content.decode().splitlines()
    at = rng.choice([number for number, line in enumerate(lines) if " = " in line])
    key = lines[at].partition(" = ")[0]
    match rng.randrange(6):
        case 0:
            lines.insert(at, lines[at])
        case 1:
            lines[at] = lines[at].replace(key, key[::-1])
        case _:
            lines[at] = f"{key} = {rng.choice(NASTY_TOML)}"
    return "\n".join(lines).encode()


def change_safetensors(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header: values replaced, and offsets left as they are or not."""
    length = struct.unpack("<Q", content[:8])[0]
    header = change_json(content[8 : 8 + length], rng)
    claimed = rng.choice((len(header), len(header), 2**62, 0))
    return struct.pack("<Q", claimed) + header + content[8 + length :]


def some(*changes: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    """One of several kinds of change."""
    return lambda content, rng: rng.choice(changes)(content, rng)


# --- what is fed -----------------------------------------------------------------------------------------------------


class Fuzz:
    """A world with good files, and what became of bad ones."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.show = False
        self.problems: list[str] = []
        self.tally: Counter[str] = Counter()

    def prepare(self) -> None:
        """Make a finished run, an unfinished one, and SAEs in every format that is written."""
        build(self.place)
        good = self.place / "good"
        assert call(["train", f"{self.place}/r.toml", "--out", str(good)])[0] == 0
        for format in ("saelens", "sparsify", "dictionary_learning", "saerelay"):
            code, said = call(["export", str(good), "--format", format, "--out", f"{self.place}/{format}"])
            assert code == 0, said
        self._make_npz()
        whole = {path: path.read_bytes() for path in (good / "legs").rglob("*.safetensors")}
        self.weights = whole

    def _make_npz(self) -> None:
        import numpy as np

        folder = self.place / "gemma-scope-2b-pt-res/layer_1/width_1k/average_l0_4"
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        arrays = {"w_enc": (24, 48), "b_enc": (48,), "w_dec": (48, 24), "b_dec": (24,), "threshold": (48,)}
        np.savez(folder / "params.npz", **{name: rng.random(shape, np.float32) for name, shape in arrays.items()})

    def input(self, number: int, seed: int) -> None:
        """One input."""
        rng = random.Random(f"{seed} {number}")
        kind = rng.choice((self.recipe, self.plan, self.state, self.sae, self.sae, self.jsonl))
        before = {path.name for path in self.place.iterdir()}
        try:
            words, code, said, also = kind(rng)
        except BaseException:
            self._problem(number, kind.__name__, traceback.format_exc())
            return
        finally:
            shutil.rmtree(self.place / "out", ignore_errors=True)
            shutil.rmtree(self.place / "fed", ignore_errors=True)
        self.tally[f"{kind.__name__}: {code}"] += 1
        if self.show:
            print(f"{number} {kind.__name__}: {code}: {said.strip().splitlines()[-1:]}")
        outside = {path.name for path in self.place.iterdir()} - before
        if code not in (0, 2) or "Traceback" in said or "\x1b" in said or outside or also:
            problem = also or outside or f"exit code {code}"
            self._problem(number, f"{kind.__name__}: {problem}: {' '.join(words)}", said)

    def _problem(self, number: int, what: str, said: str) -> None:
        last = "\n    ".join(said.strip().splitlines()[-8:])
        self.problems.append(f"input {number}, {what}\n    {last[-1500:]}")
        print(self.problems[-1], flush=True)

    def recipe(self, rng: random.Random) -> tuple[list[str], int, str, str]:
        """A recipe with a value replaced, planned."""
        fed = self._fed()
        content = (self.place / rng.choice(("r.toml", "full.toml"))).read_bytes()
        (fed / "r.toml").write_bytes(some(change_toml, change_toml, change_bytes)(content, rng))
        words = ["plan", f"{fed}/r.toml", "--no-timing"]
        return words, *call(words), ""

    def plan(self, rng: random.Random) -> tuple[list[str], int, str, str]:
        """A finished run with another plan.json, resumed or exported."""
        run = shutil.copytree(self.place / "good", self.place / "fed")
        self._change(run / "plan.json", some(change_json, change_json, change_bytes), rng)
        words = ["train", f"{self.place}/r.toml", "--out", str(run), "--resume"]
        if rng.random() < 0.5:
            words = ["export", str(run), "--format", "saelens", "--out", f"{self.place}/out"]
        return words, *call(words), ""

    def state(self, rng: random.Random) -> tuple[list[str], int, str, str]:
        """A finished run with a damaged state, resumed."""
        run = shutil.copytree(self.place / "good", self.place / "fed")
        self._change(run / "state/state.json", some(change_json, change_bytes), rng)
        words = ["train", f"{self.place}/r.toml", "--out", str(run), "--resume"]
        code, said = call(words)
        changed = ""
        if code == 0:
            for path, content in self.weights.items():
                if (run / path.relative_to(self.place / "good")).read_bytes() != content:
                    changed = f"{path.name} of another run"
        return words, code, said, changed

    def sae(self, rng: random.Random) -> tuple[list[str], int, str, str]:
        """An SAE of another tool, imported."""
        format = rng.choice(("saelens", "sparsify", "dictionary_learning", "saerelay", "gemma-scope-2b-pt-res"))
        root = shutil.copytree(self.place / format, self.place / "fed" / format)
        files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".md"]
        path = rng.choice(files)
        changes = [change_bytes]
        if path.suffix == ".json":
            changes = [change_json, change_json, change_bytes]
        elif path.suffix == ".safetensors":
            changes = [change_safetensors, change_bytes]
        self._change(path, some(*changes), rng)
        words = ["import", str(path.parent), "--out", f"{self.place}/out"]
        code, said = call(words)
        if code == 0:
            code, said = call(
                ["export", f"{self.place}/out", "--format", "saerelay", "--out", f"{self.place}/out/again"]
            )
        return words, code, said, ""

    def jsonl(self, rng: random.Random) -> tuple[list[str], int, str, str]:
        """Prompts, judgements and a training log, each read by what reads it."""
        run = shutil.copytree(self.place / "good", self.place / "fed")
        match rng.randrange(3):
            case 0:
                prompt = {"prompt": [1, 2, 3], "right": [4], "wrong": [5]}
                content = "\n".join([json.dumps(prompt)] * 8).encode()
                (run / "p.jsonl").write_bytes(change_bytes(content, rng))
                words = ["circuits", str(run), "--task", f"{run}/p.jsonl", "--n-prompts", "8", "--k", "2"]
            case 1:
                answers = {"page": "0123456789ab", "judge": "ada", "answers": {"1": "yes"}, "schema": 1}
                (run / "j.json").write_bytes(some(change_json, change_bytes)(json.dumps(answers).encode(), rng))
                words = ["score", str(run), f"{run}/j.json"]
            case _:
                self._change(run / "metrics.jsonl", change_bytes, rng)
                words = ["train", f"{self.place}/r.toml", "--out", str(run), "--resume"]
        return words, *call(words), ""

    def _fed(self) -> Path:
        fed = self.place / "fed"
        fed.mkdir()
        return fed

    def _change(self, path: Path, change: Callable[[bytes, random.Random], bytes], rng: random.Random) -> None:
        path.write_bytes(change(path.read_bytes(), rng))


def main() -> int:
    """Feed inputs; 1 if any of them did harm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input", type=int, default=-1, help="only this one")
    parser.add_argument("--show", action="store_true", help="print what is said of each")
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    def too_long(number: int, frame: object) -> None:
        raise Ended(f"no end after {SECONDS} seconds")

    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        fuzz = Fuzz(Path(folder))
        fuzz.prepare()
        fuzz.show = options.show
        _write_full_recipe(fuzz.place)
        size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        numbers = [options.input] if options.input >= 0 else range(options.n)
        for number in numbers:
            fuzz.input(number, options.seed)
            if number % 200 == 199:
                print(f"{number + 1} inputs, {len(fuzz.problems)} problems", flush=True)
        tally = ", ".join(f"{name} {count}" for name, count in sorted(fuzz.tally.items()))
        print(f"{len(numbers)} inputs ({tally}); {len(fuzz.problems)} problems")
    return min(1, len(fuzz.problems))


def _write_full_recipe(place: Path) -> None:
    """A recipe with every key, the small one's values among them."""
    from saerelay.planning.recipe import Recipe
    from saerelay.planning.toml import annotated_toml

    (place / "full.toml").write_text(annotated_toml(Recipe.from_toml(place / "r.toml")))


if __name__ == "__main__":
    sys.exit(main())
