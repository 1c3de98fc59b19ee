"""The part of the build that pyproject.toml cannot say: an extension that may be absent."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "frankenmerge.splicing.methods._native",
            ["frankenmerge/splicing/methods/_native.c"],
            # vectors wherever they change no bit: fused operations would, and would make the result
            # the processor's
            extra_compile_args=["-std=c99", "-O3", "-ffp-contract=off", "-fno-trapping-math"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,  # without a compiler torch computes instead, slower
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
