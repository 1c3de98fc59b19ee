"""The steps of the evidence on real models, after those of `make real`.

`python -m evals.real --evidence`. What `docs/prediction.md`, `docs/gain.md` and `docs/heal.md` find
in small donors is measured of SmolLM2 and a fine-tune of it, on fewer splices and tokens.
"""

from pathlib import Path

from evals.real.pipeline import (
    DEPTH,
    HALF,
    Folder,
    align_step,
    analyze_step,
    frankenmerge_command,
    module_command,
    repeated,
    script_command,
)
from evals.real.steps import Step

SPLICES, SEVERAL, RANDOM, CHARACTERS = 60, 20, 60, 1_000
GAIN_CHARACTERS = 4_000
"""Of each text that gains are measured on."""
CHECKED = 6_000
"""Tokens of each text on which the best window of the sweep is measured again."""
HEALING = 25
"""Steps of healing."""


def evidence(cache: Path, data: Path) -> list[Step]:
    """Every step, in an order in which each finds its inputs."""
    folder = Folder(cache, data)
    base, code, prose = folder.base, folder.tuned["code"], folder.tuned["prose"]
    atlases = ("--atlas", folder.atlas(base), folder.atlas(code))
    pair = ("--donor-a", base, "--donor-b", code)
    texts = repeated("--text", folder.text())
    limits = ("--characters", CHARACTERS, "--context", 256, *HALF, "--json")
    count = ("--splices", SPLICES, "--several", SEVERAL)
    random = ("--depth", DEPTH, "--random", RANDOM, "--no-regret")
    gains = (*texts, "--characters", GAIN_CHARACTERS, *HALF, "--json")
    tuned = ("--donor-a", code, "--donor-b", prose, "--base", base)
    other, other_atlas = folder.other, cache / "gemma.atlas.safetensors"
    both = folder.run / "tuned.alignment.safetensors"
    alone, itself = folder.run / "alone.yaml", folder.run / "itself.alignment.safetensors"

    def prediction(name: str, a: Path, b: Path, *files: Path) -> Step:
        options = ("--donor-a", a, "--donor-b", b, "--atlas", *files)
        command = script_command("splice_prediction", *options, *texts, *count, *limits)
        return Step(name, command, (a, b, *files, *folder.text()))

    on, judged = repeated("--on", folder.training()), repeated("--text", folder.text()[:2])
    how = ("--steps", HEALING, "--control", *HALF, "--json")
    planned, swept = folder.run / "plan.yaml", folder.run / "repeat.sweep.json"
    healed, scaled = folder.run / "healed", folder.run / "scaled.yaml"
    scales = ("--sweep", "--scale", 0.1, "--scale", 0.5, "--on", folder.short)
    donors, measured = (base, code, *folder.text()), (base, swept, *folder.text())
    steps = [
        prediction("prediction-itself", base, base, folder.atlas(base), folder.atlas(base)),
        prediction("prediction", base, code, folder.atlas(base), folder.atlas(code)),
        analyze_step("analyze-gemma", other, other_atlas),
        prediction("prediction-gemma", other, other, other_atlas, other_atlas),
        Step(
            "plan-itself",
            frankenmerge_command("plan", itself, "--depth", DEPTH, "-o", alone),
            (itself,),
            (alone,),
        ),
        Step(
            "evaluate-itself",
            frankenmerge_command("evaluate", planned, alone, base, *folder.measured_text()),
            (planned, alone, *donors),
        ),
        Step(
            "quality",
            script_command("plan_quality", *pair, *texts, *random, *atlases, *limits),
            donors,
        ),
        Step(
            "gain",
            script_command("gain", *pair, "--alignment", folder.pair, *gains),
            (folder.pair, *donors),
        ),
        analyze_step("analyze-prose", prose, folder.atlas(prose)),
        align_step("align-tuned", folder.atlas(code), folder.atlas(prose), both),
        Step(
            "gain-tuned",
            script_command("gain", *tuned, "--alignment", both, *gains),
            (both, prose, *donors),
        ),
        Step(
            "heal",
            frankenmerge_command("heal", planned, healed, *on, *judged, *how),
            (planned, *folder.training(), *donors),
            (healed,),
        ),
        Step(
            "sweep-scales",
            frankenmerge_command("plan", base, *scales, *HALF, "-o", scaled),
            (base, folder.short),
            (scaled,),
        ),
        Step(
            "sweep-check",
            frankenmerge_command("evaluate", scaled, base, *texts, "--tokens", CHECKED, *HALF),
            (scaled, base, *folder.text()),
        ),
        Step(
            "sweep-cost",
            script_command("bench_sweep", "--donor", base, "--text", folder.short, "--every", 10),
            (base, folder.short),
        ),
    ]
    for items in folder.all_items:
        command = module_command("evals.real.repeats", base, swept, "--items", items, *texts, *HALF)
        steps.insert(0, Step("repeats", command, (*measured, items)))
    return steps
