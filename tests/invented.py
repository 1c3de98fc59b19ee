"""Invented results in the format that commands write, for tests of what reads them."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from frankenmerge.artefacts.alignment import Alignment, Score

RECIPE = """\
merge_method: passthrough
slices:
  - sources: [{model: x/one, layer_range: [0, 4]}]
  - sources: [{model: y/two, layer_range: [2, 5]}]
  - sources: [{model: x/one, layer_range: [4, 6]}]
"""
TEXTS = ("texts/code.txt", "texts/prose.txt")


def evaluation(
    recipe: str = "recipe.yaml",
    donors: tuple[str, ...] = ("donors/code", "donors/prose"),
    blocks: int = 12,
) -> dict[str, Any]:
    """An evaluation of one recipe and its donors, every number invented."""
    return {
        "kind": "frankenmerge.evaluation/1",
        "models": [
            _model(recipe, "recipe", 1.802),
            *(_model(name, "donor", 1.72 + 0.005 * n) for n, name in enumerate(donors)),
        ],
        "differences": [
            {
                "model": recipe,
                "donor": name,
                "bits_per_byte": 0.08 - 0.1 * n,
                "interval": [0.06 - 0.11 * n, 0.11 - 0.09 * n],
                "texts": {text: {"bits_per_byte": 0.1, "interval": [0.05, 0.15]} for text in TEXTS},
            }
            for n, name in enumerate(donors)
        ],
        "seams": [
            {"model": recipe, "blocks": [_block(number, donors) for number in range(1, blocks + 1)]}
        ],
        "retention": [_retention(recipe, donors, n, blocks) for n in range(len(donors))],
        "tasks": [
            {"model": name, "task": "invented_task", "metric": "acc", "value": 0.4, "stderr": 0.02}
            for name in (recipe, *donors)
        ],
        "task_differences": [
            {
                "model": recipe,
                "donor": name,
                "task": "invented_task",
                "metric": "acc",
                "items": 400,
                "accuracy": 0.4,
                "donor_accuracy": 0.4 + 0.05 * n,
                "difference": -0.05 * n,
                "interval": [-0.04 - 0.05 * n, 0.04 - 0.05 * n],
                "only_model": 30,
                "only_donor": 30 + 20 * n,
                "p": 1 - 0.967 * n,
                "p_holm": 1 - 0.934 * n,
            }
            for n, name in enumerate(donors)
        ],
        "predictions": [
            {
                "recipe": recipe,
                "predicted": 0.136,
                "low": 0.077,
                "high": 0.234,
                "measured": 0.139,
                "held": True,
            }
        ],
        "gains": [
            {
                "recipe": recipe,
                "predicted": 0.052,
                "predicted_interval": [0.041, 0.063],
                "on": list(donors),
                "best_donor": donors[0],
                "measured": 0.0331,
                "measured_interval": [0.021, 0.047],
            }
        ],
        "comparison": None,
        "dtype": "float32",
        "context": 512,
        "texts": [
            {"path": text, "sha256": hashlib.sha256(text.encode()).hexdigest(), "bytes": 12_000}
            for text in TEXTS
        ],
        "provenance": _origin(recipe, donors),
    }


def _retention(recipe: str, donors: tuple[str, ...], n: int, blocks: int) -> dict[str, Any]:
    return {
        "model": recipe,
        "donor": donors[n],
        "blocks": [
            {
                "block": number,
                "donor_block": _donor_block(number),
                "kept": round(0.6 * math.exp(-number / 9), 3),
            }
            for number in range(1, blocks + 1)
            if (number in (8, 9)) == n
        ],
        "kept": 0.3 - 0.1 * n,
        "chance": 0.01,
    }


def _origin(recipe: str, donors: tuple[str, ...]) -> dict[str, Any]:
    return {
        "arguments": {"models": [recipe], "text": list(TEXTS)},
        "seed": 0,
        "reference_words": 812,
        "versions": {"frankenmerge": "0.1.0", "torch": "2.13.0+cpu"},
        "models": {name: {"fingerprint": "0123456789abcdef", "revision": None} for name in donors},
        "recipes": {recipe: "f" * 64},
    }


def _loss(bits: float) -> dict[str, Any]:
    return {
        "bits_per_byte": bits,
        "perplexity": math.exp(bits * 1.73),
        "nats_per_token": bits * 1.73,
        "accuracy": 0.41,
        "tokens": 4807,
        "bytes": 12_000,
        "intervals": {
            "bits_per_byte": [bits - 0.03, bits + 0.03],
            "nats_per_token": [bits * 1.73 - 0.05, bits * 1.73 + 0.05],
            "accuracy": [0.39, 0.43],
        },
    }


def _model(name: str, role: str, bits: float) -> dict[str, Any]:
    samples = [
        {
            "prompt": "def read(path):",
            "text": "\n    with open(path) as file:\n        return file.raed()\n",
            "invalid": ["raed"] if role == "recipe" else [],
        },
        {
            "prompt": "The function returns",
            "text": " a list of the modules that were impotred, or None if there are none.",
            "invalid": ["impotred"],
        },
    ]
    return {
        "name": name,
        "role": role,
        **_loss(bits),
        "texts": {text: _loss(bits + 0.06 * n) for n, text in enumerate(TEXTS)},
        "invalid_words": 0.021,
        "repetition": 0.3,
        "samples": samples,
    }


def _donor_block(number: int) -> int:
    return number - 1 if number < 8 else number - 5


def _block(number: int, donors: tuple[str, ...]) -> dict[str, Any]:
    second = number in (8, 9)
    return {
        "block": number,
        "donor": donors[second],
        "donor_block": _donor_block(number),
        "seam": number in (8, 10),
        "norm_ratio": 1 + 0.2 * (number > 7) - 0.01 * number,
        "cosine": {
            name: round(0.98 - 0.03 * number * (1 + 0.3 * n), 3) for n, name in enumerate(donors)
        },
        "kl": {
            name: round(0.1 + 0.05 * number * (1 + 0.3 * n) + 0.4 * (number > 7), 3)
            for n, name in enumerate(donors)
        },
        "kl_alone": 0.1,
    }


def alignment(
    blocks: tuple[int, int],
    width: int = 8,
    vocabulary: list[str] | None = None,
    donors=("x/one", "y/two"),
) -> Alignment:
    """An alignment of two donors of any depth, with random scores."""
    generator = np.random.default_rng(0)
    shape = blocks[0] + 1, blocks[1] + 1
    vocabulary = vocabulary or [f"token{number}" for number in range(50)]

    def score(nulls: tuple[str, ...], detailed: bool) -> Score:
        detail = generator.random((*shape, width if detailed else 0)).astype(np.float16)
        matrix = generator.random(shape, dtype=np.float32)
        return Score(
            matrix,
            {null: matrix / 10 for null in nulls},
            detail,
            np.stack([matrix - 0.05, matrix + 0.05]),
        )

    permuted = ("permuted_neurons", "permuted_probes")
    scores = {
        "jaccard": score(permuted, True),
        "argmax": score(permuted, True),
        "correlation": score((*permuted, "residual_law"), True),
        "rank_correlation": score(permuted, True),
        "cka": score(permuted[1:], False),
        "neighbours": score(permuted[1:], False),
        "angular": score(permuted, False),
        "relative_error": score(permuted, False),
        "norm_ratio": score(permuted[1:], False),
        "distance": score((), False),
    }
    tokens = tuple(
        generator.integers(0, len(vocabulary), (count, width, 10), dtype=np.int32)
        for count in shape
    )
    return Alignment(
        donors,
        ("f" * 32, "e" * 32),
        (width, width),
        scores,
        tokens,
        vocabulary,
        {"context": "plain"},
    )


def evidence(
    donors=("x/one", "y/two"), tokens=(" a", " b"), seams=((3, 2), (4, 4))
) -> dict[str, Any]:
    """The evidence of a plan; seams lead from block `i` of one donor to block `j` of the other."""
    seam_records = [
        {
            "after": {"model": donors[n % 2], "block": i},
            "before": {"model": donors[1 - n % 2], "block": j},
            "cost": 0.2,
            "skipped_blocks": j - i - 1,
            "by_chance": n == 1,
            "gauged": False,
            "scores": {"jaccard": 0.3, "distance": -2.0},
            "nulls": {
                "jaccard": {"permuted_neurons": 0.01, "permuted_probes": 0.02},
                "distance": {},
            },
            "agree": [
                {
                    "neuron": 1,
                    "scores": {"jaccard": 0.9},
                    "tokens": [list(tokens), list(tokens)],
                    "shared": list(tokens),
                }
            ],
            "disagree": [
                {"neuron": 2, "scores": {}, "tokens": [list(tokens), ["other"]], "shared": []}
            ],
        }
        for n, (i, j) in enumerate(seams)
    ]
    plan = {
        "recipe": {},
        "summary": "one[0:4] two[2:5] one[4:6]",
        "depth": 9,
        "predicted_damage": 0.2,
        "interval": [0.1, 0.4],
        "basis": "scores",
        "seams": seam_records,
    }
    return {
        "plans": [plan],
        "constraints": {"depth": 9, "max_seams": 4},
        "model": {
            "intercept": -3.0,
            "weights": {"final": 1.5, "kept": 0.5},
            "spread": [-0.6, 0.9],
            "drawn_spread": [-0.4, 0.5],
            "origin": {"seed": 0},
        },
    }


def gain(donors=("x/one", "y/two"), low: float = 0.03) -> dict[str, Any]:
    """A search for a gain: two plans and the controls."""
    weights = ((0.4, 0.6), (0.25, 0.75))

    def control(gain: float) -> dict[str, Any]:
        return {"nats": 2.9 - gain, "gain": gain, "interval": [gain - 0.02, gain + 0.02]}

    return {
        "kind": "frankenmerge.gain/1",
        "plans": [
            {
                "recipe": {},
                "summary": " + ".join(
                    f"{weight:.2f} {Path(name).name}"
                    for weight, name in zip(pair, donors, strict=True)
                ),
                "key": f"{number}" * 32,
                "kind": "average",
                "gain": 0.05 - 0.01 * number,
                "interval": [low - 0.01 * number, 0.07],
                "captured_share": 0.625,
                "domains": {name: 0.02 for name in donors},
            }
            for number, pair in enumerate(weights)
        ],
        "controls": {
            "best_donor": {"name": donors[0], "nats": 2.9},
            "average": control(0.045),
            "ensemble": control(0.08),
        },
        "confirmed": low > 0,
        "on": list(donors),
        "tokens": 12_192,
        "candidates": 83,
        "passes": 36,
        "seed": 0,
        "versions": {"frankenmerge": "0.2.0", "torch": "2.13.0+cpu"},
    }


def sweep(donor: str = "x/one", blocks: int = 6) -> dict[str, Any]:
    """A sweep in which late windows gain a little and early ones lose much."""
    windows = [
        {
            "start": start,
            "stop": stop,
            "scale": scale,
            "gain": 0.01 * start / blocks - scale * 0.2 * (stop - start) / (1 + start) ** 2,
            "error": 0.002,
        }
        for scale in (0.1, 1.0)
        for start in range(blocks)
        for stop in range(start + 1, blocks + 1)
    ]
    best = sorted(windows, key=lambda window: -window["gain"])[:2]
    return {
        "kind": "frankenmerge.sweep/1",
        "donor": donor,
        "fingerprint": "f" * 32,
        "blocks": blocks,
        "nats": 2.9,
        "scales": [0.1, 1.0],
        "windows": windows,
        "confirmed": [
            {key: window[key] for key in ("start", "stop", "scale")}
            | {"selected": window["gain"], "gain": 0.004, "interval": [0.001 - 0.002 * n, 0.007]}
            for n, window in enumerate(best)
        ],
        "on": ["code.txt"],
        "tokens": 4_000,
        "seed": 0,
        "versions": {"frankenmerge": "0.2.0", "torch": "2.13.0+cpu"},
    }


def write(path: Path, value: Any) -> Path:
    """Write JSON."""
    path.write_text(json.dumps(value))
    return path


def write_run(
    path: Path, tokens: tuple[str, ...] = (" a", " b"), blocks: tuple[int, int] = (6, 6)
) -> Path:
    """Write a run's folder; its vocabulary begins with `tokens`."""
    from frankenmerge.artefacts.alignment import save_alignment

    path.mkdir()
    (path / "recipe.yaml").write_text(RECIPE)
    vocabulary = [*tokens, *(f"token{number}" for number in range(40))]
    save_alignment(alignment(blocks, vocabulary=vocabulary), path / "ab.alignment.safetensors")
    write(path / "recipe.evidence.json", evidence(tokens=(tokens[0], tokens[-1])))
    write(path / "evaluation.json", evaluation(donors=("x/one", "y/two"), blocks=9))
    write(path / "best.gain.json", gain())
    write(path / "one.sweep.json", sweep())
    return path


