"""The descent: AdamW under accelerate, resumable at any step with the same bytes.

Batches are a function of seed and step, so that weights, moments and the step are all that a state
holds.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel

from frankenmerge.healing.objective import Batch, Objective
from frankenmerge.healing.state import State, load_state, save_state
from frankenmerge.models.loading import Placement
from frankenmerge.models.teaching import schedule
from frankenmerge.progress import Progress, silent

ROWS = 16
"""Rows of a step, of all domains together."""
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
"""Learning rates that are tried."""
TRIED, WARMUP = 6, 10
"""Steps with each of them; steps in which the rate rises."""
CHECK, PATIENCE = 25, 4
"""Steps between checks, at which the state is saved; checks without a better loss."""
CLIP = 1.0
"""Largest norm of a gradient."""


@dataclass(frozen=True)
class TrainOptions:
    """How parameters are trained."""

    steps: int
    seed: int
    micro: int = ROWS
    """Most rows in one pass; gradients of more are accumulated."""
    checkpointing: bool = False
    """Compute activations again instead of keeping them."""
    offload: bool = False
    """Keep the optimiser, the best weights and activations in the memory of the CPU."""


class Training(NamedTuple):
    """What a training came to; the parameters have the kept weights."""

    rate: float
    steps: int
    """Whose weights are kept."""
    curve: list[tuple[int, float]]
    tokens: int
    """Predicted in these steps."""


@contextmanager
def accelerator_of(placement: Placement) -> Iterator[Accelerator]:
    """The accelerator of this process.

    The library keeps settings for the whole process: those that were not there before are removed
    at the end.
    """
    before = bool(PartialState._shared_state)
    precision = "bf16" if placement.dtype == "bfloat16" else "no"
    try:
        yield Accelerator(cpu=placement.device == "cpu", mixed_precision=precision)
    finally:
        if not before and not torch.distributed.is_initialized():
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def train(
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    objective: Objective,
    stopping_loss: Callable[[], float],
    options: TrainOptions,
    accelerator: Accelerator,
    *,
    kept: Path,
    identity: str,
    progress: Progress = silent,
) -> Training:
    """Train some parameters of a model, and leave in them the weights of the best check.

    Args:
        model: whose other parameters do not change.
        parameters: by any unique names; float32.
        objective: what is minimised.
        stopping_loss: of the model as it is, on tokens that are not trained on.
        options: how.
        accelerator: runs it.
        kept: the file of the state, from which an interrupted training of the same identity
            continues.
        identity: of everything that the result depends on.
        progress: in steps.
    """
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    if options.checkpointing:
        _checkpoint_activations(model)
    prepared = accelerator.prepare_model(model, device_placement=False)
    descent = _Descent(prepared, parameters, objective, options, accelerator)
    found = load_state(kept, identity)
    if found is None:
        state = State(identity, descent.rate_found())
        best = descent.weights()
        state.curve.append((0, _shared_loss(stopping_loss(), accelerator)))
        descent.restart(state.rate)
    else:
        state, tensors = found
        best = descent.restore(state, tensors)
    loss = min(loss for _, loss in state.curve)
    warmup = min(WARMUP, options.steps)
    with progress("healing", options.steps, "steps") as advance:
        advance(state.step)
        while not state.finished:
            descent.rate(state.rate * schedule(state.step, options.steps, warmup))
            descent.step((options.seed, 1), state.step)
            state.step += 1
            advance(1)
            if state.step % CHECK and state.step != options.steps:
                continue
            now = _shared_loss(stopping_loss(), accelerator)
            state.curve.append((state.step, now))
            if now < loss:
                loss, state.kept, state.since = now, state.step, 0
                best = descent.weights()
            else:
                state.since += 1
            state.finished = state.step >= options.steps or state.since >= PATIENCE
            if accelerator.is_main_process:
                save_state(kept, state, descent.tensors(best))
            accelerator.wait_for_everyone()
    descent.put(best)
    model.requires_grad_(False)
    tokens = sum(
        objective.weight(batch)
        for step in range(state.kept)
        for batch in objective.batches((options.seed, 1), step, ROWS)
    )
    return Training(state.rate, state.kept, state.curve, tokens)


class _Descent:
    """Parameters, their optimiser, and single steps."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        objective: Objective,
        options: TrainOptions,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.parameters, self.objective = model, parameters, objective
        self.options, self.accelerator = options, accelerator
        # What the optimiser moves: the parameters, or copies of them on the CPU.
        self.held = dict(parameters)
        if options.offload:
            self.held = {
                name: nn.Parameter(value.detach().to("cpu", copy=True))
                for name, value in parameters.items()
            }
        self.restart(RATES[0])

    def restart(self, rate: float) -> None:
        """Forget the moments."""
        self.adam = torch.optim.AdamW(list(self.held.values()), rate, weight_decay=0.0)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights as they are."""
        return {name: value.detach().clone() for name, value in self.held.items()}

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Go on with these weights."""
        for name, value in weights.items():
            self.held[name].copy_(value)
            self.parameters[name].copy_(value)

    def rate(self, rate: float) -> None:
        """Set the learning rate."""
        for group in self.adam.param_groups:
            group["lr"] = rate

    def rate_found(self) -> float:
        """The rate of `RATES` that lowers the loss most in a few steps; weights are restored."""
        start = self.weights()
        losses = {}
        for rate in RATES:
            self.restart(rate)
            for step in range(TRIED):
                self.step((self.options.seed, 2), step)
            losses[rate] = self._probe()
            self.put(start)
        finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
        return min(finite, key=finite.__getitem__) if finite else RATES[0]

    @torch.no_grad()
    def _probe(self) -> float:
        """The loss on rows that the range test has not trained on."""
        batches = [
            batch
            for step in (TRIED, TRIED + 1)
            for batch in self.objective.batches((self.options.seed, 2), step, ROWS)
        ]
        weight = sum(self.objective.weight(batch) for batch in batches)
        total = sum(float(self.objective.loss(self.model, batch)) for batch in batches)
        return _shared_loss(total / weight, self.accelerator)

    def step(self, seed: Sequence[int], number: int) -> None:
        """One step on the batch of this number; processes share its rows."""
        batches = self.objective.batches(seed, number, ROWS)
        weight = sum(self.objective.weight(batch) for batch in batches)
        mine = list(_pieces(batches, self.options.micro, self.accelerator))
        for value in self.parameters.values():
            value.grad = None
        for place, piece in enumerate(mine):
            last = place == len(mine) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model), self._kept():
                loss = self.objective.loss(self.model, piece.batch) * piece.counts
                # Processes' gradients are averaged, and these losses are parts of one sum.
                (loss * self.accelerator.num_processes / weight).backward()
        if self.options.offload:
            for name, value in self.parameters.items():
                self.held[name].grad = None if value.grad is None else value.grad.to("cpu")
                value.grad = None
        nn.utils.clip_grad_norm_(list(self.held.values()), CLIP)
        self.adam.step()
        if self.options.offload:
            with torch.no_grad():
                for name, value in self.parameters.items():
                    value.copy_(self.held[name])

    def _kept(self) -> AbstractContextManager[Any]:
        """Where activations are kept for the backward pass."""
        if self.options.offload and self.accelerator.device.type != "cpu":
            return torch.autograd.graph.save_on_cpu()
        return nullcontext()

    def tensors(self, best: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Everything that a state holds."""
        made: dict[str, Tensor] = {}
        for name, parameter in self.held.items():
            moments = self.adam.state[parameter]
            made[f"weight {name}"] = parameter
            made[f"mean {name}"] = moments["exp_avg"]
            made[f"square {name}"] = moments["exp_avg_sq"]
            made[f"best {name}"] = best[name]
        return made

    @torch.no_grad()
    def restore(self, state: State, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Continue from a state; returns the kept weights."""
        self.restart(state.rate)
        self.put({name: tensors[f"weight {name}"] for name in self.held})
        for name, parameter in self.held.items():
            self.adam.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": tensors[f"mean {name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"square {name}"].to(parameter.device),
            }
        return {
            name: tensors[f"best {name}"].to(parameter.device)
            for name, parameter in self.held.items()
        }


class _Piece(NamedTuple):
    """What a process computes in one pass."""

    batch: Batch
    counts: bool
    """False where the process has no row left: it runs one that others count."""


def _pieces(batches: Sequence[Batch], micro: int, accelerator: Accelerator) -> Iterator[_Piece]:
    """This process's rows of a step, at most `micro` at a time.

    Every process has equally many pieces, because all wait for each other as often.
    """
    count, own = accelerator.num_processes, accelerator.process_index
    for batch in batches:
        most = -(-len(batch.rows) // count)
        rows = batch.rows[own * most : (own + 1) * most]
        for start in range(0, most, micro):
            piece = rows[start : start + micro]
            counts = len(piece) > 0
            yield _Piece(batch._replace(rows=piece if counts else batch.rows[:1]), counts)


def _shared_loss(loss: float, accelerator: Accelerator) -> float:
    """The first process's, so that all decide alike."""
    if accelerator.num_processes == 1:
        return loss
    shared = torch.tensor(loss, dtype=torch.float32, device=accelerator.device)
    torch.distributed.broadcast(shared, 0)
    return float(shared)


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Compute activations again in the backward pass; nothing is dropped out."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    enable = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.20
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.train()
