"""Recipes in the structures in which people publish them for mergekit, on tiny donors.

Each is merged by the command line and loaded by transformers: every weight is there, and the model
computes finite logits.
"""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_donor
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPES = {
    "slerp with t by filter": """
        slices:
          - sources:
              - {model: A, layer_range: [0, 4]}
              - {model: B, layer_range: [0, 4]}
        merge_method: slerp
        base_model: A
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - {value: 0.5}
        dtype: bfloat16
        """,
    "slerp with filters of the whole model": """
        slices:
          - sources:
              - {model: A, layer_range: [0, 4]}
              - {model: B, layer_range: [0, 4]}
        merge_method: slerp
        base_model: A
        parameters:
          t:
            - {filter: lm_head, value: [0.55]}
            - {filter: embed_tokens, value: [0.7]}
            - {filter: self_attn, value: [0.65, 0.35]}
            - {filter: mlp, value: [0.35, 0.65]}
            - {filter: layernorm, value: [0.4, 0.6]}
            - {filter: modelnorm, value: [0.6]}
            - {value: 0.5}
          embed_slerp: true
        dtype: float32
        """,
    "slerp of models": """
        models: [{model: A}, {model: B}]
        merge_method: slerp
        base_model: A
        dtype: bfloat16
        parameters: {t: [0, 0.5, 1, 0.5, 0]}
        """,
    "dare_ties": """
        models:
          - model: A
          - {model: B, parameters: {density: 0.53, weight: 0.4}}
          - {model: C, parameters: {density: 0.53, weight: 0.3}}
        merge_method: dare_ties
        base_model: A
        parameters: {int8_mask: true}
        dtype: bfloat16
        random_seed: 0
        """,
    "dare_linear": """
        models:
          - {model: B, parameters: {weight: 0.6, density: 0.5}}
          - {model: C, parameters: {weight: 0.4, density: 0.5}}
        merge_method: dare_linear
        base_model: A
        parameters: {normalize: true, int8_mask: 1.0}
        dtype: float16
        tokenizer_source: base
        """,
    "ties": """
        models:
          - model: A
          - {model: B, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
          - model: C
            parameters:
              density: 0.5
              weight: [0, 0.3, 0.7, 1]
          - model: C
            parameters:
              density: 0.33
              weight: [{filter: mlp, value: 0.5}, {value: 0}]
        merge_method: ties
        base_model: A
        parameters: {normalize: true, int8_mask: true}
        dtype: float16
        """,
    "model_stock": """
        models: [{model: B}, {model: C}]
        base_model: A
        merge_method: model_stock
        parameters: {normalize: true, filter_wise: false, int8_mask: true}
        dtype: bfloat16
        tokenizer: {source: base}
        """,
    "passthrough stack": """
        slices:
          - sources: [{model: A, layer_range: [0, 3]}]
          - sources: [{model: B, layer_range: [1, 4]}]
        merge_method: passthrough
        dtype: bfloat16
        """,
    "passthrough of one model": """
        dtype: bfloat16
        merge_method: passthrough
        slices:
          - sources:
              - layer_range: [0, 3]
                model: A
          - sources:
              - layer_range: [1, 4]
                model: A
        """,
    "passthrough with scaled copies": """
        slices:
          - sources: [{model: A, layer_range: [0, 3]}]
          - sources:
              - model: A
                layer_range: [1, 3]
                parameters:
                  scale:
                    - {filter: o_proj, value: 0.0}
                    - {filter: down_proj, value: 0.0}
                    - {value: 1.0}
          - sources: [{model: A, layer_range: [3, 4]}]
        merge_method: passthrough
        dtype: bfloat16
        """,
    "a pruned model": """
        slices:
          - sources: [{model: A, layer_range: [0, 1]}]
          - sources: [{model: A, layer_range: [3, 4]}]
        merge_method: passthrough
        dtype: float16
        """,
    "task_arithmetic": """
        base_model: A
        models:
          - {model: B, parameters: {weight: 0.5}}
          - {model: C, parameters: {weight: -0.3}}
        merge_method: task_arithmetic
        dtype: float64
        parameters: {normalize: false, residual_weight: 0.5}
        """,
    "breadcrumbs_ties": """
        models:
          - {model: B, parameters: {weight: 0.5, density: 0.9, gamma: 0.01}}
          - {model: C, parameters: {weight: 0.5, density: 0.9, gamma: 0.01}}
        merge_method: breadcrumbs_ties
        base_model: A
        dtype: bfloat16
        """,
    "breadcrumbs": """
        models:
          - {model: B, parameters: {weight: 0.7}}
          - {model: C, parameters: {weight: 0.2}}
        base_model: {model: {path: A}, override_architecture: null}
        merge_method: breadcrumbs
        parameters: {density: 0.8, gamma: 0.02, normalize: false}
        dtype: float32
        out_dtype: bfloat16
        """,
    "della": """
        models:
          - {model: B, parameters: {density: 0.5, weight: 0.6, epsilon: 0.1}}
          - {model: C, parameters: {density: 0.6, weight: 0.4, epsilon: 0.15}}
        merge_method: della
        base_model: A
        parameters: {epsilon: 0.05, lambda: 1, int8_mask: true, normalize: true}
        dtype: bfloat16
        tokenizer_source: union
        """,
    "della_linear": """
        merge_method: della_linear
        dtype: bfloat16
        parameters: {epsilon: 0.1, lambda: 1.0, normalize: true}
        base_model: A
        models:
          - {model: B, parameters: {weight: [0.2, 0.8], density: 0.55}}
          - {model: C, parameters: {weight: [0.8, 0.2], density: 0.55}}
        """,
    "multislerp": """
        models:
          - {model: A, parameters: {weight: 0.5}}
          - {model: B, parameters: {weight: 0.25}}
          - {model: C, parameters: {weight: 0.25}}
        merge_method: multislerp
        parameters: {normalize_weights: true, eps: 1e-8}
        dtype: bfloat16
        """,
    "nearswap": """
        slices:
          - sources:
              - {model: A, layer_range: [0, 4]}
              - {model: B, layer_range: [0, 4]}
        merge_method: nearswap
        base_model: A
        parameters: {t: [{value: 0.0001}]}
        dtype: bfloat16
        """,
    "arcee_fusion": """
        models: [{model: A}, {model: B}]
        merge_method: arcee_fusion
        base_model: A
        dtype: bfloat16
        out_dtype: bfloat16
        tokenizer: {source: base}
        """,
    "nuslerp": """
        models:
          - {model: A, parameters: {weight: 0.6}}
          - {model: B, parameters: {weight: 0.4}}
        merge_method: nuslerp
        parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
        dtype: float32
        """,
    "karcher": """
        merge_method: karcher
        models: [{model: A}, {model: B}, {model: C}]
        parameters: {max_iter: 10, tol: 1e-5}
        dtype: bfloat16
        """,
    "sce": """
        models: [{model: B}, {model: C}]
        merge_method: sce
        base_model: A
        parameters: {select_topk: 0.15}
        dtype: bfloat16
        chat_template: auto
        """,
    "linear": """
        models:
          - {model: A, parameters: {weight: 1.0}}
          - {model: B, parameters: {weight: 0.3}}
          - {model: C, parameters: {weight: [0.1, 0.5]}}
        merge_method: linear
        parameters: {normalize: true, int8_mask: true}
        dtype: float16
        """,
    "modules": """
        base_model: A
        dtype: bfloat16
        merge_method: slerp
        modules:
          default:
            slices:
              - sources:
                  - {layer_range: [0, 4], model: A}
                  - {layer_range: [0, 4], model: B}
        parameters: {t: 0.5}
        tokenizer: {}
        """,
    "stages": """
        name: first
        merge_method: linear
        dtype: float32
        models:
          - {model: A, parameters: {weight: 0.5}}
          - {model: B, parameters: {weight: 0.5}}
        ---
        merge_method: ties
        dtype: bfloat16
        base_model: A
        models:
          - {model: first, parameters: {weight: 0.7, density: 0.6}}
          - {model: C, parameters: {weight: 0.3, density: 0.6}}
        """,
    "a stack of merged slices": """
        slices:
          - sources:
              - {model: A, layer_range: [0, 2], parameters: {weight: 0.9}}
              - {model: B, layer_range: [0, 2], parameters: {weight: 0.1}}
          - sources:
              - {model: A, layer_range: [1, 4], parameters: {weight: 0.5}}
              - {model: C, layer_range: [1, 4], parameters: {weight: 0.5}}
        merge_method: linear
        dtype: bfloat16
        """,
    "chat": """
        models:
          - {model: A, parameters: {weight: 0.5}}
          - {model: B, parameters: {weight: 0.5}}
        merge_method: linear
        dtype: torch.bfloat16
        tokenizer:
          source: union
          tokens:
            <|im_start|>: {source: {kind: model_token, model: A, token_id: 5}}
            <|im_end|>: {source: {kind: zero}}
          pad_to_multiple_of: 32
        chat_template: chatml
        """,
}
WITHOUT_EFFECT = {
    "slerp with filters of the whole model": ("modelnorm", "embed_slerp"),
    "dare_ties": ("random_seed",),
    "model_stock": ("normalize", "int8_mask"),
    "linear": ("int8_mask",),
    "task_arithmetic": ("float64", "residual_weight"),
}


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> Path:
    """A folder with the donors A, B and C, of one base."""
    root = tmp_path_factory.mktemp("named")
    for seed, name in enumerate("ABC"):
        write_donor(root / name, seed=seed, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(root / "A")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(root / "A")
    return root


@torch.no_grad()
@pytest.mark.parametrize("title", RECIPES)
def test_a_published_structure_is_merged_and_loaded(named, run, title):
    from textwrap import dedent

    path, out = named / "recipe.yaml", named / "out"
    path.write_text(dedent(RECIPES[title]))
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(named / "out.stages", ignore_errors=True)
    status, _, errors = run("merge", path, out)
    assert status == 0, errors
    notes = [line for line in errors.splitlines() if "has no effect" in line]
    keys = WITHOUT_EFFECT.get(title, ())
    assert len(notes) == len(keys)
    assert all(any(key in note for note in notes) for key in keys)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = AutoTokenizer.from_pretrained(out)("the cat", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()
    assert run("check", out)[0] == 0


def test_there_are_25():
    assert len(RECIPES) >= 25


@pytest.mark.parametrize(
    "key, value, hint",
    [("embed_slrep", "true", "remove"), ("dtpye", "bfloat16", "dtype"), ("random_sed", "1", "")],
)
def test_misspelt_keys_stay_errors(named, run, key, value, hint):
    path = named / "misspelt.yaml"
    path.write_text(f"merge_method: passthrough\nmodels: [{{model: A}}]\n{key}: {value}\n")
    status, _, errors = run("check", path)
    assert status == 2 and key in errors and hint in errors


@pytest.mark.parametrize(
    "text", ["{densty: 0.5}", "{weight: [{filter: slef_attn, value: 1}, {value: 1}]}"]
)
def test_misspelt_parameters_and_filters_stay_errors(named, run, text):
    path = named / "misspelt.yaml"
    models = "[{model: A, parameters: {weight: 1}}, {model: B, parameters: {weight: 1}}]"
    if "weight" in text:
        models = "[{model: A}, {model: B}]"
    path.write_text(f"merge_method: linear\nmodels: {models}\nparameters: {text}\n")
    assert run("check", path)[0] == 2
