"""Folders as commands leave them, without running a model; and a browser, where there is one."""

import os
import shutil
from pathlib import Path

import invented
import pytest


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run with everything but a checkpoint and atlases."""
    return invented.write_run(tmp_path / "run")


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window. Debian's package is `chromium`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not executable:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as running:
        as_root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        opened = running.chromium.launch(executable_path=executable, args=as_root)
        yield opened
        opened.close()
