"""The steps of the evidence on real models, after those of `make real`.

`python -m evals.real --evidence`. What `docs/prediction.md`, `docs/gain.md` and `docs/heal.md` find
in small donors is measured of SmolLM2 and a fine-tune of it, on fewer splices and tokens.
"""

from pathlib import Path

from evals.real.pipeline import HALF, Folder, frankenmerge_command, module_command, script_command
from evals.real.steps import Step

SPLICES, SEVERAL, RANDOM, CHARACTERS = 60, 20, 60, 1_000
HEALING = 25
"""Steps of healing."""


def evidence(cache: Path, data: Path) -> list[Step]:
    """Every step, in an order in which each finds its inputs."""
    folder = Folder(cache, data)
    base, code = folder.base, folder.tuned["code"]
    atlases = ("--atlas", folder.atlas(base), folder.atlas(code))
    pair = ("--donor-a", base, "--donor-b", code)
    texts = [word for text in folder.text() for word in ("--text", text)]
    short = ("--text", folder.short)
    limits = ("--characters", CHARACTERS, "--context", 256, *HALF, "--json")
    count = ("--splices", SPLICES, "--several", SEVERAL)
    random = ("--depth", 36, "--random", RANDOM, "--no-regret")
    aligned = ("--alignment", folder.pair, *HALF, "--json")
    on = [word for text in folder.training() for word in ("--on", text)]
    judged = [word for text in folder.text()[:2] for word in ("--text", text)]
    how = ("--steps", HEALING, "--control", *HALF, "--json")
    planned, swept = folder.run / "plan.yaml", folder.run / "repeat.sweep.json"
    healed = folder.run / "healed"
    donors, measured = (base, code, *folder.text()), (base, swept, *folder.text())
    steps = [
        Step(
            "prediction",
            script_command("splice_prediction", *pair, *texts, *count, *atlases, *limits),
            donors,
        ),
        Step(
            "quality",
            script_command("plan_quality", *pair, *texts, *random, *atlases, *limits),
            donors,
        ),
        Step(
            "gain",
            script_command("gain", *pair, *short, *aligned),
            (folder.pair, folder.short, *donors),
        ),
        Step(
            "heal",
            frankenmerge_command("heal", planned, healed, *on, *judged, *how),
            (planned, *folder.training(), *donors),
            (healed,),
        ),
        Step(
            "sweep-cost",
            script_command("bench_sweep", "--donor", base, *short, "--every", 10),
            (base, folder.short),
        ),
    ]
    for items in folder.all_items:
        command = module_command("evals.real.repeats", base, swept, "--items", items, *texts, *HALF)
        steps.insert(0, Step("repeats", command, (*measured, items)))
    return steps