def provenance() -> dict[str, Any]:
    """The provenance of a merge with a copied, a rotated and an averaged tensor."""
    averaged = [
        {"donor": name, "tensor": "model.norm.weight", "parameters": {"weight": weight}}
        for name, weight in (("x/one", 0.5), ("y/two", 1))
    ]
    return {
        "frankenmerge": "0.1.0",
        "versions": {"python": "3.11.2", "numpy": "2.1.0"},
        "arithmetic": ["numpy"],
        "recipe_sha256": "a" * 64,
        "files": {"config.json": "b" * 64},
        "donors": {"x/one": {"fingerprint": "f" * 32}, "y/two": {"fingerprint": "e" * 32}},
        "shards": {
            "model.safetensors": {"bytes": 100, "header_sha256": "c" * 64, "sha256": "d" * 64},
            "other.safetensors": {"bytes": 100, "header_sha256": "c" * 64},
        },
        "tensors": {
            "lm_head.weight": {"donor": "x/one", "tensor": "lm_head.weight", "method": "copy"},
            "model.layers.4.mlp.up_proj.weight": {
                "donor": "y/two",
                "tensor": "model.layers.2.mlp.up_proj.weight",
                "method": "rotate",
                "slice": 1,
                "place": 0,
                "gain": "model.layers.2.post_attention_layernorm.weight",
            },
            "model.norm.weight": {
                "method": "linear",
                "parameters": {"normalize": True, "n": 1},
                "seed": 7,
                "inputs": averaged,
                "base": {**averaged[0], "rows_of": ["x/one"]},
            },
        },
        "gauges": {
            "1": {"rotation": "1" * 32, "scale": 1.5, "held_out_r2": 0.5, "refined": ["2" * 32]}
        },
        "texts": {"corpus.txt": "3" * 64},
    }
