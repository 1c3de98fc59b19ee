"""Records of what a search found, with the texts of tokens."""

from collections.abc import Sequence
from typing import Any

from frankenmerge.artefacts.features import (
    ExampleRecord,
    FeatureRecord,
    FeaturesFile,
    FrontRecord,
)
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.evaluation.record import library_versions
from frankenmerge.workflows.searches import SearchOptions, SearchResult


def features_file(
    checkpoint: Checkpoint,
    method: str,
    options: SearchOptions,
    result: SearchResult,
    vocabulary: Sequence[str],
    untrained: int | None = None,
) -> FeaturesFile:
    """The file of a search: arguments as for `search`, and its result."""
    return FeaturesFile(
        kind="frankenmerge.features/1",
        donor=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        method=method,
        untrained=untrained,
        context="bos" if options.bos else "plain",
        features=feature_records(result, vocabulary),
        versions=library_versions(),
    )


def feature_records(result: SearchResult, vocabulary: Sequence[str]) -> list[FeatureRecord]:
    """The features of a result, none of an inversion; `vocabulary` is the text of every token."""
    tokens = result.tokens.reshape(-1, result.tokens.shape[-1]).tolist()
    records = []
    for number, feature in enumerate(result.features):
        further: dict[str, Any] = {}
        if result.activations is not None:
            further["activation"] = float(result.activations.flatten()[number])
        if result.fronts is not None:
            further["front"] = [
                FrontRecord(texts=texts_of(point.tokens, vocabulary), **point._asdict())
                for point in result.fronts[number]
            ]
        if result.examples is not None:
            further["examples"] = [
                ExampleRecord(texts=texts_of(example.tokens, vocabulary), **example._asdict())
                for example in result.examples[number]
            ]
        records.append(
            FeatureRecord(
                block=feature.block,
                feature=feature.notation,
                neuron=feature.neuron if len(feature.neurons) == 1 else None,
                tokens=tokens[number],
                texts=texts_of(tokens[number], vocabulary),
                **further,
            )
        )
    return records


def texts_of(tokens: Sequence[int], vocabulary: Sequence[str]) -> list[str]:
    """The texts of tokens; ids beyond the vocabulary are shown as `<id>`."""
    return [vocabulary[token] if token < len(vocabulary) else f"<{token}>" for token in tokens]
