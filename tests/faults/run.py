"""The fault harness: `python tests/faults/run.py` breaks every command at every call, and looks for a way on.

    --limit 200     as many kills, and as many failed calls, drawn with --seed; without it, all
    --only hop,eval these commands
    --fault eval:replace:1:before    this one fault; may be repeated
    --jobs 2        processes at a time

For each fault a child process is killed, or a call of it fails. Then: no traceback; an error is one message and exit
code 2; the same command, or the one that its message prints, goes on; and what is left in the end is what an
undisturbed run leaves, bit for bit. Exit code 1 and a list if any of that does not hold.
"""

import argparse
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", COLUMNS="200")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent.parent))

import fake_endpoint
from fake_hub import TOKEN, Hub
from inject import FAIL_AT, KILLED_AT, Fault, Injector
from world import Command, answers, build, chosen, difference, fingerprint, fresh

TIMEOUT = 300.0
"""Seconds after which a command is said to hang."""
PRINTED = re.compile(r"This continues[^:]*: saerelay (.*)")


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    """Its exit code; minus the number of the signal that ended it."""
    said: str
    """What it printed."""

    @property
    def is_clean(self) -> bool:
        """Whether it ended well, or with one message."""
        return "Traceback" not in self.said and self.code in (0, 2)


def import_all() -> None:
    """Load what commands need before forking, without starting a thread."""
    import torch
    import transformers.models.gpt_neox.modeling_gpt_neox  # noqa: F401

    import saerelay.cli  # noqa: F401
    from saerelay.views.figures import page  # noqa: F401
    from saerelay.workflows import demo, hop, share  # noqa: F401

    torch.set_num_threads(1)


def run_command(words: list[str], fault: Fault | None, log: Path, counts: Path | None = None) -> Outcome:
    """Run a command line in a child process."""
    child = os.fork()
    if child == 0:
        _be_the_command(words, fault, log, counts)
    deadline = time.monotonic() + TIMEOUT
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return Outcome(code, log.read_text(errors="replace"))
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome(124, f"no end after {TIMEOUT:.0f} s\n{log.read_text(errors='replace')}")
        time.sleep(0.01)


def _be_the_command(words: list[str], fault: Fault | None, log: Path, counts: Path | None) -> NoReturn:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    warnings.simplefilter("ignore")
    injector = Injector(fault)
    injector.install()
    sys.argv = ["saerelay", *words]
    code = 0
    try:
        from saerelay.cli import main

        main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 70
    injector.fault = None
    if counts:
        counts.write_text(json.dumps(injector.counts))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Trials:
    """A world, what each command leaves there undisturbed, and what became of the faults so far."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.run = place / "work" / "run"
        self.log = place / "log"
        self.expected: dict[str, dict[str, str]] = {}
        self.problems: list[str] = []
        self.tally: Counter[str] = Counter()

    def prepare(self) -> None:
        """Make the runs that commands begin with."""
        build(self.place)
        self.run.parent.mkdir()
        self._do("train PLACE/r.toml --out PLACE/trained")
        self._do("push PLACE/trained me/saes")
        shutil.copytree(self.place / "trained", self.place / "judged")
        self._do("judge PLACE/judged --n 2")
        (self.place / "answers.json").write_text(answers(self.place / "judged"))
        shutil.copytree(self.place / "trained", self.place / "reported")
        self._do("report PLACE/reported --quick")

    def _do(self, words: str) -> None:
        outcome = run_command(Command("", words).line(self.place, self.run), None, self.log)
        assert outcome.code == 0, outcome.said

    def undisturbed(self, command: Command) -> dict[str, int]:
        """Run a command undisturbed: how many calls of each kind it makes."""
        fresh(self.run, command.base, self.place)
        counts = self.place / "counts"
        outcome = run_command(command.line(self.place, self.run), None, self.log, counts)
        assert outcome.code == 0, f"{command.name}: {outcome.said}"
        self.expected[command.name] = fingerprint(self.run)
        return json.loads(counts.read_text())

    def trial(self, command: Command, fault: Fault) -> None:
        """Let a fault happen to a command, and look for a way on."""
        fresh(self.run, command.base, self.place)
        words = command.line(self.place, self.run)
        first = run_command(words, fault, self.log)
        self.tally["kills" if fault.kills else "failed calls"] += 1
        if fault.kills and first.code != -signal.SIGKILL:
            self.tally["not reached"] += 1
        elif not fault.kills and not first.is_clean:
            self._problem(command, fault, f"exit code {first.code}", first)
            return
        if not fault.kills and first.code == 0 and self.run.exists():
            # What could not be removed may stay beside the result: the next command removes it.
            differs = difference(fingerprint(self.run), self.expected[command.name])
            if differs:
                self._problem(command, fault, f"silently another result: {differs}", first)
            return
        self._go_on(command, fault, words)

    def _go_on(self, command: Command, fault: Fault, words: list[str]) -> None:
        again = run_command(words, None, self.log)
        printed = PRINTED.search(" ".join(again.said.split("\n")))
        if again.code == 2 and "Traceback" not in again.said and printed:
            self.tally["by the printed command"] += 1
            again = run_command(shlex.split(printed[1]), None, self.log)
        if again.code == 2 and "exists; choose another" in again.said and not self._differs(command):
            return  # it had done all it had to do
        if again.code != 0 or "Traceback" in again.said:
            self._problem(command, fault, f"no way on (exit code {again.code})", again)
        elif self._differs(command):
            self._problem(command, fault, f"another result: {self._differs(command)}", again)

    def _differs(self, command: Command) -> str:
        found = fingerprint(self.run)
        for left in self.run.parent.iterdir():
            if left != self.run:
                found[f"../{left.name}"] = ""
        return difference(found, self.expected[command.name])

    def _problem(self, command: Command, fault: Fault, what: str, outcome: Outcome) -> None:
        last = "\n    ".join(outcome.said.strip().splitlines()[-6:])
        self.problems.append(f"{command.name}, {fault}: {what}\n    {last}")
        print(self.problems[-1], flush=True)


def faults_of(counts: dict[str, int]) -> list[Fault]:
    """Every fault that a command can come by."""
    faults = []
    for call in KILLED_AT:
        for number in range(1, counts.get(call, 0) + 1):
            faults += [Fault(call, number, "before"), Fault(call, number, "after")]
    for call in FAIL_AT:
        for number in range(1, counts.get(call, 0) + 1):
            faults += [Fault(call, number, "ENOSPC"), Fault(call, number, "EACCES")]
    return faults


def drawn(pairs: list[tuple[Command, Fault]], limit: int, seed: int) -> list[tuple[Command, Fault]]:
    """At most so many kills, and so many failed calls, in a random order."""
    random.Random(seed).shuffle(pairs)
    kills = [pair for pair in pairs if pair[1].kills]
    failed_calls = [pair for pair in pairs if not pair[1].kills]
    wanted = kills[:limit] + failed_calls[:limit]
    random.Random(seed).shuffle(wanted)
    return wanted


def main() -> int:
    """Run the trials; 1 if any of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--fault", action="append", default=[])
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after so long")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as place, servers(Path(place) / "home"):
        import_all()
        return run_trials(Path(place), options)


