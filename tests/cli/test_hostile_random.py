"""Random headers and configs are read, or reported as a mistake."""

import json
import shutil
import struct

from conftest import changed
from hostile import stack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BYTES = st.one_of(
    st.binary(max_size=64),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "x"])
                | st.text(max_size=4),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode()),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=BYTES, length=st.none() | st.integers(0, (1 << 64) - 1), rest=st.binary(max_size=16))
def test_any_header_is_read_or_reported(tmp_path, text, length, rest):
    from frankenmerge.errors import FrankenmergeError
    from frankenmerge.storage.safetensors_header import read_header

    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + rest)
    try:
        assert isinstance(read_header(file), dict)
    except FrankenmergeError as error:
        assert str(error)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 1 << 70),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.integers(-1, 9), max_size=5),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    st.just("full_attention"),
)
KEYS = """num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim
vocab_size layer_types rope_theta rope_parameters rope_scaling sliding_window use_sliding_window
max_window_layers tie_word_embeddings model_type no_rope_layers hidden_act rms_norm_eps
num_kv_shared_layers torch_dtype architectures quantization_config""".split()


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3),
    family=st.sampled_from(["llama", "qwen2"]),
)
def test_any_config_is_read_or_reported(tmp_path_factory, donors, changes, family):
    from frankenmerge.artefacts.recipe import Recipe
    from frankenmerge.errors import FrankenmergeError
    from frankenmerge.splicing.stages import resolve_stages

    root = tmp_path_factory.mktemp("odd")
    folder = changed(
        donors["a"], root / "donor", config=lambda config: config | {"model_type": family} | changes
    )
    (root / "scratch").mkdir()
    try:
        resolve_stages([Recipe.model_validate(stack(folder, folder))], root / "scratch")
    except FrankenmergeError as error:
        assert str(error)
    finally:
        shutil.rmtree(root)
