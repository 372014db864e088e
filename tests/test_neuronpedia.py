"""Features for Neuronpedia: every record against what its importer takes, and against our own features."""

from pathlib import Path

import pytest
import torch
from fake_run import EXPLANATION, F, fake_run, token_text
from neuronpedia_schema import read_upload
from small_recipe import recipe
from test_cli import call

from saerelay.analysis.session import Session
from saerelay.analysis.suite import Suite
from saerelay.errors import FormatError
from saerelay.interop import neuronpedia
from saerelay.runs.features import load_features
from saerelay.workflows import neuronpedia as workflow
from saerelay.workflows import share
from saerelay.workflows.launch import train_run


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """A run of three layers with controls, whose tokens are hostile."""
    return fake_run(tmp_path_factory.mktemp("neuronpedia") / "run")


@pytest.fixture(scope="module")
def written(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of all legs, controls too."""
    return export(suite, tmp_path_factory.mktemp("written"))


def export(suite: Suite, directory: Path) -> list[Path]:
    """Export with the features that are there: nothing could measure a run that is made up."""
    session = Session(suite)
    session.token_text = token_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "make_features", lambda _: None)
        return workflow.export_features(session, directory, suite.legs, release="My Suite", repo="me/saes")


def test_the_importer_takes_every_record_of_a_run(suite: Suite, written: list[Path]) -> None:
    names = [str(folder.relative_to(folder.parent.parent)) for folder in written]
    assert "saerelay-demo/1-my-suite-res-600" in names
    assert "saerelay-demo/0-my-suite-res-600__L0-from-L1" in names  # a layer with a control has two
    assert len(set(names)) == len(names) == len(suite.legs)
    for folder in written:
        rows = read_upload(folder)
        assert len(rows["Neuron"]) == F
        assert rows["SourceRelease"][0]["creatorName"] == "me" and rows["Source"][0]["hfRepoId"] == "me/saes"
        assert (rows["Model"][0]["layers"], rows["Model"][0]["dimension"]) == (3, 16)


def test_records_say_what_the_features_say(suite: Suite, written: list[Path]) -> None:
    for leg, folder in zip(suite.legs, written, strict=True):
        features = load_features(suite.directory, leg.id)
        rows = read_upload(folder)
        for latent in (0, 1, 123, F - 1):
            row = rows["Neuron"][latent]
            assert row["index"] == str(latent)
            assert row["frac_nonzero"] == features.n_fired[latent].item() / features.facts.n_tokens
            assert row["maxActApprox"] == pytest.approx(features.max_activation[latent].item(), rel=1e-4)
            tops = features.top_logits[latent].tolist()  # type: ignore[index]
            assert row["pos_str"] == [neuronpedia.storable(token_text(token)) for token in tops]
            lowest = features.bottom_logits_values[latent].tolist()  # type: ignore[index]
            assert row["neg_values"] == pytest.approx(lowest, rel=1e-4)

            examples = [row for row in rows["Activation"] if row["index"] == str(latent)]
            assert len(examples) == len(features.examples(latent))
            for row, example in zip(examples, features.examples(latent), strict=True):
                assert row["values"] == pytest.approx(example.activations, rel=1e-4)
                assert len(row["tokens"]) == len(row["values"])
                assert row["maxValueTokenIndex"] == example.position - example.start
                assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])


def test_explanations_come_with_who_made_them(suite: Suite, written: list[Path]) -> None:
    first = read_upload(written[0])["Explanation"]
    assert [row["index"] for row in first] == ["1", "2"]  # nobody could explain latent 3
    assert first[0]["description"] == EXPLANATION
    assert first[0]["notes"] == "by <b>asked</b>; detection 0.50, fuzzing 0.25"
    assert not (written[2] / "explanations").exists()  # an empty file would stop the importer


def test_bars_hold_as_many_tokens_as_the_histogram_and_end_at_the_maximum(suite: Suite) -> None:
    features = load_features(suite.directory, suite.legs[0].id)
    middles, heights = neuronpedia.bars(features, 5)
    assert sum(heights) == pytest.approx(features.histogram[5].sum().item(), rel=1e-3)
    assert middles == sorted(middles) and 0 < middles[0] and middles[-1] < features.max_activation[5].item()
    assert neuronpedia.bars(features, 0) == ([], [])  # a silent latent


def test_no_bar_stands_below_the_smallest_activation(suite: Suite) -> None:
    features = load_features(suite.directory, suite.legs[0].id)
    above_eight = features.with_(
        facts=features.facts.changed(histogram_first_edge=3.0),
        histogram=torch.tensor([[0, 5], [7, 3]]),
        max_activation=torch.tensor([16.0, 16.0]),
    )
    middles, heights = neuronpedia.bars(above_eight, 1)
    assert all(height == 0 for middle, height in zip(middles, heights, strict=True) if middle < 7.9)
    assert sum(heights) == pytest.approx(10, rel=1e-3)


def test_each_kind_of_transcoder_has_a_source_set_of_its_own(suite: Suite) -> None:
    leg = suite.legs[0]
    features = load_features(suite.directory, leg.id)
    modules = [("mlp_in", "mlp_out"), ("attn_z", "attn_out"), ("attn_out", None)]
    legs = [leg.changed(module=module, module_out=module_out) for module, module_out in modules]
    uploads = [workflow.upload_of(suite, each, legs, features, release="r") for each in legs]
    assert [upload.source_set.name for upload in uploads] == ["r-transcoder-600", "r-att-z-to-att-600", "r-att-600"]


def test_nothing_of_this_machine_is_inside(suite: Suite, written: list[Path]) -> None:
    for folder in written:
        texts = repr(read_upload(folder))
        private = (str(suite.directory.root), str(folder.parent), "localhost")
        assert not any(text in texts for text in private)


def test_writing_it_again_gives_the_same_bytes(suite: Suite, written: list[Path], tmp_path: Path) -> None:
    again = export(suite, tmp_path)
    for one, other in zip(written, again, strict=True):
        for path in one.rglob("*.*"):
            assert path.read_bytes() == (other / path.relative_to(one)).read_bytes()


def test_wide_saes_make_no_more_files_than_the_importer_lists(
    monkeypatch: pytest.MonkeyPatch, suite: Suite, tmp_path: Path
) -> None:
    monkeypatch.setattr(neuronpedia, "MOST_FILES", 3)
    monkeypatch.setattr(neuronpedia, "FEATURES_PER_FILE", 10)
    leg = suite.legs[0]
    features = load_features(suite.directory, leg.id)
    upload = workflow.upload_of(suite, leg, [leg], features, release="wide")
    folder = neuronpedia.write_source(tmp_path, upload, features, Session(suite).corpus.test, token_text=token_text)
    assert len(list((folder / "features").iterdir())) == 3
    assert len(read_upload(folder)["Neuron"]) == F


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("EleutherAI/pythia-70m-deduped", "pythia-70m-deduped"),
        ("openai-community/gpt2", "gpt2-small"),
        ("google/gemma-3-4b-pt", "gemma-3-4b"),
        ("google/gemma-3-270m-it", "gemma-3-270m-it"),
        ("Qwen/Qwen2.5-1.5B-Instruct", "qwen2.5-1.5b-it"),
        ("meta-llama/Llama-3.1-8B", "llama3.1-8b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3-70b-it"),
        ("Qwen/Qwen3.5-2B-Base", "qwen3.5-2b-pt"),
    ],
)
def test_models_are_called_what_neuronpedia_calls_them(ours: str, theirs: str) -> None:
    assert neuronpedia.model_id(ours) == theirs


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_without_features_is_exported_from_the_command_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train_run(recipe({"name": str(tiny_model)}, tmp_path), run)
    out = tmp_path / "tiny-suite"
    code, stdout, _ = call(
        "export", str(run), "--format", "neuronpedia", "--out", str(out), capsys=capsys, monkeypatch=monkeypatch
    )
    assert code == 0 and stdout.split() == [str(out / "model" / f"{layer}-tiny-suite-res-48") for layer in (1, 2)]
    for folder in stdout.split():
        rows = read_upload(Path(folder))
        assert rows["Activation"] and any(row["pos_str"] for row in rows["Neuron"])
        assert str(tmp_path) not in repr(rows)
    assert str(tmp_path) not in (out / "README.md").read_text()


def test_what_is_no_run_and_what_is_no_repository_is_refused(suite: Suite, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not a run; neuronpedia takes measurements of latents"):
        share.export_to_neuronpedia(str(tmp_path), tmp_path / "out")
    with pytest.raises(FormatError, match='"/home/me" is not a repository on the hub; write user/name'):
        share.export_to_neuronpedia(str(suite.directory.root), tmp_path / "out", repo="/home/me")
    with pytest.raises(FormatError, match="neuronpedia takes features, not SAEs, and none from the hub"):
        share.push_run(str(suite.directory.root), "me/saes", "neuronpedia")
    assert not (tmp_path / "out").exists()
