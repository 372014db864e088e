"""What Neuronpedia's importer takes, written down from its sources at commit ebb8426 (20 August 2026).

Columns are those of apps/webapp/prisma/schema.prisma, and how files are read is in
apps/webapp/app/api/admin/import/route.ts and apps/webapp/lib/db/import.ts. Columns that hold only
what the web application itself adds later (umaps, votes, embeddings) are left out.
"""

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple


class Column(NamedTuple):
    """One column of a table."""

    type: str
    """string, int, float, bool or json; with [] for a list of them."""
    required: bool = False
    """Whether a row must have it: it is neither nullable nor has it a default."""
    nullable: bool = False


def must(type: str) -> Column:
    return Column(type, required=True)


def may(type: str) -> Column:
    """Not nullable, but with a default."""
    return Column(type)


def null(type: str) -> Column:
    return Column(type, nullable=True)


TABLES: dict[str, dict[str, Column]] = {
    "SourceRelease": {
        "name": must("string"), "description": must("string"), "creatorName": must("string"),
        "creatorId": must("string"), "visibility": may("string"), "isNewUi": may("bool"), "featured": may("bool"),
        "descriptionShort": null("string"), "urls": may("string[]"), "creatorEmail": null("string"),
        "creatorNameShort": null("string"), "defaultSourceSetName": null("string"), "defaultSourceId": null("string"),
        "defaultUmapSourceIds": may("string[]"), "createdAt": may("string"),
    },
    "Model": {
        "id": must("string"), "creatorId": must("string"), "layers": must("int"), "neuronsPerLayer": must("int"),
        "owner": must("string"), "displayNameShort": may("string"), "displayName": may("string"),
        "tlensId": null("string"), "openRouterId": null("string"), "dimension": null("int"), "thinking": may("bool"),
        "visibility": may("string"), "defaultSourceSetName": null("string"), "defaultSourceId": null("string"),
        "defaultGraphSourceSetName": null("string"), "inferenceEnabled": may("bool"), "instruct": may("bool"),
        "createdAt": may("string"), "updatedAt": may("string"), "website": null("string"),
    },
    "SourceSet": {
        "modelId": must("string"), "name": must("string"), "description": must("string"),
        "creatorName": must("string"), "creatorId": must("string"), "hasDashboards": may("bool"),
        "allowInferenceSearch": may("bool"), "visibility": may("string"), "type": may("string"),
        "urls": may("string[]"), "creatorEmail": null("string"), "releaseName": null("string"),
        "hasGraphs": may("bool"), "graphEnabled": may("bool"), "similarityMatrixEnabled": may("bool"),
        "defaultOfModelId": null("string"), "defaultGraphModelId": null("string"), "defaultRange": may("int"),
        "defaultShowBreaks": may("bool"), "showDfa": may("bool"), "showCorrelated": may("bool"),
        "showHeadAttribution": may("bool"), "showUmap": may("bool"), "createdAt": may("string"),
    },
    "Source": {
        "id": must("string"), "modelId": must("string"), "setName": must("string"), "creatorId": must("string"),
        "hasDashboards": may("bool"), "inferenceEnabled": may("bool"), "saelensRelease": null("string"),
        "saelensSaeId": null("string"), "hfRepoId": null("string"), "hfFolderId": null("string"),
        "visibility": may("string"), "defaultOfModelId": null("string"), "hasUmap": may("bool"),
        "hasUmapLogSparsity": may("bool"), "hasUmapClusters": may("bool"), "num_prompts": null("int"),
        "num_tokens_in_prompt": null("int"), "dataset": null("string"), "notes": null("string"),
        "cosSimMatchModelId": null("string"), "cosSimMatchSourceId": null("string"), "createdAt": may("string"),
    },
    "Neuron": {
        "modelId": must("string"), "layer": must("string"), "index": must("string"), "sourceSetName": null("string"),
        "creatorId": null("string"), "createdAt": may("string"), "maxActApprox": null("float"),
        "hasVector": may("bool"), "vector": may("float[]"), "vectorLabel": null("string"),
        "vectorDefaultSteerStrength": null("float"), "hookName": null("string"), "topkCosSimIndices": may("int[]"),
        "topkCosSimValues": may("float[]"), "neuron_alignment_indices": may("int[]"),
        "neuron_alignment_values": may("float[]"), "neuron_alignment_l1": may("float[]"),
        "correlated_neurons_indices": may("int[]"), "correlated_neurons_pearson": may("float[]"),
        "correlated_neurons_l1": may("float[]"), "correlated_features_indices": may("int[]"),
        "correlated_features_pearson": may("float[]"), "correlated_features_l1": may("float[]"),
        "neg_str": may("string[]"), "neg_values": may("float[]"), "pos_str": may("string[]"),
        "pos_values": may("float[]"), "frac_nonzero": may("float"), "freq_hist_data_bar_heights": may("float[]"),
        "freq_hist_data_bar_values": may("float[]"), "logits_hist_data_bar_heights": may("float[]"),
        "logits_hist_data_bar_values": may("float[]"), "decoder_weights_dist": may("float[]"),
    },
    "Activation": {
        "id": must("string"), "tokens": must("string[]"), "index": must("string"), "layer": must("string"),
        "modelId": must("string"), "maxValue": must("float"), "maxValueTokenIndex": must("int"),
        "minValue": must("float"), "values": must("float[]"), "creatorId": must("string"),
        "dataIndex": null("string"), "dataSource": null("string"), "dfaValues": may("float[]"),
        "dfaTargetIndex": null("int"), "dfaMaxValue": null("float"), "zQIndices": may("int[]"),
        "zKIndices": may("int[]"), "zValues": may("float[]"), "createdAt": may("string"),
        "lossValues": may("float[]"), "logitContributions": null("string"), "binMin": null("float"),
        "binMax": null("float"), "binContains": null("float"), "qualifyingTokenIndex": null("int"),
    },
    "Explanation": {
        "id": must("string"), "modelId": must("string"), "layer": must("string"), "index": must("string"),
        "description": must("string"), "authorId": must("string"), "triggeredByUserId": null("string"),
        "notes": null("string"), "scoreV1": may("float"), "scoreV2": null("float"), "typeName": null("string"),
        "explanationModelName": null("string"), "createdAt": may("string"), "updatedAt": may("string"),
    },
}  # fmt: skip

