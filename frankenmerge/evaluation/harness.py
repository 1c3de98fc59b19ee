"""Tasks of lm-evaluation-harness, run on a model in memory: of a checkpoint or a splice."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Any, NamedTuple

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from frankenmerge.errors import fail
from frankenmerge.evaluation.item_files import results_of_samples
from frankenmerge.evaluation.items import Item
from frankenmerge.evaluation.paired import ItemResults

BATCH = 8
"""Batch size on a CPU."""


class TaskFigure(NamedTuple):
    """One figure of one task."""

    task: str
    metric: str
    """As the harness names it, with its filter, if any: `acc`, `exact_match,strict-match`."""
    value: float
    stderr: float | None


class TaskResults(NamedTuple):
    """What a model achieves on tasks."""

    figures: list[TaskFigure]
    items: list[ItemResults]
    """Of the metrics that are 0 or 1 for every item."""


def stay_offline() -> None:
    """Keep the harness and its data sets offline; call it before their libraries are imported."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise FrankenmergeError if the harness is not installed or cannot load a task."""
    if find_spec("lm_eval") is None:
        raise fail(
            "--tasks",
            "lm-evaluation-harness",
            "it is not installed",
            "pip install 'frankenmerge[harness]'",
        )
    from lm_eval.config.evaluate_config import EvaluatorConfig  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import get_task_dict  # pyright: ignore[reportMissingImports]

    with _harness_errors(tasks):
        if not all(tasks):
            raise ValueError("a task without a name")
        config = EvaluatorConfig(tasks=list(tasks))
        manager = config.process_tasks()
        get_task_dict(list(config.tasks), manager)


@contextmanager
def _harness_errors(tasks: Sequence[str]) -> Iterator[None]:
    """Print the harness's messages on standard error, and raise its errors as ours."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):  # it prints its progress
            yield
    except (ValueError, LookupError, TypeError, OSError, AssertionError, yaml.YAMLError) as error:
        found = " ".join(str(error).split()) or repr(error)
        remedy = (
            "name tasks of the harness whose data are available (--download fetches them), "
            "or YAML files of tasks that suit the model"
        )
        raise fail(
            f"--tasks {' '.join(tasks)}",
            "tasks that the harness can run on this model",
            found,
            remedy,
        ) from error


def harness_items(task: str) -> list[Item]:
    """The items of a task of multiple choice, as the harness puts them to a model.

    Raises FrankenmergeError for a task that is not of multiple choice, or cannot be loaded.
    """
    check_tasks([task])
    from lm_eval.config.evaluate_config import EvaluatorConfig  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import get_task_dict  # pyright: ignore[reportMissingImports]

    with _harness_errors([task]):
        config = EvaluatorConfig(tasks=[task])
        manager = config.process_tasks()
        (loaded,) = get_task_dict(list(config.tasks), manager).values()
        if getattr(loaded, "OUTPUT_TYPE", None) != "multiple_choice":
            raise ValueError("gains are measured on tasks of multiple choice")
        loaded.build_all_requests(rank=0, world_size=1)
        found: dict[int, list[Any]] = {}
        for request in loaded.instances:
            found.setdefault(request.doc_id, []).append(request)
        items = []
        for requests in found.values():
            choices = loaded.doc_to_choice(requests[0].doc)
            target = loaded.doc_to_target(requests[0].doc)
            answer = choices.index(target) if isinstance(target, str) else int(target)
            chosen = sorted(requests, key=lambda request: request.idx)[: len(choices)]
            contexts, continuations = zip(*(request.args for request in chosen), strict=True)
            items.append(Item(contexts[0], continuations, answer))
    return items


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], *, seed: int
) -> TaskResults:
    """Run tasks, each a name or the path of a task's YAML file.

    Raises:
        FrankenmergeError: for a task that the harness cannot run.
    """
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.config.evaluate_config import EvaluatorConfig  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    # The search for the largest batch only pays on an accelerator.
    size = BATCH if model.device.type == "cpu" else "auto"
    with _harness_errors(tasks):
        config = EvaluatorConfig(tasks=list(tasks))
        manager = config.process_tasks()
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
        found = lm_eval.simple_evaluate(
            wrapped,
            tasks=list(config.tasks),
            task_manager=manager,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert found is not None, "the harness returns results in its first process"
    figures = [
        figure
        for task, figures in sorted(found["results"].items())
        for figure in _figures(task, figures)
    ]
    items = [
        results
        for task, samples in sorted(found["samples"].items())
        for results in results_of_samples(task, samples)
    ]
    return TaskResults(figures, items)


def _figures(task: str, figures: dict) -> list[TaskFigure]:
    rows = []
    for key, value in sorted(figures.items()):
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = figures.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else key
            rows.append(
                TaskFigure(
                    task,
                    name,
                    float(value),
                    float(error) if isinstance(error, int | float) else None,
                )
            )
    return rows
