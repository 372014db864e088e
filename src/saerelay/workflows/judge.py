"""`saerelay judge` and `saerelay score`: do people find transferred latents as interpretable as others?

judging/<page>.html     the page: one file, opened from disk; latents in random order, without their origin
judging/<page>.json     its key, not for judges: which latent of which leg each item is
judging/scores.json     the judges' scores, by origin and by layer
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from saerelay.analysis.features import make_features
from saerelay.analysis.judging import Answers, Judgements, LegsByOrigin, drawn, legs_by_origin, score
from saerelay.analysis.session import Session
from saerelay.errors import RunDirectoryError
from saerelay.files import write_text
from saerelay.interop.names import public_name
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.judging import JudgingKey, Scores
from saerelay.runs.features import load_features
from saerelay.runs.suite import PublishedSuite
from saerelay.views.judge import GENERATOR, page_data, page_html, page_name


def judge_run(
    suite: PublishedSuite,
    *,
    layers: Sequence[int] | None = None,
    n: int = 32,
    seed: int = 0,
    out: Path | None = None,
    console: Console | None = None,
) -> tuple[Path, JudgingKey]:
    """Write a page on which people judge latents without knowing their origin; returns its path and its key.

    Features that are not current are computed first. `n` latents of each origin are drawn at each layer (at all layers
    if `layers` is None); see `analysis.judging.drawn`. The page is judging/<page>.html in the run, or `out`, a file or
    a directory; the key stays in the run. Raises RunDirectoryError if there is nothing to judge, or if `out` is another
    file.
    """
    legs = legs_by_origin(suite, layers)
    session = Session(suite, console=console)
    make_features(session)
    return write_judging(session, legs, n, seed, out)


def write_judging(session: Session, legs: LegsByOrigin, n: int, seed: int, out: Path | None) -> tuple[Path, JudgingKey]:
    """Write the page and its key; the features must be current."""
    paths = session.suite.directory
    model = session.plan.facts.name
    features = {leg.id: load_features(paths, leg.id) for leg in legs.values()}
    items = drawn(legs, features, n, seed)
    data = page_data(items, features, session.corpus.test, session.token_text)
    name = page_name(seed, data)
    path = page_path(paths, name, out)
    n_tokens = next(iter(features.values())).facts.n_tokens
    key = JudgingKey(page=name, model=model, seed=seed, n=n, n_tokens=n_tokens, items=items)
    key.save(paths.judging / f"{name}.json")
    write_text(path, page_html(public_name(model), name, data))
    return path, key


def page_path(paths: RunDirectory, name: str, out: Path | None) -> Path:
    """Return the path of a page; RunDirectoryError if another file is there."""
    if out is None:
        return paths.judging / f"{name}.html"
    path = out / f"judge-{name}.html" if out.is_dir() else out
    if path.is_file() and GENERATOR not in path.read_text(encoding="utf-8", errors="replace"):
        raise RunDirectoryError(f"{path} exists and is not a judging page; choose another --out")
    return path


def score_run(suite: PublishedSuite, files: Sequence[Path]) -> Scores:
    """Score judges' exports of one page of this run; writes judging/scores.json.

    Raises RecipeError for a damaged file, and RunDirectoryError if files belong to different pages or to another run,
    if a file answers an item that its page does not have, or if two files are by the same judge.
    """
    if not files:
        raise RunDirectoryError("give the files that the judges exported: saerelay score RUN FILE...")
    keys: dict[str, JudgingKey] = {}
    answers: dict[str, Answers] = {}
    for file in files:
        export = Judgements.from_json(file)
        name = export.judge.strip() or file.stem
        if name in answers:
            raise RunDirectoryError(f'{file}: another file is by judge "{name}" too; give one file per judge')
        keys[export.page] = checked_key(suite.directory, file, export)
        answers[name] = export.answers
    if len(keys) > 1:
        raise RunDirectoryError(
            f"these files judge {len(keys)} different pages: {', '.join(sorted(keys))}; give the files of one page"
        )
    (key,) = keys.values()
    scores = score(key, answers)
    scores.save(suite.directory.judging / "scores.json")
    return scores


def checked_key(paths: RunDirectory, file: Path, export: Judgements) -> JudgingKey:
    """Return the key of an export's page; RunDirectoryError if this run has no such page, or the page no such item."""
    path = paths.judging / f"{export.page}.json"
    if not path.is_file():
        pages = sorted(page.stem for page in paths.judging.glob("*.json") if page.stem != "scores")
        raise RunDirectoryError(
            f"{file}: judgements of page {export.page}, which is not in this run (another run, seed, --n or --layers); "
            f"pages of {paths.root}: {', '.join(pages) or 'none'}"
        )
    key = JudgingKey.load(path)
    unknown = sorted(set(export.answers) - {item.item for item in key.items})
    if unknown:
        raise RunDirectoryError(
            f"{file}: has an answer for item {unknown[0]}, but page {export.page} has items 1 to {len(key.items)}"
        )
    return key