SMALL_FILES = {"release": "SourceRelease", "model": "Model", "sourceset": "SourceSet", "source": "Source"}
"""Plain JSON lines; a row is made by the database's client, which refuses a column it does not know."""
BATCHED_FILES = {"features": "Neuron", "activations": "Activation", "explanations": "Explanation"}
"""Folders of gzipped JSON lines, names ending in .jsonl.gz; explanations must be named batch-<n>.jsonl.gz."""
VISIBILITIES = ("PUBLIC", "UNLISTED", "PRIVATE")
SEEDED_USER = "clkht01d40000jv08hvalcvly"
"""The user that every database is seeded with, to whom records refer."""


def read_upload(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of a source's folder by table, checked one by one."""
    rows = {}
    for name, table in SMALL_FILES.items():
        rows[table] = _rows((folder / f"{name}.jsonl").read_bytes(), table)
    for name, table in BATCHED_FILES.items():
        rows[table] = []
        for path in sorted((folder / name).glob("*")):
            assert path.name.startswith("batch-") and path.name.endswith(".jsonl.gz")
            rows[table] += _rows(gzip.decompress(path.read_bytes()), table)
    _check_references(rows)
    return rows


def _rows(content: bytes, table: str) -> list[dict[str, Any]]:
    """The rows of a file; the importer reads the columns from the first line, and fails without one."""
    lines = content.decode("utf-8").splitlines()
    assert lines, f"{table}: an empty file"
    rows = [json.loads(line) for line in lines]
    for row in rows:
        assert row.keys() == rows[0].keys(), f"{table}: lines with different columns"
        _check_row(row, table)
    return rows


def _check_row(row: dict[str, Any], table: str) -> None:
    columns = TABLES[table]
    unknown = row.keys() - columns.keys()
    missing = {name for name, column in columns.items() if column.required} - row.keys()
    assert not unknown and not missing, f"{table}: unknown {unknown}, missing {missing}"
    for name, value in row.items():
        column = columns[name]
        if value is None:
            assert column.nullable, f"{table}.{name} is null"
            continue
        items = value if column.type.endswith("[]") else [value]
        assert isinstance(items, list)
        for item in items:
            assert _fits(item, column.type.removesuffix("[]")), f"{table}.{name} = {item!r} is no {column.type}"
    assert row.get("visibility", "PUBLIC") in VISIBILITIES
    assert row.get("creatorId", row.get("authorId")) == SEEDED_USER


def _fits(item: object, type: str) -> bool:
    if type == "string":
        # jsonb refuses zero bytes, and halves of UTF-16 pairs
        return isinstance(item, str) and "\0" not in item and not any(0xD800 <= ord(c) <= 0xDFFF for c in item)
    if type == "bool":
        return isinstance(item, bool)
    if type == "int":
        return isinstance(item, int) and not isinstance(item, bool)
    return isinstance(item, int | float) and not isinstance(item, bool) and abs(item) < float("inf")


def _check_references(rows: dict[str, list[dict[str, Any]]]) -> None:
    """What foreign keys and unique ones demand."""
    (release,), (model,), (source_set,), (source,) = (rows[table] for table in SMALL_FILES.values())
    assert source_set["releaseName"] == release["name"]
    assert source_set["modelId"] == source["modelId"] == model["id"]
    assert source["setName"] == source_set["name"]
    layer, _, rest = source["id"].partition("-")
    assert layer.isdecimal() and rest.split("__")[0] == source_set["name"]

    indices = [row["index"] for row in rows["Neuron"]]
    assert len(set(indices)) == len(indices)
    for table in ("Neuron", "Activation", "Explanation"):
        for row in rows[table]:
            assert (row["modelId"], row["layer"]) == (model["id"], source["id"]) and row["index"] in indices
    for table in ("Activation", "Explanation"):
        ids = [row["id"] for row in rows[table]]
        assert len(set(ids)) == len(ids)
