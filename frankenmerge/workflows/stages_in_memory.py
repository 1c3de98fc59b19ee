"""Stages of a recipe file made in memory, for recipes that are run without being written."""

import json
from contextlib import ExitStack

from frankenmerge.donors.checkpoint import SINGLE_NAME, Checkpoint
from frankenmerge.merging.copying import write_fully
from frankenmerge.merging.shards import plan_shards
from frankenmerge.splicing.computing import Computation, computed, open_files
from frankenmerge.splicing.gauge_fitting import fitted_rotations
from frankenmerge.splicing.operations import Copy
from frankenmerge.splicing.reading import read_stretch
from frankenmerge.splicing.resolve import Splice
from frankenmerge.storage.safetensors_header import read_header
from frankenmerge.storage.scratch import file_in_memory, scratch_folder, write_files


def make_in_memory(splice: Splice, closing: ExitStack) -> Checkpoint:
    """Execute a stage into a checkpoint whose weights are in memory, until `closing` is closed."""
    folder = closing.enter_context(scratch_folder())
    small = {"config.json": json.dumps(splice.config).encode(), **splice.tokenizer}
    if splice.generation_config is not None:
        small["generation_config.json"] = splice.generation_config
    write_files(folder, small)
    (shard,) = plan_shards(splice.operations, splice.bytes)
    path = folder / SINGLE_NAME
    target = closing.enter_context(file_in_memory(path))
    write_fully(target, shard.header, 0)
    fits = fitted_rotations(splice) if splice.has_gauges else {}
    with open_files() as files:
        how = Computation(files, fits)
        for operation, position in shard.places:
            if isinstance(operation, Copy):
                tensor = operation.tensor
                whole = memoryview(read_stretch(files, tensor, 0, tensor.bytes))
                write_fully(target, whole, position)
                continue
            for chunk in computed(operation, how):
                write_fully(target, chunk, position)
                position += len(chunk)
    name = f"{splice.recipe.name} #{splice.key[:8]}"
    return Checkpoint(name, folder, splice.config, read_header(path))
