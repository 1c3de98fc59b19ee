"""Tasks of lm-evaluation-harness, run by it on a model that is in memory: a checkpoint's, or a splice that was never written."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import NamedTuple

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from frankenmerge.errors import fail

BATCH = 8
"""Questions that pass the model together on a CPU."""


class TaskFigure(NamedTuple):
    """One figure of one task."""

    task: str
    metric: str
    """As the harness calls it, and the filter behind a comma where there is one: `acc`,
    `exact_match,strict-match`.
    """
    value: float
    stderr: float | None


def stay_offline() -> None:
    """Keep the harness and its data sets from the network; to be called before any of their libraries is imported."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise FrankenmergeError where the harness is not installed or cannot load a task: to be asked before hours of measuring."""
    if find_spec("lm_eval") is None:
        raise fail(
            "--tasks",
            "lm-evaluation-harness",
            "it is not installed",
            "pip install 'frankenmerge[harness]'",
        )
    from lm_eval.config.evaluate_config import EvaluatorConfig  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import get_task_dict  # pyright: ignore[reportMissingImports]

    with _told(tasks):
        if not all(tasks):
            raise ValueError("a task without a name")
        asked = EvaluatorConfig(tasks=list(tasks))
        manager = asked.process_tasks()
        get_task_dict(list(asked.tasks), manager)


@contextmanager
def _told(tasks: Sequence[str]) -> Iterator[None]:
    """The harness's own messages on standard error, and its errors as ours."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):  # it prints its progress
            yield
    except (ValueError, LookupError, TypeError, OSError, AssertionError, yaml.YAMLError) as error:
        told = " ".join(str(error).split()) or repr(error)
        remedy = "name tasks of the harness whose data are at hand (--download fetches them), or YAML files of tasks that fit the model"
        raise fail(
            f"--tasks {' '.join(tasks)}",
            "tasks that the harness can run on this model",
            told,
            remedy,
        ) from error


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], *, seed: int
) -> list[TaskFigure]:
    """Let the harness run tasks, each a name or the path of a task's YAML.

    Raises:
        FrankenmergeError: where it cannot run a task.
    """
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.config.evaluate_config import EvaluatorConfig  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    # Looking for the largest batch pays where batches are run at once.
    size = BATCH if model.device.type == "cpu" else "auto"
    with _told(tasks):
        asked = EvaluatorConfig(tasks=list(tasks))
        manager = asked.process_tasks()
        held = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
        found = lm_eval.simple_evaluate(
            held,
            tasks=list(asked.tasks),
            task_manager=manager,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert found is not None, "the harness tells results to its first process"
    return [
        figure
        for task, figures in sorted(found["results"].items())
        for figure in _figures(task, figures)
    ]


def _figures(task: str, figures: dict) -> list[TaskFigure]:
    told = []
    for key, value in sorted(figures.items()):
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = figures.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else key
            told.append(
                TaskFigure(
                    task,
                    name,
                    float(value),
                    float(error) if isinstance(error, int | float) else None,
                )
            )
    return told