@contextmanager
def servers(home: Path) -> Iterator[None]:
    """A hub and an endpoint in a process of their own, for the commands that speak to one."""
    hub = Hub()
    endpoint = fake_endpoint.Server(fake_endpoint.always(1))
    os.environ.update(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_TOKEN=TOKEN, HF_HUB_OFFLINE="0")
    os.environ.update(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", SAERELAY_ENDPOINT=endpoint.url)
    child = os.fork()
    if child == 0:
        threading.Thread(target=hub.serve_forever).start()
        endpoint.http.serve_forever()
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def run_trials(place: Path, options: argparse.Namespace) -> int:
    """All trials that were asked for, in `jobs` worlds of their own; prints what came of them."""
    jobs = []
    for job in range(1, options.jobs):
        child = os.fork()
        if child == 0:
            os._exit(run_share(place / str(job), options, job))
        jobs.append(child)
    code = run_share(place / "0", options, 0)
    for child in jobs:
        code = max(code, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return code


def run_share(place: Path, options: argparse.Namespace, job: int) -> int:
    """One job's share of the trials."""
    place.mkdir()
    trials = Trials(place)
    trials.prepare()
    pairs = []
    asked = [text.split(":") for text in options.fault]
    names = [name for name in options.only.split(",") if name] or [parts[0] for parts in asked]
    for command in chosen(names):
        faults = faults_of(trials.undisturbed(command))
        if asked:
            faults = [Fault(call, int(number), what) for name, call, number, what in asked if name == command.name]
        pairs += [(command, fault) for fault in faults]
    wanted = drawn(pairs, options.limit or len(pairs), options.seed)[job :: options.jobs]
    began = time.monotonic()
    done = 0
    for command, fault in wanted:
        if options.minutes and time.monotonic() - began > 60 * options.minutes:
            break
        trials.trial(command, fault)
        done += 1
        if done % 100 == 0:
            print(f"job {job}: {done} of {len(wanted)}, {len(trials.problems)} problems", flush=True)
    tally = ", ".join(f"{number} {name}" for name, number in trials.tally.items())
    print(f"{done} of {len(pairs)} possible faults: {tally}; {len(trials.problems)} problems", flush=True)
    return min(1, len(trials.problems))


if __name__ == "__main__":
    sys.exit(main())
