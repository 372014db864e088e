"""`saerelay export --format neuronpedia`: a run's features and explanations, as Neuronpedia's importer reads them."""

import re
from pathlib import Path

from saerelay.analysis.features import make_features
from saerelay.analysis.session import Session
from saerelay.files import write_text
from saerelay.interop import neuronpedia
from saerelay.interop.names import hub_id, public_name
from saerelay.interop.neuronpedia import Explained, Release, Source, SourceSet, Upload
from saerelay.planning.leg import Leg
from saerelay.runs.documents.interpretation import Interpretation, InterpretedLatent
from saerelay.runs.features import Features, load_features
from saerelay.runs.suite import PublishedSuite
from saerelay.site import TRANSCODER, ModuleKind, SiteKind
from saerelay.spec import format_count
from saerelay.workflows.placeless import without_paths

_KINDS: dict[ModuleKind, tuple[str, str]] = {
    "resid_post": ("res", "Residual stream"),
    "resid_pre": ("res-pre", "Residual stream before the layer"),
    "mlp_in": ("mlp-in", "MLP input"),
    "mlp_out": ("mlp", "MLP output"),
    "attn_out": ("att", "Attention output"),
    "attn_z": ("att-z", "Attention heads"),
}
"""For each kind of site, its name in the names of source sets and in their descriptions."""

_README = """# {release}: features for Neuronpedia

{n_sources} of {model}, written by saerelay in the layout that Neuronpedia's importer reads.
The files contain excerpts of the text on which the SAEs were evaluated.

To look at them in your own instance of Neuronpedia, put the folder `{model}` where its importer
looks (its bucket, under `v1/`), and import every source on its admin page. To have them published,
write to Neuronpedia's maintainers. First read the small files: complete the author, title and
addresses in release.jsonl and sourceset.jsonl, and check that the id in model.jsonl is the one
that Neuronpedia uses for this model.
"""


def export_features(session: Session, directory: Path, legs: list[Leg], *, release: str, repo: str) -> list[Path]:
    """Write one folder for each leg, after computing missing features; returns the folders.

    `release` names the release, and `repo` the hub repository of the SAEs, if there is one.
    """
    make_features(session)
    folders = []
    with session.display.status("writing features"):
        for leg in legs:
            features = load_features(session.suite.directory, leg.id)
            folders.append(
                neuronpedia.write_source(
                    directory,
                    upload_of(session.suite, leg, legs, features, release=release, repo=repo),
                    features,
                    session.corpus.test,
                    token_text=session.token_text,
                    explanations=explanations_of(session.suite, leg),
                )
            )
    n_sources = "One source" if len(folders) == 1 else f"{len(folders)} sources"
    model = folders[0].parent.name
    text = _README.format(release=neuronpedia.slug(release), n_sources=n_sources, model=model)
    write_text(directory / "README.md", text)
    return folders


def upload_of(
    suite: PublishedSuite, leg: Leg, legs: list[Leg], features: Features, *, release: str, repo: str = ""
) -> Upload:
    """Return the records of a leg's source, its source set, its model and the release; `legs` are all legs written."""
    recipe, facts = suite.plan.recipe, suite.plan.facts
    name = public_name(recipe.model.name)
    author = repo.split("/")[0] or "unnamed"
    urls = [f"https://huggingface.co/{repo}"] if repo else []
    slug = neuronpedia.slug(release)
    model = neuronpedia.model_record(name, facts.n_layers, facts.d_model, author=author)

    n_latents = len(features.n_fired)
    kind, title = _names_of(leg.kind)
    source_set = f"{slug}-{kind}-{format_count(n_latents).lower()}"
    identifier = f"{leg.layer}-{source_set}"
    if [(other.site, other.kind) for other in legs].count((leg.site, leg.kind)) > 1:
        identifier += f"__{re.sub('[^a-zA-Z0-9-]', '-', leg.id)}"
    return Upload(
        release=Release(
            name=slug, description=f"Sparse autoencoders of {name}, by saerelay", creatorName=author, urls=urls
        ),
        model=model,
        source_set=SourceSet(
            name=source_set,
            modelId=model.id,
            releaseName=slug,
            description=f"{title} - {format_count(n_latents)}",
            creatorName=author,
            urls=urls,
        ),
        source=Source(
            id=identifier,
            modelId=model.id,
            setName=source_set,
            num_prompts=features.facts.n_sequences,
            num_tokens_in_prompt=features.facts.context,
            dataset=hub_id(recipe.data.hub.dataset) or None,
            hfRepoId=repo or None,
        ),
    )


def _names_of(kind: SiteKind) -> tuple[str, str]:
    """Return the name of a kind of site in the names of source sets, and in their descriptions."""
    if kind == TRANSCODER:
        return "transcoder", "Transcoder"
    name, title = _KINDS[kind.module]
    if kind.module_out is None:
        return name, title
    name_out, title_out = _KINDS[kind.module_out]
    return f"{name}-to-{name_out}", f"Transcoder, {title} to {title_out}"


def explanations_of(suite: PublishedSuite, leg: Leg) -> list[Explained]:
    """Return the explanations of a leg's latents that `saerelay interpret` has saved."""
    document = Interpretation.load_if_any(suite.directory.interpretation(leg.id))
    if document is None:
        return []
    explained = []
    for entry in document.latents:
        if entry.explanation:
            notes = f"by {without_paths(document.asked.model)}{_scores(entry)}"
            explained.append(Explained(entry.latent, entry.explanation, notes))
    return explained


def _scores(entry: InterpretedLatent) -> str:
    """Return the scores of an explanation, such as "; detection 0.83, fuzzing 0.80"."""
    scores = []
    for name, score in (("detection", entry.detection), ("fuzzing", entry.fuzzing)):
        if score is not None:
            scores.append(f"{name} {score:.2f}")
    return f"; {', '.join(scores)}" if scores else ""
