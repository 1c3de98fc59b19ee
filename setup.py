"""The part of the build that pyproject.toml cannot say: an extension that may be absent."""

from setuptools import Extension, setup

METHODS = "frankenmerge/splicing/methods"
SOURCES = ("", "_elements", "_inputs", "_keep", "_linear", "_ranks", "_thinning")

setup(
    ext_modules=[
        Extension(
            "frankenmerge.splicing.methods._native",
            [f"{METHODS}/_native{name}.c" for name in SOURCES],
            depends=[f"{METHODS}/_native.h"],
            # Vectorise wherever that changes no bit. Fused operations would change some, and would
            # make the result depend on the processor.
            extra_compile_args=["-std=c99", "-O3", "-ffp-contract=off", "-fno-trapping-math"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,  # without a compiler, torch computes instead, more slowly
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
